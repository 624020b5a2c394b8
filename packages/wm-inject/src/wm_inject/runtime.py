"""Poison images with an exported model: numpy, Pillow and ONNX Runtime, no torch.

Meant for graphs that this project exported. ONNX files cannot run code, but a hostile one can hang
or exhaust the process that opens it: open a stranger's model with wm-victim.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata as installed
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from wm_inject.files import write_json
from wm_inject.images import check_pixels, list_images, load_image, save_image

if TYPE_CHECKING:
    from wm_inject.images import Pixels

    Array = np.ndarray[Any, Any]

CPU = ("CPUExecutionProvider",)
METADATA_KEY = "wm"  # where the exporter leaves its JSON inside the ONNX file


class OnnxModel:
    """An ONNX model with one image input and one output, ready to run.

    Args:
        path: The .onnx file.
        providers: The execution provider to run on; the first is the one that must be used.
        threads: Threads inside one operator.

    Raises:
        ValueError: No such file, not an ONNX model, or more than one input.
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
        if len(inputs) != 1 or len(outputs) != 1:
            raise ValueError(
                f"expected one input and one output in {self.path.name}, "
                f"got {len(inputs)} and {len(outputs)}"
            )
        self.input_name: str = inputs[0].name
        self.input_shape: tuple[int | str | None, ...] = tuple(inputs[0].shape)
        self.dtype = np.dtype(np.uint8 if "uint8" in inputs[0].type else np.float32)
        raw = self._session.get_modelmeta().custom_metadata_map.get(METADATA_KEY, "{}")
        self.metadata: dict[str, Any] = json.loads(raw)

    def __repr__(self) -> str:
        return f"OnnxModel({str(self.path)!r}, {self.dtype.name} {self.input_shape})"

    def __call__(self, batch: Array) -> Array:
        """Run the model.

        Args:
            batch: An array of the model's ``dtype`` and ``input_shape``, with at least one image.

        Returns:
            The model's output for the batch.

        Raises:
            ValueError: Another type or shape, or an empty batch.
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
        output: Array = self._session.run(None, {self.input_name: batch})[0]
        return output


class Poisoner:
    """Put an exported trigger into uint8 images.

    Args:
        path: A trigger exported with `to_onnx`, as a float or as a uint8 graph.
        providers: As for `OnnxModel`.
        threads: As for `OnnxModel`.

    Raises:
        ValueError: Not an ONNX model of one image input with a fixed height and width.
        RuntimeError: As for `OnnxModel`.
    """

    def __init__(
        self, path: str | Path, *, providers: Sequence[str] = CPU, threads: int = 1
    ) -> None:
        self.model = OnnxModel(path, providers=providers, threads=threads)
        shape = self.model.input_shape
        self.uint8 = self.model.dtype == np.uint8
        sides = (shape[1:3] if self.uint8 else shape[2:4]) if len(shape) == 4 else ()
        channels = shape[3 if self.uint8 else 1] if len(shape) == 4 else None
        if channels not in (1, 3) or not sides or any(not isinstance(n, int) for n in sides):
            raise ValueError(f"expected a graph of images of a fixed size, got {shape}")
        self.channels, self.size = int(channels), (int(sides[0]), int(sides[1]))  # type: ignore[arg-type]

    def __repr__(self) -> str:
        return f"Poisoner({str(self.model.path)!r}, size={self.size}, channels={self.channels})"

    def __call__(self, pixels: Pixels) -> Pixels:
        """Poison a batch: uint8 ``(N, H, W, C)`` to the same shape and type.

        Raises:
            ValueError: Not such a batch, or the graph's output is not an image batch.
        """
        check_pixels(pixels)
        if self.uint8:
            out = self.model(pixels)
        else:
            floats = pixels.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)
            out = self.model(np.ascontiguousarray(floats))
            if out.ndim == 4:
                # Half up, as wm_inject.images.quantize does it.
                out = np.floor(np.clip(out, 0, 1) * 255 + 0.5).astype(np.uint8)
                out = np.ascontiguousarray(out.transpose(0, 2, 3, 1))
        if out.shape != pixels.shape or out.dtype != np.uint8:
            raise ValueError(
                f"expected a graph that gives images {pixels.shape}, got {out.dtype} {out.shape}"
            )
        return out


def poison_folder(
    model_path: str | Path,
    source: str | Path,
    out: str | Path,
    *,
    batch_size: int = 64,
    providers: Sequence[str] = CPU,
) -> int:
    """Poison every image of a folder with an exported trigger.

    Args:
        model_path: The exported trigger (.onnx).
        source: A folder of images; sub-folders are kept.
        out: Where the PNG files and ``plan.json`` go.
        batch_size: Images at once.
        providers: As for `OnnxModel`.

    Returns:
        How many images were written.

    Raises:
        ValueError: No images, an unreadable image, or a folder that cannot be written to safely.
        RuntimeError: As for `OnnxModel`.
    """
    poisoner = Poisoner(model_path, providers=providers)
    height, width = poisoner.size
    if height != width:
        raise ValueError(f"expected a trigger for square images, got {height} x {width}")
    record = {"trigger": poisoner.model.metadata, "model": Path(model_path).name}
    return poison_files(
        poisoner,
        source,
        out,
        size=height,
        channels=poisoner.channels,
        batch_size=batch_size,
        record=record,
    )


def poison_files(
    apply: Callable[[Pixels], Pixels],
    source: str | Path,
    out: str | Path,
    *,
    size: int,
    channels: int,
    batch_size: int = 64,
    record: Mapping[str, Any] | None = None,
) -> int:
    """Put every image of a folder through ``apply`` and write the results as PNG.

    Args:
        apply: uint8 ``(N, size, size, channels)`` to the same.
        source: A folder of images; sub-folders are kept.
        out: Where the PNG files and ``plan.json`` go; must not lie inside ``source``.
        size: Side that the images are resized to, bilinear.
        channels: 1 or 3.
        batch_size: Images at once.
        record: What else to write to ``plan.json``.

    Returns:
        How many images were written.

    Raises:
        ValueError: No images, an unreadable one, two that would become one file, or a bad ``out``.
    """
    source, out = Path(source), Path(out)
    if batch_size < 1:
        raise ValueError(f"expected a batch size >= 1, got {batch_size}")
    if out.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"expected an output folder outside {source}, got {out}")
    files = list_images(source)
    targets = [file.relative_to(source).with_suffix(".png") for file in files]
    seen: dict[Path, Path] = {}
    for file, target in zip(files, targets, strict=True):
        if target in seen:
            raise ValueError(
                f"expected distinct names, {seen[target]} and {file} are both {target}"
            )
        seen[target] = file
    for start in range(0, len(files), batch_size):
        chunk = files[start : start + batch_size]
        pixels = np.stack([load_image(file, size=size, channels=channels) for file in chunk])
        for target, image in zip(targets[start : start + batch_size], apply(pixels), strict=True):
            save_image(out / target, image)
    pairs = zip(files, targets, strict=True)
    images = [{"source": f.relative_to(source).as_posix(), "file": t.as_posix()} for f, t in pairs]
    write_json(
        out / "plan.json",
        {**(record or {}), "image_size": size, "channels": channels, "images": images},
    )
    return len(files)


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
