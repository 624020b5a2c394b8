"""An ONNX model under ONNX Runtime: numpy in, numpy out, every input checked, no torch.

ONNX files cannot run code, but a hostile one can hang or exhaust the process that opens it: open an
untrusted model with wm-victim.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from importlib import metadata as installed
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from wm_inject.runtime.watchdog import after

Array = np.ndarray[Any, Any]

CUDA = "CUDAExecutionProvider"
CPU = ("CPUExecutionProvider",)
METADATA_KEY = "wm"  # where the exporter leaves its JSON inside the ONNX file
_TYPES = {
    "tensor(float)": "float32",
    "tensor(uint8)": "uint8",
    "tensor(int64)": "int64",
    "tensor(bool)": "bool",
}


def providers_for(device: str) -> tuple[str, ...]:
    """The providers to ask for: CUDA and nothing less for "cuda", else the CPU.

    "auto" means the CPU: ONNX Runtime says that it has CUDA where there is no GPU, so nothing
    short of opening a session can tell.

    Raises:
        ValueError: Another device than "auto", "cpu" or "cuda".
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"expected a device in auto, cpu, cuda, got {device!r}")
    return (CUDA, *CPU) if device == "cuda" else CPU


class Port(NamedTuple):
    """One input or output of a graph."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...]  # a name or None where any length goes: the batch

    def check(self, array: Array) -> None:
        """Refuse an array that does not fit.

        Raises:
            ValueError: Another type or shape, or an empty batch.
        """
        expected = ", ".join(str(n) for n in self.shape)
        if not isinstance(array, np.ndarray) or array.dtype != self.dtype:
            got = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
            raise ValueError(f"expected {self.name} in {self.dtype}, ({expected}), got {got}")
        fits = len(array.shape) == len(self.shape) and all(
            not isinstance(want, int) or want == got
            for want, got in zip(self.shape, array.shape, strict=True)
        )
        if not fits or array.size == 0:
            raise ValueError(f"expected {self.name} of shape ({expected}), got {array.shape}")


class OnnxModel:
    """An ONNX model with one image input, ready to run; several threads may share it.

    Beside the images it may take int64 vectors with one number per image, such as the "ids" and
    "target" of a trigger: `extra_inputs` names them.

    Args:
        path: The .onnx file; weights that were stored apart must lie beside it.
        providers: The execution provider to run on; the first is the one that must be used.
        threads: Threads inside one operator.

    Raises:
        ValueError: No such file, not an ONNX model, or other inputs than these.
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
        self._session = open_session(self.path, tuple(providers), threads)
        self.provider: str = self._session.get_providers()[0]
        self.inputs = tuple(_port(one, self.path.name) for one in self._session.get_inputs())
        self.outputs = tuple(_port(one, self.path.name) for one in self._session.get_outputs())
        images = [port for port in self.inputs if port.dtype != np.int64]
        extra = [port for port in self.inputs if port.dtype == np.int64]
        if len(images) != 1 or any(len(port.shape) != 1 for port in extra):
            raise ValueError(
                f"expected one image input and int64 vectors beside it in {self.path.name}, "
                f"got {len(self.inputs)} inputs"
            )
        self.input_name = images[0].name
        self.input_shape, self.dtype = images[0].shape, images[0].dtype
        self.extra_inputs: tuple[str, ...] = tuple(port.name for port in extra)
        raw = self._session.get_modelmeta().custom_metadata_map.get(METADATA_KEY, "{}")
        try:
            metadata = json.loads(raw)
        except ValueError:
            metadata = None
        # Other exporters may use this name for something else.
        self.metadata: dict[str, Any] = metadata if isinstance(metadata, dict) else {}

    def __repr__(self) -> str:
        extra = "".join(f", {name}" for name in self.extra_inputs)
        return f"OnnxModel({str(self.path)!r}, {self.dtype.name} {self.input_shape}{extra})"

    def __call__(self, batch: Array, **extra: Array) -> Array:
        """Run a model that has one output on a batch, with every one of `extra_inputs` by name.

        Raises:
            ValueError: As for `run`, or a model of several outputs.
        """
        if len(self.outputs) != 1:
            names = ", ".join(port.name for port in self.outputs)
            raise ValueError(f"expected a model of one output, {self.path.name} gives {names}")
        return self.run({self.input_name: batch, **extra})[self.outputs[0].name]

    def run(self, feeds: Mapping[str, Array], *, timeout: float | None = None) -> dict[str, Array]:
        """Run the model.

        Args:
            feeds: Every one of ``inputs``, by name, all for the same number of images.
            timeout: Seconds after which the run is broken off; never if None.

        Returns:
            Every one of ``outputs``, by name.

        Raises:
            ValueError: Inputs too many or few, or of another type or shape, or an empty batch.
            TimeoutError: The run took longer than it may.
        """
        self.check(feeds)
        values = _run(self._session, feeds, timeout, bind=self.provider == CUDA)
        return dict(zip((port.name for port in self.outputs), values, strict=True))

    def check(self, feeds: Mapping[str, Array]) -> None:
        """Refuse inputs that `run` would refuse.

        Raises:
            ValueError: As for `run`.
        """
        if set(feeds) != {port.name for port in self.inputs}:
            names = ", ".join(port.name for port in self.inputs)
            got = ", ".join(sorted(feeds)) or "nothing"
            raise ValueError(f"expected the inputs {names}, got {got}")
        for port in self.inputs:
            port.check(feeds[port.name])
        counts = {port.name: len(feeds[port.name]) for port in self.inputs}
        if len(set(counts.values())) > 1:
            got = ", ".join(f"{n} of {name}" for name, n in counts.items())
            raise ValueError(f"expected as many numbers as images, got {got}")


def _port(found: Any, file: str) -> Port:
    """What ONNX Runtime says of an input or output."""
    if found.type not in _TYPES:
        raise ValueError(f"expected tensors of numbers in {file}, {found.name} is {found.type}")
    return Port(found.name, np.dtype(_TYPES[found.type]), tuple(found.shape))


def _run(
    session: Any, feeds: Mapping[str, Array], timeout: float | None, *, bind: bool
) -> list[Array]:
    """Run a session, and break it off when the time is over.

    With ``bind``, the arrays are bound once: a run then copies each to the device and back, and
    ONNX Runtime does not look for a place for every output.
    """
    import onnxruntime as ort

    options = ort.RunOptions()
    options.log_severity_level = 4
    if timeout is None:
        return _run_once(session, feeds, options, bind=bind)
    try:
        with after(timeout, partial(setattr, options, "terminate", True)):
            return _run_once(session, feeds, options, bind=bind)
    # ONNX Runtime has a class of its own for this, which is a bare Exception.
    except Exception as error:
        if options.terminate:
            raise TimeoutError(f"the model did not answer within {timeout:g} s") from error
        raise


def _run_once(session: Any, feeds: Mapping[str, Array], options: Any, *, bind: bool) -> list[Array]:
    if not bind:
        arrays: list[Array] = session.run(None, dict(feeds), options)
        return arrays
    binding = session.io_binding()
    for name, array in feeds.items():
        binding.bind_cpu_input(name, np.ascontiguousarray(array))
    for port in session.get_outputs():
        binding.bind_output(port.name)
    session.run_with_iobinding(binding, options)
    arrays = binding.copy_outputs_to_cpu()
    return arrays


def open_session(path: Path, providers: tuple[str, ...], threads: int) -> Any:
    """An ONNX Runtime session on the provider that was asked for, and on no other.

    Raises:
        ValueError: Not an ONNX model.
        RuntimeError: ONNX Runtime is missing or installed twice, or the provider is not there.
    """
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
    provider = providers[0]
    if provider not in ort.get_available_providers():
        raise RuntimeError(
            f"expected the provider {provider}, this ONNX Runtime was built without it"
        )
    if provider == CUDA:
        ort.preload_dlls()
    try:
        session = ort.InferenceSession(str(path), options, providers=list(providers))
    # ONNX Runtime raises a class of its own for each kind of bad file, all bare Exceptions.
    except Exception as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"cannot open {path.name} as an ONNX model: {first}") from error
    if session.get_providers()[0] != provider:
        got = session.get_providers()[0]
        raise RuntimeError(f"expected the provider {provider}, the session got {got}")
    return session


def _refuse_both_packages() -> None:
    """The two ONNX Runtimes share one folder: with both installed, either may be half there."""
    versions = []
    for name in ("onnxruntime", "onnxruntime-gpu"):
        try:
            versions.append(installed.version(name))
        except installed.PackageNotFoundError:
            continue
    if len(versions) == 2:
        raise RuntimeError("onnxruntime and onnxruntime-gpu are both installed: keep one of them")
