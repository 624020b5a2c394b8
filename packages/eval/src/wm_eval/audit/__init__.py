"""Audits of untrusted models and images: open, check, scan, clean, report.

Nothing is imported here: the command line must answer ``--help`` without torch.
"""

__all__: list[str] = []
