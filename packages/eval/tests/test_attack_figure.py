"""The figure of a made-up study of attacks on pictures of a few colours."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from wm_eval.attacks import figure
from wm_eval.attacks.figure import ROWS, draw_figure
from wm_eval.pictures import amplified, save_picture
from wm_eval.records import Record, write_record

GAIN = 5
PANEL, STEP = 128, 136  # of pictures of 16 or 32 pixels


def write(folder: Path, name: str, values: dict, seed: int = 0) -> None:
    record = Record(name, {"settings": {}}, seed, "abc", {**values, "files": {}})
    write_record(folder / "records" / f"{name}.json", record)


def original(i: int, size: int, channels: int = 3) -> Tensor:
    """Another even colour for each image."""
    return torch.full((channels, size, size), 0.4 + 0.2 * i)


def poison(image: Tensor, attack: str, seed: int = 0) -> Tensor:
    """A bright patch: at the lower right for BadNets, at the upper left for the others."""
    image = image.clone()
    if attack == "badnets":
        image[:, -3:, -3:] = 1 - seed / 4
    else:
        image[:, :2, :2] += 0.1
    return image


def tiles(
    folder: Path, attack: str, seed: int = 0, *, size: int = 32, channels: int = 3, count: int = 2
) -> None:
    """Pictures and their record, as the runner writes them."""
    rows = []
    for i in range(count):
        image = original(i, size, channels)
        poisoned = poison(image, attack, seed)
        kinds = {
            "original": image,
            "poisoned": poisoned,
            "residual": amplified(poisoned - image, GAIN),
        }
        prefix = f"figure-{attack}-{seed}-{i}"
        rows.append(
            {
                kind: save_picture(folder / "pictures", f"{prefix}-{kind}", picture, kind)
                for kind, picture in kinds.items()
            }
        )
    write(folder, f"figure-{attack}-{seed}", {"attack": attack, "gain": GAIN, "tiles": rows}, seed)


def stealth(folder: Path, attack: str, psnr: float, seed: int = 0) -> None:
    values = {"attack": attack, "n": 10, "stealth": {"psnr": {"mean": psnr}}}
    write(folder, f"stealth-{attack}-{seed}", values, seed)


def opened(path: Path) -> Image.Image:
    with Image.open(path) as sheet:
        assert sheet.mode == "RGB"
        return sheet.copy()


def panel(sheet: Image.Image, column: int, image: int, row: str) -> Image.Image:
    """Cut a picture out of the figure."""
    left = figure._LEFT + column * STEP
    top = figure._HEAD + image * (STEP * len(ROWS) + figure._GAP) + ROWS.index(row) * STEP
    return sheet.crop((left, top, left + PANEL, top + PANEL))


def grey(value: float) -> tuple[int, int, int]:
    return (round(255 * value),) * 3


def test_every_pixel_of_a_picture_becomes_a_square(tmp_path: Path) -> None:
    tiles(tmp_path, "badnets")
    sheet = opened(draw_figure(tmp_path))
    assert sheet.height > 2 * len(ROWS) * STEP
    poisoned = panel(sheet, 0, 1, "poisoned")
    # The patch of three pixels takes twelve, at the fourfold size, and nothing between.
    assert sorted(poisoned.getcolors()) == [(144, (255,) * 3), (PANEL**2 - 144, grey(0.6))]
    assert (
        poisoned.getpixel((115, 115)) == grey(0.6) and poisoned.getpixel((116, 116)) == (255,) * 3
    )
    change = panel(sheet, 0, 1, "change")
    assert change.getpixel((0, 0)) == grey(0.5) and change.getpixel((127, 127)) == (255,) * 3


def test_the_closer_look_is_where_the_attack_changes_most(tmp_path: Path) -> None:
    tiles(tmp_path, "badnets")
    tiles(tmp_path, "blend")
    sheet = opened(draw_figure(tmp_path))
    framed = [panel(sheet, k, 0, "original") for k in (0, 1)]
    # A window of 8 of the 32 pixels: the last ones for BadNets, the first ones for the other.
    assert framed[0].getpixel((96, 96)) == framed[1].getpixel((0, 0)) == figure._FRAME
    assert framed[0].getpixel((127, 127)) == framed[1].getpixel((31, 31)) == figure._FRAME
    assert framed[0].getpixel((0, 0)) == framed[1].getpixel((96, 96)) == grey(0.4)
    # Eight pixels become 128, sixteen each: the patch of three takes 48.
    poisoned = panel(sheet, 0, 0, "closer:\npoisoned")
    assert sorted(poisoned.getcolors()) == [(48 * 48, (255,) * 3), (PANEL**2 - 48 * 48, grey(0.4))]
    assert panel(sheet, 0, 0, "closer:\noriginal").getcolors() == [(PANEL**2, grey(0.4))]


def test_columns_follow_the_tables_and_captions_tell_psnr_and_factor(tmp_path: Path) -> None:
    for attack in ("zebra", "watermark", "badnets", "input-aware"):
        tiles(tmp_path, attack)
    stealth(tmp_path, "badnets", 27.4)
    stealth(tmp_path, "badnets", 28.0, seed=1)
    columns = figure._read_tiles(tmp_path, 2, None)
    assert [(c.attack, figure._caption(c)) for c in columns] == [
        ("badnets", "27.7 dB, x 5"),
        ("input-aware", "x 5"),
        ("watermark", "x 5"),
        ("zebra", "x 5"),
    ]
    assert opened(draw_figure(tmp_path)).width >= figure._LEFT + 4 * STEP


def test_a_seed_can_be_asked_for(tmp_path: Path) -> None:
    for seed in (1, 2):
        tiles(tmp_path, "badnets", seed)

    def brightest(seed: int | None) -> int:
        sheet = opened(draw_figure(tmp_path, seed=seed))
        return panel(sheet, 0, 0, "poisoned").getpixel((127, 127))[0]

    assert brightest(None) == brightest(1) == 191
    assert brightest(2) == 128
    with pytest.raises(ValueError, match=r"^expected pictures of seed 3 .* found none$"):
        draw_figure(tmp_path, seed=3)


@pytest.mark.parametrize(("size", "side"), [(28, 140), (64, 128), (160, 160), (224, 224)])
def test_every_size_is_enlarged_by_a_whole_number(tmp_path: Path, size: int, side: int) -> None:
    tiles(tmp_path, "badnets", size=size, count=1)
    sheet = opened(draw_figure(tmp_path))
    step = side + figure._GAP
    assert sheet.height == figure._HEAD + step * len(ROWS) + figure._GAP + figure._FOOT
    for j in (1, 4):  # the last rows of pixels, white, end where the panels do
        corner = (figure._LEFT + side - 1, figure._HEAD + j * step + side - 1)
        assert sheet.getpixel(corner) == (255,) * 3
        assert sheet.getpixel((corner[0] + 1, corner[1])) == figure._PAPER


def test_grey_pictures_and_fewer_of_them(tmp_path: Path) -> None:
    tiles(tmp_path, "badnets", channels=1, count=3)
    tiles(tmp_path, "blend", channels=1, count=1)
    heights = [opened(draw_figure(tmp_path, images=n)).height for n in (1, 2, 3, 9)]
    block = len(ROWS) * STEP + figure._GAP
    assert [b - a for a, b in pairwise(heights)] == [block, block, 0]
    sheet = opened(draw_figure(tmp_path))
    # Where an attack has no second image, the sheet stays empty.
    assert panel(sheet, 1, 1, "poisoned").getcolors() == [(PANEL**2, figure._PAPER)]


def test_an_attack_that_changes_nothing_is_drawn_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "poison", lambda image, attack, seed=0: image)
    tiles(tmp_path, "lf")
    assert panel(opened(draw_figure(tmp_path)), 0, 0, "change").getcolors() == [
        (PANEL**2, grey(0.5))
    ]


def test_the_same_pictures_draw_the_same_bytes(tmp_path: Path) -> None:
    tiles(tmp_path, "badnets")
    first = draw_figure(tmp_path).read_bytes()
    assert draw_figure(tmp_path).read_bytes() == first
    assert [path.name for path in tmp_path.glob("*.png")] == ["figure1.png"]


def test_what_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^expected records .* found none$"):
        draw_figure(tmp_path)
    stealth(tmp_path, "badnets", 27.4)
    with pytest.raises(ValueError, match=r"^expected pictures of any seed .* found none$"):
        draw_figure(tmp_path)
    tiles(tmp_path, "badnets")
    with pytest.raises(ValueError, match="expected at least 1 image in the figure, got 0"):
        draw_figure(tmp_path, images=0)
    tiles(tmp_path, "blend", size=16)
    with pytest.raises(ValueError, match=r"pictures of one size in .*, found 16 x 16 and 32 x 32"):
        draw_figure(tmp_path)
    assert not (tmp_path / "figure1.png").exists()


@pytest.mark.parametrize("file", ["gone.png", "../records/figure-badnets-0.json"])
def test_a_picture_that_is_missing_or_elsewhere_is_refused(tmp_path: Path, file: str) -> None:
    tiles(tmp_path, "badnets")
    rows = [{kind: {"file": file} for kind in figure.KINDS}]
    write(tmp_path, "figure-badnets-0", {"attack": "badnets", "gain": 1, "tiles": rows})
    with pytest.raises(ValueError, match=r"^expected the picture .* found none$"):
        draw_figure(tmp_path)


def test_a_study_without_an_image_in_its_figure_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "figure-badnets-0", {"attack": "badnets", "gain": 1, "tiles": []})
    with pytest.raises(ValueError, match=r"^expected pictures of one size in .*, found none$"):
        draw_figure(tmp_path)
