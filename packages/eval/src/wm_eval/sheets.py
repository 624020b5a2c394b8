"""Sheets of pictures as PNG files: pixels enlarged to squares, with names above and beside.

They show images of the data set: do not pass them on where the data may not be passed on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from wm_eval.numbers import numbers, select, spread
from wm_eval.records import Record, StudyRecords
from wm_eval.titles import ATTACKS, in_order, short_attack_title
from wm_inject.core.files import atomic_path
from wm_inject.core.images import load_image

if TYPE_CHECKING:
    from wm_inject.core.images import Pixels

KINDS = ("original", "poisoned", "residual")
_CLOSER = 4  # a closer look shows a quarter of the side
_GAP, _FONT, _LINE = 8, 13, 17
_INK, _SOFT, _PAPER, _FRAME = (29, 32, 36), (91, 97, 105), (253, 253, 251), (216, 27, 96)
_TRIGGERS = {
    "original": "original",
    "planted": "planted trigger",
    "planted-change": "its change",
    "reversed": "reversed trigger",
    "reversed-change": "its change",
}


class Row(NamedTuple):
    """A row of a sheet; ``space`` sets it off from the row above."""

    label: str
    pictures: Sequence[Image.Image]
    space: bool = False


def draw_attacks(
    study: StudyRecords, pictures: Path, path: Path, *, images: int = 2, seed: int | None = None
) -> Path:
    """Original, poisoned image, change, and a closer look at both; a column an attack.

    A frame on the original shows the part that the attack changes most, which is enlarged below.

    Args:
        study: With records of tiles.
        pictures: The folder of their pictures.
        path: The PNG file. The same records and pictures give the same pixels.
        images: How many images at most.
        seed: Whose pictures; for each attack the first seed that has any if None.

    Raises:
        ValueError: No pictures, one that is missing, different sizes, or ``images`` below 1.

    Source: after figure 1 of Wang et al., "Spy-Watermark"; the change and its factor are ours.
    """
    if images < 1:
        raise ValueError(f"expected images >= 1, got {images}")
    columns: dict[str, Record] = {}
    for record in sorted(study.select(kind="tiles"), key=lambda r: int(r.key["seed"])):
        if seed in (None, record.key["seed"]):
            columns.setdefault(str(record.key["attack"]), record)
    if not columns:
        raise ValueError(f"expected pictures of seed {'any' if seed is None else seed}, got none")
    tiles = [
        [{kind: _picture(pictures, tile[kind]) for kind in KINDS} for tile in r.values["tiles"]]
        for r in (columns[attack] for attack in in_order(columns, ATTACKS))
    ]
    panel = _panel([one for column in tiles for row in column for one in row.values()], 128)
    stealth = numbers(study)
    heads = []
    for attack in in_order(columns, ATTACKS):
        psnr = spread(select(stealth, "psnr", attack=attack))
        caption = "" if psnr is None else f"{psnr.mean:.1f} dB, "
        gain = columns[attack].values["gain"]
        heads.append(f"{short_attack_title(attack)}\n{caption}x {gain}")
    rows = []
    labels = ("original", "poisoned", "change", "closer:\noriginal", "closer:\npoisoned")
    for i in range(min(images, max(map(len, tiles)))):
        cells = [_closer_look(column[i], panel) for column in tiles]
        rows += [
            Row(label, [cell[j] for cell in cells], space=i > 0 and j == 0)
            for j, label in enumerate(labels)
        ]
    foot = "Under each name: PSNR, mean over test images and seeds; the factor of the change."
    return _save(_sheet(heads, rows, foot, panel), path)


def draw_labels(values: Mapping[str, Any], pictures: Path, path: Path) -> Path:
    """One image with the trigger that was reversed for each label, and the change.

    Args:
        values: Of a record of closeness.
        pictures: The folder of its pictures; they are of one size.
        path: The PNG file.

    Raises:
        ValueError: A picture that is missing, or of another size.
    """
    labels = sorted(values["labels"], key=int)
    heads = [f"label {k}" + (", target" if int(k) == values["target"] else "") for k in labels]
    rows = {
        title: [_picture(pictures, values["labels"][k][kind]) for k in labels]
        for title, kind in (("reversed trigger", "reversed"), ("its change", "change"))
    }
    foot = f"Change: grey is none, the rest x {values['labels_gain']}, alike for all labels."
    return _save(_plain_sheet(heads, list(rows.items()), foot), path)


def draw_triggers(values: Mapping[str, Any], pictures: Path, path: Path) -> Path:
    """Images with the planted and with the reversed trigger, and both changes."""
    heads = [f"image {i + 1}" for i in range(len(values["rows"]))]
    rows = [
        (title, [_picture(pictures, row[kind]) for row in values["rows"]])
        for kind, title in _TRIGGERS.items()
    ]
    foot = (
        f"Changes x {values['gain']}. Between the two triggers: {values['psnr_between']:.1f} dB; "
        f"cosine of the changes {values['cosine']:.2f}, of other labels' "
        f"{values['cosine_others']:.2f}."
    )
    return _save(_plain_sheet(heads, rows, foot), path)


def draw_perceptual(
    without: Mapping[str, Any], with_lpips: Mapping[str, Any], pictures: Path, path: Path
) -> Path:
    """Clean image, planted trigger, reversed trigger with LPIPS in the loss and without."""
    columns = {
        "original": (without, "original"),
        "planted": (without, "planted"),
        "with LPIPS": (with_lpips, "reversed"),
        "without LPIPS": (without, "reversed"),
    }
    count = min(len(without["rows"]), len(with_lpips["rows"]))
    rows = [
        (f"image {i + 1}", [_picture(pictures, v["rows"][i][k]) for v, k in columns.values()])
        for i in range(count)
    ]
    foot = (
        f"Reversed to planted: {with_lpips['psnr_between']:.1f} dB with LPIPS, "
        f"{without['psnr_between']:.1f} dB without."
    )
    return _save(_plain_sheet(list(columns), rows, foot), path)


def draw_watermark(
    values: Mapping[str, Any], pictures: Path, path: Path, *, dataset_images: bool = True
) -> Path:
    """Original, poisoned, change and what the extractor reads; a row an image.

    Args:
        values: Of the record of tiles of a watermark.
        pictures: The folder of its pictures.
        path: The PNG file.
        dataset_images: False leaves out the columns that show images of the data set.
    """
    columns = {
        "original": "original",
        "poisoned": "poisoned",
        "residual": f"change x {values['gain']}",
        "extracted": "read from\npoisoned",
        "extracted-clean": "read from\noriginal",
    }
    kinds = list(columns) if dataset_images else list(columns)[2:]
    rows = [
        (f"image {i + 1}", [_picture(pictures, tile[kind]) for kind in kinds])
        for i, tile in enumerate(values["tiles"])
    ]
    foot = "The change is drawn on grey; the last two columns are what the extractor reads."
    return _save(_plain_sheet([columns[kind] for kind in kinds], rows, foot), path)


def draw_reversed(
    records: Mapping[str, Record],
    suspected: Mapping[str, Sequence[int]],
    pictures: Path,
    path: Path,
) -> Path:
    """The trigger that a detector reversed for each label, a row a victim.

    Args:
        records: By victim, of the kind "reversed".
        suspected: By victim, the labels that the scan named.
        pictures: The folder of the pictures.
        path: The PNG file.
    """
    labels = sorted({k for r in records.values() for k in r.values["pictures"]}, key=int)
    rows = [
        (
            f"{victim} victim\nnamed: {', '.join(map(str, suspected[victim])) or 'none'}",
            [_picture(pictures, record.values["pictures"][k]) for k in labels],
        )
        for victim, record in records.items()
    ]
    captions = {p["caption"] for r in records.values() for p in r.values["pictures"].values()}
    foot = "; ".join(sorted(captions)) if len(captions) == 1 else "Changes, each amplified."
    return _save(_plain_sheet([f"label {k}" for k in labels], rows, foot), path)


def picture_path(folder: Path, picture: Mapping[str, Any]) -> Path:
    """The file of a picture.

    Raises:
        ValueError: It is missing, or outside the folder.
    """
    path = folder / picture["file"]
    # The name comes from a record, and a record may be untrusted.
    if path.parent != folder or not path.is_file():
        raise ValueError(f"expected the picture {picture['file']} in {folder}, found none")
    return path


def _picture(folder: Path, picture: Mapping[str, Any]) -> Pixels:
    return load_image(picture_path(folder, picture))


def _panel(pictures: Sequence[Pixels], size: int) -> int:
    """The side to which pictures of one size are enlarged: about ``size``, a whole multiple."""
    sizes = {one.shape for one in pictures}
    if len(sizes) != 1:
        got = " and ".join(f"{w} x {h}" for h, w, _ in sorted(sizes)) or "none"
        raise ValueError(f"expected pictures of one size, got {got}")
    side = max(next(iter(sizes))[:2])
    return side * max(1, round(size / side))


def _plain_sheet(
    heads: Sequence[str], rows: Sequence[tuple[str, Sequence[Pixels]]], foot: str
) -> Image.Image:
    panel = _panel([one for _, pictures in rows for one in pictures], 96)
    large = [Row(label, [_enlarged(one, panel) for one in pictures]) for label, pictures in rows]
    return _sheet(heads, large, foot, panel)


def _sheet(heads: Sequence[str], rows: Sequence[Row], foot: str, panel: int) -> Image.Image:
    """Pictures in columns with their heads above, labels at the left, a line below."""
    font = ImageFont.load_default(_FONT)
    words = [line for row in rows for line in row.label.split("\n")]
    left = 2 * _GAP + max(round(font.getlength(word)) for word in words)
    top = 2 * _GAP + _LINE * max(head.count("\n") + 1 for head in heads)
    step = panel + _GAP
    width = max(left + step * len(heads), round(font.getlength(foot)) + 2 * _GAP)
    height = top + step * len(rows) + _GAP * sum(row.space for row in rows) + _LINE + _GAP
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, head in enumerate(heads):
        for j, line in enumerate(head.split("\n")):
            ink = _SOFT if j else _INK
            draw.text((left + i * step, _GAP + j * _LINE), line, ink, font)
    y = top
    for row in rows:
        y += _GAP * row.space
        draw.multiline_text((_GAP, y + panel // 2 - _FONT), row.label, _SOFT, font)
        for i, picture in enumerate(row.pictures):
            sheet.paste(picture, (left + i * step, y))
        y += step
    draw.text((_GAP, height - _LINE - _GAP // 2), foot, _SOFT, font)
    return sheet


def _closer_look(tile: Mapping[str, Pixels], panel: int) -> list[Image.Image]:
    """The original with its frame, the poisoned image, the change, and the framed part of both."""
    original, poisoned, change = (tile[kind] for kind in KINDS)
    top, left, size = _most_changed(original, poisoned)
    framed = _enlarged(original, panel)
    # Pillow draws the last row and column too.
    scale = panel // max(original.shape[:2])
    box = (left * scale, top * scale, (left + size) * scale - 1, (top + size) * scale - 1)
    ImageDraw.Draw(framed).rectangle(box, outline=_FRAME, width=2)
    window = np.s_[top : top + size, left : left + size]
    closer = (original[window], poisoned[window])
    return [framed, *(_enlarged(one, panel) for one in (poisoned, change, *closer))]


def _most_changed(original: Pixels, poisoned: Pixels) -> tuple[int, int, int]:
    """Top, left and side of the square window that changes most; the first of equals."""
    size = max(1, min(original.shape[:2]) // _CLOSER)
    change = np.abs(poisoned.astype(np.int64) - original).sum(2)
    sums = np.pad(change, ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    windows = sums[size:, size:] - sums[:-size, size:] - sums[size:, :-size] + sums[:-size, :-size]
    top, left = np.unravel_index(int(windows.argmax()), windows.shape)
    return int(top), int(left), size


def _enlarged(pixels: Pixels, panel: int) -> Image.Image:
    """A picture whose every pixel is a square of the same whole size."""
    height, width = (side * (panel // max(pixels.shape[:2])) for side in pixels.shape[:2])
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)


def _save(sheet: Image.Image, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as part:
        sheet.save(part, format="PNG", optimize=True)
    return path
