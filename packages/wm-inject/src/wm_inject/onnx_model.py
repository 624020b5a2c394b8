"""An ONNX model under ONNX Runtime: numpy in, numpy out, every input checked; no torch.

ONNX files cannot run code, but a hostile one can hang or exhaust the process that opens it: open a
stranger's model with wm-victim.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import metadata as installed
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

CPU = ("CPUExecutionProvider",)
METADATA_KEY = "wm"  # where the exporter leaves its JSON inside the ONNX file


class OnnxModel:
    """An ONNX model with one image input and one output, ready to run.

    Beside the images it may take int64 vectors with one number per image, such as the "ids" and
    "target" of a trigger: `extra_inputs` names them.

    Args:
        path: The .onnx file.
        providers: The execution provider to run on; the first is the one that must be used.
        threads: Threads inside one operator.

    Raises:
        ValueError: No such file, not an ONNX model, or other inputs and outputs than these.
        RuntimeError: ONNX Runtime is missing or installed twice, or the provider that was asked
            for is not the one the session got.
    """

    def __init__(
        self, path: str | Path, *, providers: Sequence[str] = CPU, threads: int = 1
    ) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"expected an ONNX model, found no file at {self.path}")
        if not providers or threads < 1:
            raise ValueError(f"expected a provider and threads >= 1, got {providers}, {threads}")
        self._session = _open_session(self.path, tuple(providers), threads)
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        images = [one for one in inputs if one.type != "tensor(int64)"]
        extra = [one for one in inputs if one.type == "tensor(int64)"]
        if len(images) != 1 or len(outputs) != 1 or any(len(one.shape) != 1 for one in extra):
            raise ValueError(
                f"expected one image input, int64 vectors beside it and one output in "
                f"{self.path.name}, got {len(inputs)} inputs and {len(outputs)} outputs"
            )
        self.input_name: str = images[0].name
        self.input_shape: tuple[int | str | None, ...] = tuple(images[0].shape)
        self.extra_inputs: tuple[str, ...] = tuple(one.name for one in extra)
        self.dtype = np.dtype(np.uint8 if "uint8" in images[0].type else np.float32)
        raw = self._session.get_modelmeta().custom_metadata_map.get(METADATA_KEY, "{}")
        self.metadata: dict[str, Any] = json.loads(raw)

    def __repr__(self) -> str:
        extra = "".join(f", {name}" for name in self.extra_inputs)
        return f"OnnxModel({str(self.path)!r}, {self.dtype.name} {self.input_shape}{extra})"

    def __call__(self, batch: Array, **extra: Array) -> Array:
        """Run the model.

        Args:
            batch: An array of the model's ``dtype`` and ``input_shape``, with at least one image.
            extra: Every one of `extra_inputs`, by name: int64 ``(N,)``.

        Returns:
            The model's output for the batch.

        Raises:
            ValueError: Another type or shape, an empty batch, or an extra input too many or few.
        """
        expected = ", ".join(str(n) for n in self.input_shape)
        if not isinstance(batch, np.ndarray) or batch.dtype != self.dtype:
            got = batch.dtype if isinstance(batch, np.ndarray) else type(batch).__name__
            raise ValueError(f"expected a {self.dtype} array ({expected}), got {got}")
        fits = len(batch.shape) == len(self.input_shape) and all(
            not isinstance(want, int) or want == got
            for want, got in zip(self.input_shape, batch.shape, strict=True)
        )
        if not fits or batch.shape[0] == 0:
            raise ValueError(f"expected a batch of shape ({expected}), got {batch.shape}")
        self._check_extra(extra, len(batch))
        output: Array = self._session.run(None, {self.input_name: batch, **extra})[0]
        return output

    def _check_extra(self, extra: Mapping[str, Array], count: int) -> None:
        if set(extra) != set(self.extra_inputs):
            wanted = ", ".join(self.extra_inputs) or "nothing"
            got = ", ".join(sorted(extra)) or "nothing"
            raise ValueError(f"expected {wanted} beside the images, got {got}")
        for name, values in extra.items():
            if not isinstance(values, np.ndarray) or values.dtype != np.int64:
                got = values.dtype if isinstance(values, np.ndarray) else type(values).__name__
                raise ValueError(f"expected {name} as an int64 array ({count},), got {got}")
            if values.shape != (count,):
                raise ValueError(f"expected {name} of shape ({count},), got {values.shape}")


def _open_session(path: Path, providers: tuple[str, ...], threads: int) -> Any:
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise RuntimeError(
            "ONNX Runtime is not installed: install wm-inject[cpu] or wm-inject[gpu]"
        ) from error
    _refuse_both_packages()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # a provider that is missing is reported below, in one line
    if threads > 1:
        # Threads that spin while they wait starve whatever else runs on the machine.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    asked = providers[0]
    if asked not in ort.get_available_providers():
        raise RuntimeError(f"expected the provider {asked}, this ONNX Runtime was built without it")
    if asked == "CUDAExecutionProvider":
        ort.preload_dlls()
    try:
        session = ort.InferenceSession(str(path), options, providers=list(providers))
    # ONNX Runtime raises a class of its own for each kind of bad file, all bare Exceptions.
    except Exception as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"cannot open {path.name} as an ONNX model: {first}") from error
    if session.get_providers()[0] != asked:
        got = session.get_providers()[0]
        raise RuntimeError(f"expected the provider {asked}, the session got {got}")
    return session


def _refuse_both_packages() -> None:
    """The two ONNX Runtimes share one folder: with both installed, either may be half there."""
    found = []
    for name in ("onnxruntime", "onnxruntime-gpu"):
        try:
            found.append(installed.version(name))
        except installed.PackageNotFoundError:
            continue
    if len(found) == 2:
        raise RuntimeError("onnxruntime and onnxruntime-gpu are both installed: keep one of them")
