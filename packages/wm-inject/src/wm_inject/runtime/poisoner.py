"""Put an exported trigger into images, or into a folder of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from wm_inject.core.files import sha256_file
from wm_inject.core.whole_pictures import ANY_SIZE
from wm_inject.runtime.folder import poison_files
from wm_inject.runtime.onnx_model import CPU, OnnxModel
from wm_inject.runtime.scanner import as_input, image_input

if TYPE_CHECKING:
    from wm_inject.core.images import Pixels
    from wm_inject.core.labelled_folder import LabelledFolder
    from wm_inject.core.plan import PoisonPlan
    from wm_inject.runtime.folder import FolderResult
    from wm_inject.runtime.onnx_model import Array


# Images in one run on a CPU: what a network computes of them stays in the caches. At 32 at once the
# large learned injectors are slower (bench_injector.py, "in parts").
_AT_ONCE = 8


class Poisoner:
    """Put an exported trigger (a float or uint8 graph of `to_onnx`) into uint8 images.

    Raises:
        ValueError: Not an ONNX model of one image input with a fixed height and width, or one with
            inputs beside ids and target.
        RuntimeError: As for `OnnxModel`.
    """

    def __init__(
        self, path: str | Path, *, providers: Sequence[str] = CPU, threads: int = 1
    ) -> None:
        self.model = OnnxModel(path, providers=providers, threads=threads)
        self.channels, self.size, self.uint8 = image_input(self.model)
        if len(self.model.outputs) != 1:
            raise ValueError(f"expected a graph of one output, got {len(self.model.outputs)}")
        unknown = sorted(set(self.model.extra_inputs) - {"ids", "target"})
        if unknown:
            raise ValueError(f"expected a graph of images, ids and target, got {unknown[0]!r}")
        self.needs_ids = "ids" in self.model.extra_inputs
        self.needs_target = "target" in self.model.extra_inputs

    def __repr__(self) -> str:
        return f"Poisoner({str(self.model.path)!r}, size={self.size}, channels={self.channels})"

    def __call__(
        self, pixels: Pixels, *, ids: Array | None = None, target: Array | None = None
    ) -> Pixels:
        """Poison uint8 ``(N, H, W, C)``, with int64 ``(N,)`` ids and targets where they are needed.

        Raises:
            ValueError: Not such a batch, missing ids or targets, or an output that is no batch.
        """
        images = as_input(pixels, uint8=self.uint8)
        extra = self._extra(len(images), {"ids": ids, "target": target})
        step = _AT_ONCE if self.model.provider == CPU[0] else len(images)
        parts = [slice(start, start + step) for start in range(0, len(images), step)]
        out = np.concatenate(
            [self.model(images[p], **{name: v[p] for name, v in extra.items()}) for p in parts]
        )
        if out.ndim == 4 and not self.uint8:
            # Half up, as wm_inject.core.images.quantize does it.
            out = np.floor(np.clip(out, 0, 1) * 255 + 0.5).astype(np.uint8)
            out = np.ascontiguousarray(out.transpose(0, 2, 3, 1))
        if out.shape != pixels.shape or out.dtype != np.uint8:
            raise ValueError(
                f"expected a graph that gives images {pixels.shape}, got {out.dtype} {out.shape}"
            )
        return out

    def _extra(self, count: int, vectors: dict[str, Array | None]) -> dict[str, Array]:
        """What the graph takes beside the images."""
        extra: dict[str, Array] = {}
        for name in self.model.extra_inputs:
            values = vectors[name]
            if values is None:
                raise ValueError(f"expected {name}, which this trigger needs, got None")
            if np.shape(values) != (count,):
                raise ValueError(f"expected {name} of shape ({count},), got {np.shape(values)}")
            extra[name] = values
        classes = self.model.metadata.get("config", {}).get("num_classes")
        targets = extra.get("target")
        # A graph takes -1 for the last class, and any other number out of range for an error.
        if targets is not None and classes is not None and np.size(targets):
            low, high = int(np.min(targets)), int(np.max(targets))
            if low < 0 or high >= classes:
                raise ValueError(f"expected target in 0 .. {classes - 1}, got {low} .. {high}")
        return extra


def poison_folder(
    model_path: str | Path,
    source: str | Path | LabelledFolder,
    out: str | Path,
    *,
    plan: PoisonPlan | None = None,
    batch_size: int = 64,
    skip_unreadable: bool = False,
    whole: bool | None = None,
    jpeg_quality: int = 95,
    providers: Sequence[str] = CPU,
    progress: bool = True,
) -> FolderResult:
    """Poison a folder with an exported trigger: every image, or those that a plan chooses.

    A call that was stopped can be repeated and continues; the arguments and the files that are
    written are those of `wm_inject.runtime.folder.poison_files`.

    Args:
        whole: Keep each picture's size and format; by default where the trigger allows it, which
            the learned watermark does.

    Raises:
        ValueError: No images, an unreadable image, a plan that does not fit them, an output folder
            that holds something else, or a trigger that cannot be laid over whole pictures.
        RuntimeError: As for `OnnxModel`.
    """
    poisoner = Poisoner(model_path, providers=providers)
    height, width = poisoner.size
    if height != width:
        raise ValueError(f"expected a trigger for square images, got {height} x {width}")
    any_size = poisoner.model.metadata.get("kind") in ANY_SIZE
    if whole and not any_size:
        raise ValueError("expected a learned watermark to keep pictures whole, got another trigger")
    digest = sha256_file(model_path)
    return poison_files(
        poisoner,
        source,
        out,
        size=height,
        channels=poisoner.channels,
        plan=plan,
        batch_size=batch_size,
        skip_unreadable=skip_unreadable,
        whole=any_size if whole is None else whole,
        jpeg_quality=jpeg_quality,
        record={
            "trigger": poisoner.model.metadata,
            "model": Path(model_path).name,
            "sha256": digest,
        },
        progress=progress,
    )
