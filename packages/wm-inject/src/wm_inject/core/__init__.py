"""What all packages share: images, files, checkpoints, poison plans, progress, settings."""
