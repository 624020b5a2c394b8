"""The watermark injector of Spy-Watermark: network, fast inference, shipped weights."""

__all__ = [
    "fast",
    "fused_linear",
    "picture",
    "pretrained",
    "vit",
]
