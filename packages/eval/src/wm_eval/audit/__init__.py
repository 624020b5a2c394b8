"""Audits of models and images from strangers: open, check, scan, clean, report."""

from wm_eval.audit.checks import Check, Checked, NotScanned, check_model
from wm_eval.audit.images import CleanImages, read_clean
from wm_eval.audit.scan import Audit, audit

__all__ = [
    "Audit",
    "Check",
    "Checked",
    "CleanImages",
    "NotScanned",
    "audit",
    "check_model",
    "read_clean",
]
