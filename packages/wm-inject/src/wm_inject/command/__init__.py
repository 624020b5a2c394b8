"""The command line: what the six commands share, and the verbs of wm-inject."""
