"""Populations of small classifiers, and what detectors say about them.

`wm_eval.population.run` trains and scans, `summary` judges one half by the other.
"""

__all__ = ["config", "counts", "plan", "run", "summary", "tables"]
