"""Audits of models and images from strangers: open, check, scan, clean, report.

Nothing is imported here: the command line must answer ``--help`` without torch.
"""

__all__: list[str] = []
