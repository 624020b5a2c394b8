"""The attacks' pictures side by side: original, poisoned, what changed, and a closer look."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from wm_eval.attacks.gather import CLEAN, TITLES
from wm_eval.records import Record, read_records
from wm_inject.core.files import atomic_path
from wm_inject.core.images import load_image

if TYPE_CHECKING:
    from wm_inject.core.images import Pixels

KINDS = ("original", "poisoned", "residual")
ROWS = ("original", "poisoned", "change", "closer:\noriginal", "closer:\npoisoned")
# Shorter than in the tables: a column of pictures is narrow.
NAMES = {**TITLES, "input-aware": "Input-aware", "equation2": "Plain blend"}
_PANEL = 128  # pixels, about: what a small picture is enlarged to
_CLOSER = 4  # a closer look shows a quarter of the side
_GAP, _LEFT, _HEAD, _FOOT, _FONT = 8, 72, 44, 28, 13
_INK, _SOFT, _PAPER, _FRAME = (29, 32, 36), (91, 97, 105), (253, 253, 251), (216, 27, 96)
_FOOTER = "Under each name: PSNR, mean over test images and seeds; the factor of the change."


class Tiles(NamedTuple):
    """The pictures of one attack, one of each kind for every image."""

    attack: str
    gain: int  # what the change is multiplied by
    psnr: float | None  # dB; None if it was not measured
    rows: tuple[Mapping[str, Pixels], ...]  # uint8 (H, W, 3), by KINDS


def draw_figure(out: str | Path, *, images: int = 2, seed: int | None = None) -> Path:
    """Draw ``figure1.png`` from the pictures that a study has written.

    A column an attack. Below each other, for each image: the original with a frame around the part
    that the attack changes most, the poisoned image, the change on grey times the factor in the
    caption, and the framed part of both, enlarged. No pixel is smoothed.

    Args:
        out: The study's folder, with ``records/`` and ``pictures/``. The figure shows images of
            the data set: do not pass it on where they may not be passed on.
        images: How many images at most, at least 1.
        seed: Whose pictures; for each attack the first seed that has any if None.

    Returns:
        The figure. The same records and pictures give the same pixels.

    Raises:
        ValueError: No records, no pictures among them, one that is missing, pictures of different
            sizes, or ``images`` below 1.

    Source: after figure 1 of Wang et al., "Spy-Watermark"; the change and its factor are ours.
    """
    if images < 1:
        raise ValueError(f"expected at least 1 image in the figure, got {images}")
    out = Path(out)
    canvas = _compose(_read_tiles(out, images, seed))
    with atomic_path(out / "figure1.png") as part:
        canvas.save(part, format="PNG", optimize=True)
    return out / "figure1.png"


def _read_tiles(out: Path, images: int, seed: int | None) -> list[Tiles]:
    """The pictures of every attack that has any, in the order of the tables."""
    records = read_records(out / "records")
    drawn: dict[str, dict[int, Record]] = {}
    for name, record in records.items():
        own = name.rpartition("-")[2]
        if name.startswith("figure-") and own.isdecimal() and seed in (None, int(own)):
            drawn.setdefault(str(record.values["attack"]), {})[int(own)] = record
    if not drawn:
        whose = "any seed" if seed is None else f"seed {seed}"
        raise ValueError(f"expected pictures of {whose} (figure-*.json) in {out}, found none")
    known = [name for name in TITLES if name != CLEAN]
    columns = []
    for attack in (*known, *sorted(drawn.keys() - set(known))):
        if attack not in drawn:
            continue
        values = drawn[attack][min(drawn[attack])].values
        rows = tuple(
            {kind: _picture(out / "pictures", tile[kind]) for kind in KINDS}
            for tile in values["tiles"][:images]
        )
        columns.append(Tiles(attack, int(values["gain"]), _psnr(records, attack), rows))
    sizes = {one.shape for tiles in columns for row in tiles.rows for one in row.values()}
    if len(sizes) != 1:
        found = " and ".join(f"{w} x {h}" for h, w, _ in sorted(sizes)) or "none"
        raise ValueError(f"expected pictures of one size in {out / 'pictures'}, found {found}")
    return columns


def _picture(folder: Path, picture: Mapping[str, Any]) -> Pixels:
    path = folder / picture["file"]
    # The name comes from a record, and a record may come from a stranger.
    if path.parent != folder or not path.is_file():
        raise ValueError(f"expected the picture {picture['file']} in {folder}, found none")
    return load_image(path)


def _psnr(records: Mapping[str, Record], attack: str) -> float | None:
    found = [
        float(record.values["stealth"]["psnr"]["mean"])
        for name, record in records.items()
        if name.startswith("stealth-") and record.values["attack"] == attack
    ]
    return fmean(found) if found else None


def _compose(columns: Sequence[Tiles]) -> Image.Image:
    """All panels on one sheet, with the names above and the kinds at the left."""
    side = max(columns[0].rows[0]["original"].shape[:2])
    panel = side * max(1, round(_PANEL / side))
    step, depth = panel + _GAP, max(len(tiles.rows) for tiles in columns)
    font = ImageFont.load_default(_FONT)
    # A narrow figure is as wide as the line below it.
    width = max(_LEFT + step * len(columns), round(font.getlength(_FOOTER)) + 2 * _GAP)
    # Each image is a block of its own, set off by a wider gap.
    block = step * len(ROWS) + _GAP
    sheet = Image.new("RGB", (width, _HEAD + block * depth + _FOOT), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for i in range(depth):
        for j, label in enumerate(ROWS):
            top = _HEAD + i * block + j * step
            draw.multiline_text((_GAP, top + panel // 2 - _FONT), label, _SOFT, font)
    for k, tiles in enumerate(columns):
        left = _LEFT + k * step
        draw.text((left, _GAP), NAMES.get(tiles.attack, tiles.attack), _INK, font)
        draw.text((left, _GAP + _FONT + 4), _caption(tiles), _SOFT, font)
        for i, row in enumerate(tiles.rows):
            for j, picture in enumerate(_panels(row, panel)):
                sheet.paste(picture, (left, _HEAD + i * block + j * step))
    draw.text((_GAP, sheet.height - _FOOT + 4), _FOOTER, _SOFT, font)
    return sheet


def _caption(tiles: Tiles) -> str:
    psnr = "" if tiles.psnr is None else f"{tiles.psnr:.1f} dB, "
    return f"{psnr}x {tiles.gain}"


def _panels(row: Mapping[str, Pixels], panel: int) -> list[Image.Image]:
    """The pictures of one image, by `ROWS`."""
    original, poisoned, change = (row[kind] for kind in KINDS)
    top, left, size = _most_changed(original, poisoned)
    framed = _enlarged(original, panel)
    # Pillow draws the last row and column too.
    scale = panel // max(original.shape[:2])
    box = (left * scale, top * scale, (left + size) * scale - 1, (top + size) * scale - 1)
    ImageDraw.Draw(framed).rectangle(box, outline=_FRAME, width=2)
    window = np.s_[top : top + size, left : left + size]
    whole = [_enlarged(poisoned, panel), _enlarged(change, panel)]
    return [framed, *whole, *(_enlarged(one[window], panel) for one in (original, poisoned))]


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


__all__ = ["KINDS", "NAMES", "draw_figure"]
