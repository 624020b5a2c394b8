"""What each mitigation leaves of a backdoor, and what it costs: on backdoored and clean models.

`wm_eval.cleaning.run` does the work, `wm_eval.cleaning.profiles` holds the numbers of what ships,
`wm_eval.cleaning.tables` renders the records.
"""

__all__ = ["config", "measures", "methods", "profiles", "run", "tables"]
