"""The paper's sheets of pictures: figure 3 (labels), figure 4 (triggers), figure 6 (LPIPS).

They show images of the data set: do not pass them on where the data may not be passed on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw, ImageFont

from wm_inject.core.files import atomic_path
from wm_inject.core.images import load_image

if TYPE_CHECKING:
    from wm_inject.core.images import Pixels

_PANEL = 96  # pixels, about: what a small picture is enlarged to
_GAP, _LEFT, _HEAD, _FOOT, _FONT = 8, 132, 26, 24, 13
_INK, _SOFT, _PAPER = (29, 32, 36), (91, 97, 105), (253, 253, 251)
_ROWS = {
    "original": "original",
    "planted": "planted trigger",
    "planted-change": "its change",
    "reversed": "reversed trigger",
    "reversed-change": "its change",
}


def draw_labels(values: Mapping[str, Any], pictures: Path, path: Path) -> Path:
    """Figure 3: one image with the trigger that was reversed for each label, and the change.

    Args:
        values: Of a record ``pictures-DETECTOR-ATTACK-SEED``.
        pictures: The folder of its pictures.
        path: The PNG file. The same pictures give the same pixels.

    Raises:
        ValueError: A picture that is missing, or pictures of different sizes.
    """
    labels = sorted(values["labels"], key=int)
    heads = [f"label {k}" + (", target" if int(k) == values["target"] else "") for k in labels]
    rows = [
        (title, [_picture(pictures, values["labels"][k][kind]) for k in labels])
        for title, kind in (("reversed trigger", "reversed"), ("its change", "change"))
    ]
    foot = f"Change: grey is none, the rest x {values['labels_gain']}, alike for all labels."
    return _save(_sheet(heads, rows, foot), path)


def draw_triggers(values: Mapping[str, Any], pictures: Path, path: Path) -> Path:
    """Figure 4: images with the planted and with the reversed trigger, and both changes.

    Args:
        values: Of a record ``pictures-DETECTOR-ATTACK-SEED``.
        pictures: The folder of its pictures.
        path: The PNG file.

    Raises:
        ValueError: A picture that is missing, or pictures of different sizes.
    """
    heads = [f"image {i + 1}" for i in range(len(values["rows"]))]
    rows = [
        (title, [_picture(pictures, row[kind]) for row in values["rows"]])
        for kind, title in _ROWS.items()
    ]
    foot = (
        f"Changes x {values['gain']}. Between the two triggers: {values['psnr_between']:.1f} dB; "
        f"cosine of the changes {values['cosine']:.2f}, of other labels' "
        f"{values['cosine_others']:.2f}."
    )
    return _save(_sheet(heads, rows, foot), path)


def draw_perceptual(
    without: Mapping[str, Any], with_: Mapping[str, Any], pictures: Path, path: Path
) -> Path:
    """Figure 6: clean image, planted trigger, reversed trigger with LPIPS in the loss and without.

    Args:
        without: Of the record of "reverse".
        with_: Of the record of "reverse-lpips", of the same attack and seed.
        pictures: The folder of their pictures.
        path: The PNG file.

    Raises:
        ValueError: A picture that is missing, or pictures of different sizes.
    """
    columns = [
        ("original", without, "original"),
        ("planted", without, "planted"),
        ("with LPIPS", with_, "reversed"),
        ("without LPIPS", without, "reversed"),
    ]
    count = min(len(without["rows"]), len(with_["rows"]))
    rows = [
        (f"image {i + 1}", [_picture(pictures, v["rows"][i][kind]) for _, v, kind in columns])
        for i in range(count)
    ]
    foot = (
        f"Reversed to planted: {with_['psnr_between']:.1f} dB with LPIPS, "
        f"{without['psnr_between']:.1f} dB without."
    )
    return _save(_sheet([head for head, *_ in columns], rows, foot), path)


def _picture(folder: Path, picture: Mapping[str, Any]) -> Pixels:
    path = folder / picture["file"]
    # The name comes from a record, and a record may come from a stranger.
    if path.parent != folder or not path.is_file():
        raise ValueError(f"expected the picture {picture['file']} in {folder}, found none")
    return load_image(path)


def _sheet(
    heads: Sequence[str], rows: Sequence[tuple[str, Sequence[Pixels]]], foot: str
) -> Image.Image:
    """Pictures in columns with their heads above, what a row shows at its left, a line below."""
    sizes = {one.shape for _, pictures in rows for one in pictures}
    if len(sizes) != 1:
        found = " and ".join(f"{w} x {h}" for h, w, _ in sorted(sizes)) or "none"
        raise ValueError(f"expected pictures of one size, found {found}")
    height, width, _ = next(iter(sizes))
    # No pixel is smoothed: each is a square of the same whole size.
    scale = max(1, round(_PANEL / max(height, width)))
    across, down = width * scale + _GAP, height * scale + _GAP
    font = ImageFont.load_default(_FONT)
    whole = max(_LEFT + across * len(heads), round(font.getlength(foot)) + 2 * _GAP)
    sheet = Image.new("RGB", (whole, _HEAD + down * len(rows) + _FOOT), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, head in enumerate(heads):
        draw.text((_LEFT + i * across, _GAP), head, _INK, font)
    for j, (name, pictures) in enumerate(rows):
        top = _HEAD + j * down
        draw.text((_GAP, top + height * scale // 2 - _FONT), name, _SOFT, font)
        for i, pixels in enumerate(pictures):
            large = Image.fromarray(pixels).resize(
                (width * scale, height * scale), Image.Resampling.NEAREST
            )
            sheet.paste(large, (_LEFT + i * across, top))
    draw.text((_GAP, sheet.height - _FOOT + 4), foot, _SOFT, font)
    return sheet


def _save(sheet: Image.Image, path: Path) -> Path:
    with atomic_path(path) as part:
        sheet.save(part, format="PNG", optimize=True)
    return path


__all__ = ["draw_labels", "draw_perceptual", "draw_triggers"]
