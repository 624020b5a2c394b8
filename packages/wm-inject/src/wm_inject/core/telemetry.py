"""Libraries that report to their makers are told not to, before any of them is imported."""

from __future__ import annotations

import os

# Each is read once, when its library is imported or started; SECURITY.md has the list.
VARIABLES = {
    "ORT_DISABLE_TELEMETRY": "1",  # ONNX Runtime 1.29: a device id, an event store, look-ups
    "RAY_USAGE_STATS_ENABLED": "0",  # Ray: a report when a cluster starts, and each hour
    "HF_HUB_DISABLE_TELEMETRY": "1",  # huggingface_hub, which timm imports
}


def disable_telemetry() -> None:
    """Set the variables in the environment of this process; one that is set already stays."""
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)
