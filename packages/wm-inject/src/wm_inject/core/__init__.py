"""What all packages share: images, files, checkpoints, poison plans, progress, settings."""

__all__ = [
    "checkpoint",
    "checks",
    "decode",
    "files",
    "images",
    "lazy",
    "plan",
    "presets",
    "progress",
    "randomness",
    "resume",
    "text",
    "toml_settings",
]
