"""`look_at_graph`: an untrusted ONNX file to its branches, read and run in a sandboxed child."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from wm_inject.core.image_size import ImageSize
from wm_inject.core.signals import exits_on_signals
from wm_inject.core.text import printable
from wm_victim.branches.report import GraphReport, read_report
from wm_victim.loading.child_process import run_child
from wm_victim.loading.contract import Limits, LoadingError, ModelOptions
from wm_victim.loading.file_formats import file_format
from wm_victim.loading.graphs import copy_external, require_packages, scan_file
from wm_victim.loading.regular_files import copy_regular_file

if TYPE_CHECKING:
    from wm_inject.core.images import Pixels

LIMITS = Limits(memory=2048 * 2**20, seconds=180.0, bytes_per_second=2**20)
_MOST_IMAGES = 64
_LARGEST = 512


def look_at_graph(
    path: str | Path,
    images: Pixels | None = None,
    *,
    image_size: ImageSize | None = None,
    channels: int | None = None,
    num_classes: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    limits: Limits = LIMITS,
) -> GraphReport:
    """Look for branches by which a picture can steer the answer of an ONNX graph.

    A branch goes around most of the trained layers, rests on clean pictures, and joins what the
    layers gave, or an answer computed from it. Stamps and gradients try to fire each one. It is
    accused (state "steers") only where a small change of clean pictures fires it, the answer
    changes, and does not change where the branch alone is held at rest. See docs/audit.md.

    Args:
        path: The ONNX file. Control flow is taken: it runs in the sandbox alone.
        images: 4 to 64 clean pictures, uint8 ``(N, H, W, 3)``; pictures of random discs if None.
        image_size: H = W of what the graph takes, or (H, W); the graph's own, or a usual one, if
            None.
        channels: 1 or 3; the graph's own if None.
        num_classes: K, to tell outputs apart.
        mean: What the graph expects to be subtracted from pictures in [0, 1], per channel.
        std: And what they are to be divided by.
        limits: What the file may ask for.

    Raises:
        LoadingError: One line with the reason why the graph could not be looked at.
        ValueError: An argument outside its range.
        RuntimeError: A package that reads ONNX is not installed.
    """
    mean, std = (None if values is None else tuple(values) for values in (mean, std))
    options = ModelOptions(None, num_classes, image_size, channels, mean, std)
    _check_images(images)
    path = Path(path)
    with (
        exits_on_signals(),
        tempfile.TemporaryDirectory(prefix="wm-graph-", ignore_cleanup_errors=True) as scratch,
    ):
        for folder in ("in", "out"):
            (Path(scratch) / folder).mkdir()
        snapshot = Path(scratch, "in", "model")
        try:
            digest = copy_regular_file(path, snapshot, max_bytes=limits.max_bytes)
            with snapshot.open("rb") as file:
                if (kind := file_format(file.read(512))) in ("safetensors", "zip", "legacy"):
                    raise LoadingError(f"expected an ONNX graph, got a {kind} file")
            scan = scan_file(snapshot, limits, runs_only=True)
            size = copy_external(path, snapshot, scan, limits)
            require_packages()
            if images is not None:
                np.save(snapshot.with_name("images.npy"), images)
            settings = options.for_child() | {
                "mean": mean,
                "std": std,
                "images": images is not None,
            }
            answer = run_child("graph", snapshot, size, limits, settings)
            return read_report(answer, sha256=digest, own_images=images is not None)
        except LoadingError as error:
            reason = printable(error, 800)
            raise LoadingError(f"cannot look at {printable(path.name)}: {reason}") from error


def _check_images(images: Pixels | None) -> None:
    if images is None:
        return
    shape: list[int] = list(getattr(images, "shape", ()))
    dtype = getattr(images, "dtype", None)
    fits = dtype == np.uint8 and len(shape) == 4 and shape[3] == 3
    if not fits or min(shape[1:3]) < 4 or max(shape[1:3]) > _LARGEST:
        raise ValueError(
            f"expected uint8 images of shape (N, H, W, 3) and 4 .. {_LARGEST} pixels, "
            f"got {dtype} {tuple(shape)}"
        )
    if not 4 <= shape[0] <= _MOST_IMAGES:
        raise ValueError(f"expected 4 .. {_MOST_IMAGES} images, got {shape[0]}")
