"""Poison and scan images with exported models: numpy, Pillow and ONNX Runtime, no torch.

For graphs that this project exported. ONNX files cannot run code, but a hostile one can hang or
exhaust the process that opens it: open an untrusted model with wm-victim.
"""

from wm_inject.runtime.onnx_model import CPU, METADATA_KEY, OnnxModel, providers_for
from wm_inject.runtime.poisoner import Poisoner, poison_folder
from wm_inject.runtime.scanner import (
    Detector,
    Extraction,
    Extractor,
    Scan,
    ScannedFile,
    Scanner,
)

__all__ = [
    "CPU",
    "METADATA_KEY",
    "Detector",
    "Extraction",
    "Extractor",
    "OnnxModel",
    "Poisoner",
    "Scan",
    "ScannedFile",
    "Scanner",
    "poison_folder",
    "providers_for",
]
