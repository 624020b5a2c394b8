"""The models of a server: opened once at its start, each with what a request must keep to."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from wm_inject.runtime.onnx_model import CPU, Array, OnnxModel

VERSION = "1"  # a server has one version of each model: the file it was started with
DATATYPES = {"float32": "FP32", "uint8": "UINT8", "int64": "INT64", "bool": "BOOL"}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Served:
    """A model under its name.

    Args:
        name: What clients call it.
        model: The opened graph.
        classes: Labels that its "target" may take; None if the file does not say.
        joins: Whether images of several requests may run as one batch.
    """

    name: str
    model: OnnxModel
    classes: int | None
    joins: bool

    def check(self, feeds: Mapping[str, Array]) -> None:
        """Refuse inputs that the model must not be run on.

        Raises:
            ValueError: Inputs too many or few, another type or shape, an empty batch, float images
                outside [0, 1], or a target that is no label.
        """
        self.model.check(feeds)
        for name, array in feeds.items():
            if array.dtype == np.float32:
                low, high = float(array.min()), float(array.max())
                # A comparison with NaN is false, so this refuses NaN as well.
                if not (low >= 0 and high <= 1):
                    value_range = f"[{low:.4g}, {high:.4g}]"
                    raise ValueError(
                        f"expected {name} with finite values in [0, 1], got {value_range}"
                    )
        target = feeds.get("target")
        # A graph takes -1 for the last class, and any other number out of range for an error.
        if target is not None and self.classes is not None:
            first, last = int(target.min()), int(target.max())
            if first < 0 or last >= self.classes:
                raise ValueError(
                    f"expected target in 0 .. {self.classes - 1}, got {first} .. {last}"
                )

    def describe(self) -> dict[str, Any]:
        """The model's metadata as the Open Inference Protocol words it; -1 is any length.

        A detector's threshold and what it was chosen for come along as ``parameters``.
        """
        sides = {"inputs": self.model.inputs, "outputs": self.model.outputs}
        ports = {
            side: [
                {
                    "name": port.name,
                    "datatype": DATATYPES[port.dtype.name],
                    "shape": [n if isinstance(n, int) else -1 for n in port.shape],
                }
                for port in found
            ]
            for side, found in sides.items()
        }
        about = {"name": self.name, "versions": [VERSION], "platform": "onnx_onnxv1", **ports}
        detector = self.model.metadata.get("detector")
        return {**about, "parameters": detector} if isinstance(detector, dict) else about


def check_name(name: str) -> str:
    """Refuse a name that would not do in an address, a metric or a folder.

    Raises:
        ValueError: Anything but 1 to 64 letters, digits, dots, dashes and underscores.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(
            "expected a model name of up to 64 letters, digits and ._- that starts with a letter "
            f"or digit, got {str(name)[:80]!r}"
        )
    return name


def open_models(
    paths: Mapping[str, str | Path], *, providers: Sequence[str] = CPU, threads: int = 1
) -> dict[str, Served]:
    """Open every model of a server, the .onnx file of each name.

    Raises:
        ValueError: No models, a bad name, or a file that is no such model.
        RuntimeError: As for `OnnxModel`.
    """
    if not paths:
        raise ValueError("expected at least one model NAME=PATH, got none")
    models = {}
    for name, path in paths.items():
        check_name(name)
        model = OnnxModel(path, providers=providers, threads=threads)
        models[name] = Served(name, model, _classes(model), _joins(model))
    return models


def _classes(model: OnnxModel) -> int | None:
    """How many labels the file says there are. The metadata may hold anything."""
    config = model.metadata.get("config") if isinstance(model.metadata, dict) else None
    classes = config.get("num_classes") if isinstance(config, dict) else None
    return classes if type(classes) is int and classes > 0 else None


def _joins(model: OnnxModel) -> bool:
    """Whether the first axis of every input and output is a batch of any length."""
    ports = (*model.inputs, *model.outputs)
    return all(port.shape and not isinstance(port.shape[0], int) for port in ports)
