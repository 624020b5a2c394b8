"""Poison a folder of images by a plan; a stopped run continues where it was."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from wm_inject.core.decode import stored_size
from wm_inject.core.files import atomic_path, write_json
from wm_inject.core.images import check_side, list_images, load_image, save_image
from wm_inject.core.plan import Labels, PoisonPlan
from wm_inject.core.progress import Progress
from wm_inject.core.progress import progress as show_progress
from wm_inject.runtime.folder_plan import FolderRow, list_rows, read_labels
from wm_inject.runtime.pipeline import pipeline

if TYPE_CHECKING:
    from wm_inject.core.images import Pixels

FORMAT = "wm-folder-1"
PLAN_FILE, LABELS_FILE = "plan.json", "labels.csv"
_HALF_WRITTEN = re.compile(r"\..+\.part\d+\.(png|json|csv)")  # how atomic_path names its files


class Apply(Protocol):
    """A trigger on stored images: uint8 ``(N, H, W, C)`` to the same."""

    def __call__(self, pixels: Pixels, *, ids: Labels, target: Labels) -> Pixels:
        """Put the trigger into a batch; ``ids`` and ``target`` are int64 ``(N,)``."""


class FolderResult(NamedTuple):
    """What came of a folder."""

    images: int  # files in the whole set
    poisoned: int  # those of them that carry the trigger
    written: int  # those that this call wrote; the others were there


def poison_files(
    apply: Apply,
    source: str | Path,
    out: str | Path,
    *,
    size: int,
    channels: int,
    plan: PoisonPlan | None = None,
    batch_size: int = 64,
    record: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> FolderResult:
    """Poison the files of a folder that a plan chooses, and write all of them as PNG.

    ``plan.json`` is written first: every file with its label before and after. Files outside the
    plan are decoded, resized and written like the others, so ``out`` is a whole data set. Where
    ``source`` consists of class folders, ``labels.csv`` names each file's class after poisoning,
    as wm-victim reads it. Existing files are left alone, so a stopped call can be repeated; with
    the same batch size it ends with the same bytes.

    Args:
        apply: The trigger, on a batch of chosen files.
        source: A folder of images; sub-folders are kept.
        out: Must not lie inside ``source``.
        size: Side that the images are resized to, bilinear.
        channels: 1 or 3.
        plan: Which files are poisoned; every one if None.
        record: What tells this trigger from others (JSON types); goes to ``plan.json``.

    Raises:
        ValueError: No images, an unreadable one, two that would become one file, a plan that does
            not fit them, a bad ``out``, or one that holds the files of another run.
    """
    source, out, plan = Path(source), Path(out), plan or PoisonPlan(ratio=None)
    check_side(size)
    if batch_size < 1 or channels not in (1, 3):
        got = f"{batch_size} and {channels}"
        raise ValueError(f"expected a batch size >= 1 and channels 1 or 3, got {got}")
    if out.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"expected an output folder outside {source}, got {out}")
    files = list_images(source)
    known = read_labels(source, files)
    rows = list_rows(source, files, known, plan)
    settings = {
        **(record or {}),
        "format": FORMAT,
        "plan": asdict(plan),
        "image_size": size,
        "channels": channels,
        "classes": None if known is None else list(known.classes),
        "images": [row._asdict() for row in rows],
    }
    _begin(out, settings, rows)
    if known is not None:
        _write_labels(out / LABELS_FILE, rows, known.classes)
    written = 0
    batches = _Batches(apply, source, out, size, channels, plan.target)
    shown: Progress[Any]
    with show_progress(total=len(rows), desc="poisoning", enabled=progress) as shown:
        for batch, pixels in pipeline(
            _batches(rows, batch_size), batches.read, batches.work, batches.write
        ):
            written += 0 if pixels is None else len(pixels)
            shown.update(len(batch))
    return FolderResult(len(rows), sum(row.poisoned for row in rows), written)


def common_side(source: str | Path) -> int:
    """The side, in pixels, that all images of a folder have.

    Raises:
        ValueError: No images, an unreadable one, or images that are not all square and of one size.
    """
    sizes: dict[tuple[int, int], Path] = {}
    for file in list_images(source):
        sizes.setdefault(stored_size(file), file)
        width, height = next(iter(sizes))
        if len(sizes) > 1 or width != height:
            sizes_text = " and ".join(f"{name.name} {w} x {h}" for (w, h), name in sizes.items())
            raise ValueError(
                f"expected --image-size, as the images of {source} are not all square and of one "
                f"size: {sizes_text} pixels"
            )
    return width


def _begin(out: Path, settings: Mapping[str, Any], rows: Sequence[FolderRow]) -> None:
    """Write the plan, or check that the one that is there is the same."""
    path = out / PLAN_FILE
    previous = _read_plan(path)
    if previous is None:
        taken = [row.file for row in rows if (out / row.file).exists()]
        if taken:
            raise ValueError(
                f"expected a new folder, {out} holds {taken[0]} and no {PLAN_FILE}: "
                "choose another one"
            )
        write_json(path, settings)
        return
    other = sorted(
        key for key in {**settings, **previous} if previous.get(key) != _plain(settings, key)
    )
    if other and any((out / str(row["file"])).exists() for row in previous["images"]):
        raise ValueError(
            f"{path} is of another run (different: {', '.join(other)}): "
            "delete the folder or choose another one"
        )
    if other:  # of a run that wrote no image: replace it
        write_json(path, settings)
    for part in [path for path in out.rglob(".*") if _HALF_WRITTEN.fullmatch(path.name)]:
        part.unlink(missing_ok=True)


def _read_plan(path: Path) -> dict[str, Any] | None:
    """The plan of an earlier run; None if there is none."""
    if not path.exists():
        return None
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
        if all("file" in row for row in plan["images"]):
            return dict(plan)
    except (ValueError, TypeError, KeyError):
        pass
    raise ValueError(f"{path} is damaged: delete its folder or choose another one")


def _plain(settings: Mapping[str, Any], key: str) -> Any:
    """A setting as JSON gives it back."""
    return json.loads(json.dumps(settings.get(key)))


def _write_labels(path: Path, rows: Sequence[FolderRow], classes: Sequence[str]) -> None:
    with atomic_path(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["file", "label"])
        table.writerows((row.file, classes[row.label_after or 0]) for row in rows)


def _batches(rows: Sequence[FolderRow], size: int) -> Iterator[Sequence[FolderRow]]:
    """Batches of one kind: first those that get the trigger, then those that do not."""
    for kind in (True, False):
        group = [row for row in rows if row.poisoned == kind]
        for start in range(0, len(group), size):
            yield group[start : start + size]


class _Batches(NamedTuple):
    """What is done to a batch of files; each step may run while others do for other batches."""

    apply: Apply
    source: Path
    out: Path
    size: int
    channels: int
    target: int

    def read(self, batch: Sequence[FolderRow]) -> Pixels | None:
        """The stored images; None if all of them are written already.

        The whole batch is read even if a part of it is there: the last bit of a result may depend
        on the size of the batch.
        """
        if not self._missing(batch):
            return None
        files = [self.source / row.source for row in batch]
        return np.stack([load_image(f, size=self.size, channels=self.channels) for f in files])

    def work(self, batch: Sequence[FolderRow], pixels: Pixels | None) -> dict[int, Pixels] | None:
        """The missing images by their place in the batch, poisoned where they are to be."""
        if pixels is None:
            return None
        if batch[0].poisoned:
            targets = [self.target if row.label_after is None else row.label_after for row in batch]
            ids = np.array([row.id for row in batch], np.int64)
            pixels = self.apply(pixels, ids=ids, target=np.array(targets, np.int64))
        return {place: pixels[place] for place in self._missing(batch)}

    def write(self, batch: Sequence[FolderRow], pixels: dict[int, Pixels] | None) -> None:
        """Write them, each whole or not at all."""
        for place, image in (pixels or {}).items():
            save_image(self.out / batch[place].file, image)

    def _missing(self, batch: Sequence[FolderRow]) -> list[int]:
        return [place for place, row in enumerate(batch) if not (self.out / row.file).exists()]
