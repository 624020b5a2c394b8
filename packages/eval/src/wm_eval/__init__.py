"""Measure attacks and defences: robustness tables, records, reports, and the command that runs a whole study."""

from wm_eval.__about__ import __version__ as __version__
