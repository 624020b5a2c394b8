"""The attacks of the field's table under one recipe: the study, its tables and its figure.

`wm_eval.attacks.run` runs a study, `wm_eval.attacks.profiles` holds the numbers of those that ship.
"""

__all__ = ["config", "figure", "profiles", "run", "tables"]
