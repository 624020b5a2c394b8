"""The reverse-generator paper's experiment: detection, mitigation, its tables and its figures.

`wm_eval.paper2.run` does the work, `tables` and `figures` render its records.
"""

__all__ = ["config", "figures", "run", "summary", "tables"]
