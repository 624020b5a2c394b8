"""The watermark injector of Spy-Watermark: network, fast inference, shipped weights."""

__all__ = [
    "fast",
    "pretrained",
    "products",
    "vit",
    "vit_block",
]
