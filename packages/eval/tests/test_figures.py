"""Figures of made-up records and pictures."""

from __future__ import annotations

import json
import xml.dom.minidom
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from wm_eval.figures import draw_figures, draw_rates, draw_scores
from wm_eval.pictures import amplified, save_picture
from wm_eval.records import Record, StudyRecords, read_study
from wm_eval.sheets import draw_attacks, draw_labels, draw_triggers

GAIN = 5
PANEL = 128  # pixels of an enlarged picture of 16 or 32
FRAME, PAPER = (216, 27, 96), (253, 253, 251)


def add(folder: Path, kind: str, values: dict[str, Any], **key: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "records.jsonl").open("a", encoding="utf-8") as file:
        file.write(Record(kind, key, {}, {}, "abc", values, {}).line)


def poisoned_image(image: Tensor, attack: str, seed: int = 0) -> Tensor:
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
    """Pictures and their record, as a study writes them."""
    rows = []
    for i in range(count):
        image = torch.full((channels, size, size), 0.4 + 0.2 * i)
        poisoned = poisoned_image(image, attack, seed)
        change = amplified(poisoned - image, GAIN)
        kinds = {"original": image, "poisoned": poisoned, "residual": change}
        rows.append(
            {
                kind: save_picture(folder / "pictures", f"{attack}-{seed}-{i}-{kind}", one, kind)
                for kind, one in kinds.items()
            }
        )
    add(folder, "tiles", {"gain": GAIN, "tiles": rows}, attack=attack, seed=seed)


def draw(folder: Path, **how: Any) -> Image.Image:
    path = draw_attacks(read_study(folder), folder / "pictures", folder / "sheet.png", **how)
    with Image.open(path) as sheet:
        assert sheet.mode == "RGB"
        return sheet.copy()


def corner(sheet: Image.Image) -> tuple[int, int]:
    """Where the first picture begins: its frame's colour is nowhere else above or to the left."""
    for y in range(sheet.height):
        for x in range(sheet.width):
            if sheet.getpixel((x, y)) == (102,) * 3:
                return x, y
    raise AssertionError("no picture on the sheet")


def panel(sheet: Image.Image, column: int, row: int, *, start: tuple[int, int]) -> Image.Image:
    left, top = start[0] + column * (PANEL + 8), start[1] + row * (PANEL + 8)
    return sheet.crop((left, top, left + PANEL, top + PANEL))


def test_every_pixel_becomes_a_square_and_the_closer_look_is_where_most_changes(
    tmp_path: Path,
) -> None:
    tiles(tmp_path, "badnets", count=1)
    tiles(tmp_path, "blend", count=1)
    sheet = draw(tmp_path)
    start = corner(sheet)
    original, poisoned, change, closer, closer_poisoned = (
        panel(sheet, 0, row, start=start) for row in range(5)
    )
    # The patch of three pixels takes twelve, at the fourfold size, and nothing between.
    white, grey = (255,) * 3, (102,) * 3
    assert sorted(poisoned.getcolors()) == [(144, white), (PANEL**2 - 144, grey)]
    assert change.getpixel((0, 0)) == (128,) * 3 and change.getpixel((127, 127)) == white
    # A window of 8 of the 32 pixels: the last ones for BadNets, the first ones for the other.
    assert original.getpixel((96, 96)) == original.getpixel((127, 127)) == FRAME
    assert original.getpixel((0, 0)) == grey
    assert panel(sheet, 1, 0, start=start).getpixel((0, 0)) == FRAME
    # Eight pixels become 128, sixteen each: the patch of three takes 48.
    assert sorted(closer_poisoned.getcolors()) == [(48 * 48, white), (PANEL**2 - 48 * 48, grey)]
    assert closer.getcolors() == [(PANEL**2, grey)]


def test_columns_follow_the_tables_and_a_seed_can_be_chosen(tmp_path: Path) -> None:
    for seed in (1, 2):
        tiles(tmp_path, "badnets", seed)
    for seed, row in ((None, 191), (1, 191), (2, 128)):
        sheet = draw(tmp_path, seed=seed)
        assert panel(sheet, 0, 1, start=corner(sheet)).getpixel((127, 127)) == (row,) * 3
    narrow = draw(tmp_path).width
    for attack in ("zebra", "watermark", "lf", "sig"):
        tiles(tmp_path, attack)
    assert draw(tmp_path).width > narrow
    with pytest.raises(ValueError, match="seed 3"):
        draw(tmp_path, seed=3)


def test_sizes_are_enlarged_by_a_whole_number_and_images_are_limited(tmp_path: Path) -> None:
    heights = []
    for size, side in ((28, 140), (64, 128), (160, 160)):
        folder = tmp_path / str(size)
        tiles(folder, "badnets", size=size, count=2, channels=1)
        one, two, three = (draw(folder, images=n).height for n in (1, 2, 3))
        assert two - one == 5 * (side + 8) + 8 and three == two
        heights.append(one)
    assert len(set(heights)) == 3


def test_what_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    add(tmp_path, "stealth", {"n": 10, "stealth": {}}, attack="badnets", seed=0)
    with pytest.raises(ValueError, match="pictures"):
        draw(tmp_path)
    tiles(tmp_path, "badnets")
    with pytest.raises(ValueError, match="images >= 1"):
        draw(tmp_path, images=0)
    tiles(tmp_path, "blend", size=16)
    with pytest.raises(ValueError, match="16 x 16 and 32 x 32"):
        draw(tmp_path)
    for file in ("gone.png", "../records.jsonl"):
        folder = tmp_path / file.replace("/", "")
        rows = [{kind: {"file": file} for kind in ("original", "poisoned", "residual")}]
        add(folder, "tiles", {"gain": 1, "tiles": rows}, attack="badnets", seed=0)
        with pytest.raises(ValueError, match="picture"):
            draw(folder)


def scan(folder: Path, detector: str, attack: str, seed: int, index: float | None = 2.0) -> None:
    labels = [{"label": k, "score": 2.0 if k == 0 else 8.0 + k} for k in range(5)]
    values = {"score_median": 10.0, "labels": labels, "paper_index": index, "p_value": 0.5}
    values |= {"verdict": "clean", "suspected": [], "paper_flagged": []}
    values["true_target"] = None if attack == "clean" else 0
    key = {"attack": attack, "corruptions": "plain", "seed": seed}
    add(folder, "scan", values, detector=detector, **key)


def closeness(folder: Path, detector: str, size: int = 8) -> dict[str, Any]:
    def picture(name: str) -> dict[str, Any]:
        image = torch.linspace(0, 1, size * size).view(1, size, size)
        return save_picture(folder / "pictures", f"{detector}-{name}", image, "a caption")

    kinds = ("original", "planted", "planted-change", "reversed", "reversed-change")
    values = {
        "target": 0,
        "gain": 5,
        "labels_gain": 2,
        "cosine": 0.5,
        "cosine_others": 0.1,
        "psnr_between": 25.0,
        "rows": [{kind: picture(f"{i}-{kind}") for kind in kinds} for i in range(2)],
        "labels": {
            str(k): {kind: picture(f"{k}-{kind}") for kind in ("reversed", "change")}
            for k in range(5)
        },
    }
    add(folder, "closeness", values, detector=detector, attack="wanet", seed=0)
    return values


@pytest.mark.integration
def test_every_figure_is_drawn_and_repeats(tmp_path: Path) -> None:
    for detector in ("reverse", "reverse-lpips"):
        closeness(tmp_path, detector)
        scan(tmp_path, detector, "wanet", 0)
        scan(tmp_path, detector, "clean", 0, None)
    for rate in (1e-3, 1e-2):
        after = {"cda": 0.9, "asr": 0.2}
        key = {"attack": "wanet", "method": "fine-tuning", "fraction": 0.1, "seed": 0, "lr": rate}
        add(tmp_path, "mitigation", {"done": True, "after": after}, **key)
    drawn, skipped = draw_figures(tmp_path)
    assert {path.name for path in drawn} == {
        "figure2-wanet.svg",
        "figure3-reverse-wanet.png",
        "figure3-reverse-lpips-wanet.png",
        "figure4-reverse-wanet.png",
        "figure4-reverse-lpips-wanet.png",
        "figure5-wanet.svg",
        "figure6-wanet.png",
    }
    assert skipped == ()
    first = {path: path.read_bytes() for path in drawn}
    assert {path: path.read_bytes() for path in draw_figures(tmp_path).drawn} == first
    for path, content in first.items():
        if path.suffix == ".svg":
            xml.dom.minidom.parseString(content)
    with Image.open(tmp_path / "figures" / "figure3-reverse-wanet.png") as sheet:
        assert sheet.width >= 5 * 96 and sheet.height >= 2 * 96


def test_many_attacks_are_drawn_as_indices(tmp_path: Path) -> None:
    for attack, index in (("clean", 1.0), ("sig", None), ("lf", 9.0), ("wanet", 2.5)):
        scan(tmp_path, "nc", attack, 0, index)
    drawn, skipped = draw_figures(tmp_path)
    assert [path.name for path in drawn] == ["index-nc.svg"] and len(skipped) == 1
    text = drawn[0].read_text()
    assert "infinite" in text and "WaNet" in text
    xml.dom.minidom.parseString(text)


def test_the_story_has_its_sheets(study: Path) -> None:
    drawn, _ = draw_figures(study)
    names = ["watermark.png", "reversed-nc.png", "reversed-reverse.png"]
    assert [path.name for path in drawn] == names
    with Image.open(drawn[0]) as whole:
        width = whole.width
    (first, *_), _ = draw_figures(study, dataset_images=False)
    with Image.open(first) as without:
        assert without.width < width


def test_figures_without_records_are_refused(tmp_path: Path) -> None:
    empty = StudyRecords(())
    with pytest.raises(ValueError, match="badnets"):
        draw_scores(empty, "badnets", tmp_path / "x.svg")
    with pytest.raises(ValueError, match="wanet"):
        draw_rates(empty, "wanet", tmp_path / "x.svg")
    values = closeness(tmp_path, "reverse")
    odd = save_picture(tmp_path / "pictures", "odd", torch.zeros(1, 4, 4), "another size")
    labels = {**values["labels"], "1": {"reversed": odd, "change": odd}}
    with pytest.raises(ValueError, match="4 x 4 and 8 x 8"):
        draw_labels({**values, "labels": labels}, tmp_path / "pictures", tmp_path / "x.png")
    rows = json.loads(json.dumps(values["rows"]).replace("reverse-0", "../reverse-0"))
    with pytest.raises(ValueError, match="picture"):
        draw_triggers({**values, "rows": rows}, tmp_path / "pictures", tmp_path / "x.png")
