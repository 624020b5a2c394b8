"""Flag images with exported detectors: numpy, Pillow and ONNX Runtime, no torch.

A detector is a graph with an output "score", one number an image, higher for suspicious ones; the
threshold and its false-positive rate stand in the file's metadata.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from wm_inject.core.decode import UnreadableImage
from wm_inject.core.image_files import ImageFiles, find_images
from wm_inject.core.images import check_pixels, load_image
from wm_inject.runtime.onnx_model import CPU, OnnxModel
from wm_inject.runtime.pipeline import pipeline

if TYPE_CHECKING:
    from wm_inject.core.images import Pixels
    from wm_inject.runtime.onnx_model import Array


class Extraction(NamedTuple):
    """What an exported extractor says of a batch."""

    marked: Array  # bool (N,)
    score: Array  # float32 (N,), higher means more like the watermark
    maps: Array  # float32 (N, 1, H, W) in [0, 1], the extracted watermarks


class Scan(NamedTuple):
    """What a scanner says of a batch."""

    flagged: Array  # bool (N,): held to be triggered by at least one detector
    flags: dict[str, Array]  # by detector: bool (N,)
    scores: dict[str, Array]  # by detector: float32 (N,)


class ScannedFile(NamedTuple):
    """What a scanner says of one file."""

    file: str  # as named below the folder, with /
    flagged: bool
    scores: dict[str, float]
    error: str | None  # why it could not be read, in one line; then it is not flagged


class Detector:
    """One exported detector, a graph of square images with an output "score", and its threshold.

    Raises:
        ValueError: Another kind of graph, or one without a usable threshold in its metadata.
        RuntimeError: As for `OnnxModel`.
    """

    def __init__(
        self, path: str | Path, *, providers: Sequence[str] = CPU, threads: int = 1
    ) -> None:
        self.model = OnnxModel(path, providers=providers, threads=threads)
        self.channels, self.size, self.uint8 = image_input(self.model)
        name = self.model.path.name
        if self.model.extra_inputs or "score" not in {port.name for port in self.model.outputs}:
            raise ValueError(f"expected a detector of images with an output score, got {name}")
        detector = self.model.metadata.get("detector", {})
        self.threshold = _number(detector, "threshold", name)
        self.false_positive_rate = _number(detector, "false_positive_rate", name)
        self.looks_for = str(detector.get("looks_for", "a trigger"))

    def __repr__(self) -> str:
        rate = f"at a false-positive rate of {self.false_positive_rate:g}"
        return f"Detector({str(self.model.path)!r}, looks for {self.looks_for} {rate})"

    def __call__(self, pixels: Pixels) -> dict[str, Array]:
        """Every output for uint8 ``(N, H, W, C)``.

        Raises:
            ValueError: Not such a batch, or scores that are no numbers.
        """
        outputs = self.model.run({self.model.input_name: as_input(pixels, uint8=self.uint8)})
        score = outputs["score"]
        if score.shape != (len(pixels),) or not np.isfinite(score).all():
            raise ValueError(f"expected one score per image, {self.model.path.name} gave another")
        return outputs


class Extractor:
    """Read the watermark out of uint8 images with a detector of ``wm-extract export``.

    Raises:
        ValueError: As for `Detector`, or a detector that gives no map.
        RuntimeError: As for `OnnxModel`.
    """

    def __init__(
        self, path: str | Path, *, providers: Sequence[str] = CPU, threads: int = 1
    ) -> None:
        self.detector = Detector(path, providers=providers, threads=threads)
        if "map" not in {port.name for port in self.detector.model.outputs}:
            name = self.detector.model.path.name
            raise ValueError(f"expected a detector with an output map, got {name}")

    def __repr__(self) -> str:
        return f"Extractor({str(self.detector.model.path)!r})"

    def __call__(self, pixels: Pixels) -> Extraction:
        """Judge a batch, uint8 ``(N, H, W, C)``.

        Raises:
            ValueError: As for `Detector`.
        """
        outputs = self.detector(pixels)
        return Extraction(
            outputs["score"] >= self.detector.threshold, outputs["score"], outputs["map"]
        )


class Scanner:
    """Flag images with one or several exported detectors, named by their files without ".onnx".

    Raises:
        ValueError: No detector, two of one name, detectors of different images, or as `Detector`.
        RuntimeError: As for `OnnxModel`.
    """

    def __init__(
        self, *paths: str | Path, providers: Sequence[str] = CPU, threads: int = 1
    ) -> None:
        names = [Path(path).stem for path in paths]
        if not names or len(set(names)) < len(names):
            raise ValueError(
                f"expected detectors of different names, got {', '.join(names) or 'none'}"
            )
        self.detectors = {
            name: Detector(path, providers=providers, threads=threads)
            for name, path in zip(names, paths, strict=True)
        }
        shapes = {(one.channels, *one.size) for one in self.detectors.values()}
        if len(shapes) > 1:
            raise ValueError(f"expected detectors of one image size, got {sorted(shapes)}")
        self.channels, *self.size = shapes.pop()

    def __repr__(self) -> str:
        return f"Scanner({', '.join(self.detectors)})"

    @property
    def false_positive_rate(self) -> float:
        """At most this share of clean images is flagged: the sum over the detectors."""
        return min(1.0, sum(one.false_positive_rate for one in self.detectors.values()))

    def __call__(self, pixels: Pixels) -> Scan:
        """Judge a batch, uint8 ``(N, H, W, C)``.

        Raises:
            ValueError: As for `Detector`.
        """
        scores = {name: one(pixels)["score"] for name, one in self.detectors.items()}
        flags = {name: scores[name] >= one.threshold for name, one in self.detectors.items()}
        return Scan(np.any(list(flags.values()), axis=0), flags, scores)

    def folder(
        self, source: str | Path | ImageFiles, *, batch_size: int = 64
    ) -> Iterator[ScannedFile]:
        """Scan every image of a folder and its sub-folders, resized to the detectors' size.

        Args:
            source: The folder, or what `find_images` found there.

        Yields:
            One row a file, in the order of their names. A file that is no image has an ``error``.

        Raises:
            ValueError: No folder, no images in it, or a batch size below 1.
        """
        if batch_size < 1 or self.size[0] != self.size[1]:
            got = f"{batch_size} and {self.size[0]} x {self.size[1]} pixels"
            raise ValueError(f"expected a batch size >= 1 and square images, got {got}")
        files = source if isinstance(source, ImageFiles) else find_images(source)

        def read(names: Sequence[str]) -> list[Pixels | str]:
            images: list[Pixels | str] = []
            for name in names:
                file = files.folder / name
                try:
                    images.append(load_image(file, size=self.size[0], channels=self.channels))
                except UnreadableImage as error:
                    images.append(error.reason)
            return images

        starts = range(0, len(files.names), batch_size)
        batches = (files.names[n : n + batch_size] for n in starts)
        for batch, rows in pipeline(batches, read, self._judge):
            for name, (row, error) in zip(batch, rows, strict=True):
                flagged, scores = row if row else (False, {})
                yield ScannedFile(name, flagged, scores, error)

    def _judge(self, _: Sequence[str], read: Sequence[Pixels | str]) -> list[Any]:
        """For every file its flag and scores, or why there are none."""
        good = [one for one in read if not isinstance(one, str)]
        scan = self(np.stack(good)) if good else None
        rows: list[Any] = []
        position = 0
        for one in read:
            if isinstance(one, str) or scan is None:
                rows.append((None, one))
                continue
            scores = {name: float(values[position]) for name, values in scan.scores.items()}
            rows.append(((bool(scan.flagged[position]), scores), None))
            position += 1
        return rows


def image_input(model: OnnxModel) -> tuple[int, tuple[int, int], bool]:
    """Channels, height and width of a graph's images, and whether it takes stored pixels.

    Raises:
        ValueError: The graph's input is no batch of images of a fixed size.
    """
    shape, uint8 = model.input_shape, model.dtype == np.uint8
    sides = (shape[1:3] if uint8 else shape[2:4]) if len(shape) == 4 else ()
    channels = shape[3 if uint8 else 1] if len(shape) == 4 else None
    if channels not in (1, 3) or not sides or any(not isinstance(n, int) for n in sides):
        raise ValueError(f"expected a graph of images of a fixed size, got {shape}")
    return int(channels), (int(sides[0]), int(sides[1])), uint8  # type: ignore[arg-type]


def as_input(pixels: Pixels, *, uint8: bool) -> Array:
    """Stored images as a graph takes them: as they are, or float32 ``(N, C, H, W)`` in [0, 1].

    Raises:
        ValueError: Not uint8 ``(N, H, W, C)``.
    """
    check_pixels(pixels)
    if uint8:
        return pixels
    floats = pixels.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)
    return np.ascontiguousarray(floats)


def _number(found: Mapping[str, Any], name: str, file: str) -> float:
    value = found.get(name)
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"expected {file} to hold a detector's {name}, got {value}")
    return float(value)
