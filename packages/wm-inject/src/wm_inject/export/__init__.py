"""Export to TorchScript and ONNX, each followed by a reload and a numerical comparison."""

from wm_inject.export.exporters import METADATA_FILE, TOLERANCES, to_onnx, to_torchscript
from wm_inject.export.parity import Parity, ParityError

__all__ = [
    "METADATA_FILE",
    "TOLERANCES",
    "Parity",
    "ParityError",
    "to_onnx",
    "to_torchscript",
]
