"""What all packages share: images, files, checkpoints, poison plans, progress, settings."""

__all__ = [
    "checkpoint",
    "checks",
    "decode",
    "errors",
    "files",
    "images",
    "lazy",
    "plan",
    "presets",
    "progress",
    "randomness",
    "resume",
    "signals",
    "telemetry",
    "text",
    "toml_settings",
]
