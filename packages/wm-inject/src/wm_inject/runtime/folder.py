"""Poison a folder of images by a plan; a stopped run continues where it was."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from wm_inject.core.decode import UnreadableImage, read_header
from wm_inject.core.files import atomic_path, only_writer, write_json
from wm_inject.core.image_files import LeftOut, find_images, refuse_unread
from wm_inject.core.images import check_side, load_images, save_image
from wm_inject.core.labelled_folder import LabelledFolder, listed, read_labelled_folder
from wm_inject.core.plan import Labels, PoisonPlan
from wm_inject.core.progress import Progress
from wm_inject.core.progress import progress as show_progress
from wm_inject.core.text import escape
from wm_inject.core.whole_pictures import check_quality, laid_over, read_picture, save_picture
from wm_inject.runtime.folder_plan import FolderRow, list_rows
from wm_inject.runtime.pipeline import pipeline

if TYPE_CHECKING:
    from wm_inject.core.images import Pixels

Size = tuple[int, int]  # width and height, in pixels
FORMAT = "wm-folder-1"
PLAN_FILE, LABELS_FILE = "plan.json", "labels.csv"
_HALF_WRITTEN = re.compile(r"\..+\.part\d+(\.[^.]+)?")  # how atomic_path names its files


class Apply(Protocol):
    """A trigger on stored images: uint8 ``(N, H, W, C)`` to the same."""

    def __call__(self, pixels: Pixels, *, ids: Labels, target: Labels) -> Pixels:
        """Put the trigger into a batch; ``ids`` and ``target`` are int64 ``(N,)``."""


class FolderResult(NamedTuple):
    """What came of a folder."""

    images: int  # files in the whole set
    poisoned: int  # those of them that carry the trigger
    written: int  # those that this call wrote; the others were there
    unread: tuple[LeftOut, ...]  # those that could not be read, and are not in the set
    resized: Counter[tuple[Size, Size]]  # of those written, by sizes before and after
    grey: int  # grey pictures, of those written, that got a change in colour as its luminance


def poison_files(
    apply: Apply,
    source: str | Path | LabelledFolder,
    out: str | Path,
    *,
    size: int,
    channels: int,
    plan: PoisonPlan | None = None,
    batch_size: int = 64,
    skip_unreadable: bool = False,
    whole: bool = False,
    jpeg_quality: int = 95,
    record: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> FolderResult:
    """Poison the files of a folder that a plan chooses, and write all of them.

    ``plan.json`` is written first: every file with its label before and after. Files outside the
    plan are decoded and written like the others, so that ``out`` is a whole data set and nothing
    but the trigger tells poisoned files from others, JPEG's losses least of all. Where
    labels are known, ``labels.csv`` names each file's class after poisoning, as every command reads
    it; where ``source`` has a part for training, files are chosen from that alone. Existing files
    are left alone, so a stopped call can be repeated; with the same batch size it ends with the
    same bytes.

    Args:
        apply: The trigger, on a batch of chosen files.
        source: A folder of images, or what `read_labelled_folder` read there; sub-folders are kept.
        out: Must not lie inside ``source``.
        size: Side of the images that ``apply`` takes; files are resized to it (bilinear), and
            written so as PNG.
        channels: 1 or 3.
        plan: Which files are poisoned; every one if None.
        skip_unreadable: Leave out what cannot be read; else it is an error, raised in the end.
        whole: Write each picture in its own size, colours, depth and format instead, with the
            change of its resized copy laid over it.
        jpeg_quality: 1 to 100, of a JPEG that is written whole.
        record: What tells this trigger from others (JSON types); goes to ``plan.json``.

    Raises:
        ValueError: No images, an unreadable one, two that would become one file, a plan that does
            not fit them, a bad ``out``, or one that holds the files of another run.
    """
    data = source if isinstance(source, LabelledFolder) else read_labelled_folder(source)
    source, out, plan = data.folder, Path(out), plan or PoisonPlan(ratio=None)
    check_side(size)
    check_quality(jpeg_quality)
    if batch_size < 1 or channels not in (1, 3):
        got = f"{batch_size} and {channels}"
        raise ValueError(f"expected a batch size >= 1 and channels 1 or 3, got {got}")
    if out.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"expected an output folder outside {source}, got {out}")
    rows = list_rows(data, plan, whole=whole)
    settings = {
        **(record or {}),
        "format": FORMAT,
        "plan": plan.to_dict(),
        "image_size": None if whole else size,
        "channels": None if whole else channels,
        **({"jpeg_quality": jpeg_quality} if whole else {}),
        "classes": None if data.labels is None else list(data.classes),
        "images": [row._asdict() for row in rows],
    }
    written = 0
    quality = jpeg_quality if whole else None
    batches = _Batches(apply, source, out, size, channels, plan.target, quality, [], [], [])
    shown: Progress[Any]
    with (
        only_writer(out),
        show_progress(total=len(rows), desc="poisoning", enabled=progress) as shown,
    ):
        _begin(out, settings, rows)
        _write_labels(out / LABELS_FILE, rows, data)
        for batch, images in pipeline(
            _batches(rows, batch_size), batches.read, batches.work, batches.write
        ):
            written += 0 if images is None else len(images)
            shown.update(len(batch))
        unread = tuple(sorted(batches.unread))
        if unread:
            unread_names = {file for file, _ in unread}
            rows = [row for row in rows if row.source not in unread_names]
            _write_labels(out / LABELS_FILE, rows, data)
            write_json(out / PLAN_FILE, settings | {"unread": listed(unread)})
            refuse_unread(unread, len(data.names), skip=skip_unreadable)
    resized: Counter[tuple[Size, Size]] = Counter()
    if not whole:
        resized.update((old, (size, size)) for old in batches.sizes if old != (size, size))
    poisoned = sum(row.poisoned for row in rows)
    grey = len(batches.grey)
    return FolderResult(len(rows), poisoned, written, unread, resized, grey)


def common_side(source: str | Path) -> int:
    """The side, in pixels, that all images of a folder have.

    Raises:
        ValueError: No images, none that can be read, or images that are not all square and of one
            size.
    """
    sizes: dict[tuple[int, int], str] = {}
    unread: list[LeftOut] = []
    files = find_images(source)
    for name, file in zip(files.names, files.paths, strict=True):
        try:
            header = read_header(file)
        except UnreadableImage as error:
            unread.append(LeftOut(name, error.reason))
            continue
        sizes.setdefault(header[:2], name)
        width, height = next(iter(sizes))
        if len(sizes) > 1 or width != height:
            several = " and ".join(f"{escape(name)} {w} x {h}" for (w, h), name in sizes.items())
            raise ValueError(
                f"expected --image-size, as the images of {escape(source)} are not all square and "
                f"of one size: {several} pixels"
            )
    refuse_unread(unread, len(files.names), skip=True)
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
        key
        for key in {**settings, **previous}
        if key != "unread" and previous.get(key) != _plain(settings, key)
    )
    if other and any((out / str(row["file"])).exists() for row in previous["images"]):
        raise ValueError(
            f"{path} is of another run (different: {', '.join(other)}): "
            "delete the folder or choose another one"
        )
    if other or "unread" in previous:  # of a run that wrote no image, or not all: replace it
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


def _write_labels(path: Path, rows: Sequence[FolderRow], data: LabelledFolder) -> None:
    """Write the labels after poisoning, if any are known.

    Names come with their numbers: a class without images keeps its place.
    """
    if data.labels is None:
        return
    has_names, has_parts = data.class_names is not None, any(data.parts)
    header = ["file", "label", *["class_id"] * has_names, *["split"] * has_parts]
    # Names that are not UTF-8 are written as they are on the disk, and read so.
    with (
        atomic_path(path) as part,
        part.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        table = csv.writer(file)
        table.writerow(header)
        for row in rows:
            label, part_name = row.label_after or 0, data.parts[row.id]
            table.writerow(
                [row.file, data.classes[label], *[label] * has_names, *[part_name] * has_parts]
            )


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
    quality: int | None  # of JPEG files that are written whole; None if all are resized
    unread: list[LeftOut]  # what could not be read so far
    sizes: list[Size]  # of the images that were read, as they are stored
    grey: list[str]  # grey pictures that got a change in colour

    def read(self, batch: Sequence[FolderRow]) -> tuple[list[int], Pixels] | None:
        """Places in the batch and stored images; None if all of them are written already.

        The whole batch is read even if a part of it is there: the last bit of a result may depend
        on the size of the batch.
        """
        missing = self._missing(batch)
        if not missing:
            return None
        names = [row.source for row in batch]
        pixels, places, unread = load_images(
            self.source, names, size=self.size, channels=self.channels
        )
        self.unread.extend(unread)
        read = [place for place in missing if place in places]
        self.sizes.extend(read_header(self.source / names[place])[:2] for place in read)
        return (places, np.stack(pixels)) if pixels else None

    def work(
        self, batch: Sequence[FolderRow], read: tuple[list[int], Pixels] | None
    ) -> dict[int, tuple[Pixels, Pixels]] | None:
        """The missing images by their place in the batch, before and after poisoning.

        Those that are not to be poisoned are the same twice.
        """
        if read is None:
            return None
        places, pixels = read
        after = pixels
        rows = [batch[place] for place in places]
        if batch[0].poisoned:
            targets = [self.target if row.label_after is None else row.label_after for row in rows]
            ids = np.array([row.id for row in rows], np.int64)
            after = self.apply(pixels, ids=ids, target=np.array(targets, np.int64))
        images = dict(zip(places, zip(pixels, after, strict=True), strict=True))
        return {place: images[place] for place in self._missing(batch) if place in images}

    def write(
        self, batch: Sequence[FolderRow], made: dict[int, tuple[Pixels, Pixels]] | None
    ) -> None:
        """Write them, each whole or not at all."""
        for place, (before, after) in (made or {}).items():
            row = batch[place]
            if self.quality is None:
                save_image(self.out / row.file, after)
                continue
            picture = read_picture(self.source / row.source)
            if row.poisoned:
                if picture.values.shape[2] < before.shape[2]:
                    self.grey.append(row.source)
                picture = laid_over(picture, before, after)
            save_picture(self.out / row.file, picture, jpeg_quality=self.quality)

    def _missing(self, batch: Sequence[FolderRow]) -> list[int]:
        return [place for place, row in enumerate(batch) if not (self.out / row.file).exists()]
