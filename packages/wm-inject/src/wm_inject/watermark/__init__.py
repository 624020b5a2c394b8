"""The watermark injector of Spy-Watermark: network, fast inference, shipped weights."""
