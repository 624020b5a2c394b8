"""The command line: what the six commands share, and the verbs of wm-inject."""

__all__ = [
    "common",
    "config",
    "export",
    "fit",
    "poison",
    "scan",
    "serve",
    "stealth",
    "trigger_options",
]
