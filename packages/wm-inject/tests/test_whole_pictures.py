"""Pictures keep their size, colours, depth and format when a small copy's change is laid over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from wm_inject.attacks.watermark import WatermarkTrigger
from wm_inject.core.decode import UnreadableImage
from wm_inject.core.images import load_image, to_float, to_pixels
from wm_inject.core.plan import PoisonPlan
from wm_inject.core.whole_pictures import check_quality, laid_over, read_picture, save_picture
from wm_inject.runtime.folder import poison_files

WIDTH, HEIGHT, SMALL = 60, 40, 16
ORIENTATION, MAKER = 274, 271


def pixels(seed: int = 0, *shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(8, 240, shape or (HEIGHT, WIDTH, 3), np.uint8)


def written(folder: Path) -> dict[str, str]:
    """A picture of every kind that is kept; by file the mode that it has to come back in."""
    colour, grey = Image.fromarray(pixels()), Image.fromarray(pixels()[..., 0])
    deep = Image.fromarray(pixels()[..., 0].astype(np.uint16) * 257)
    clear, clear_grey = colour.copy(), grey.copy()
    for image in (clear, clear_grey):
        image.putalpha(Image.fromarray(pixels(1)[..., 0]))
    palette = colour.quantize(40)
    folder.mkdir()
    kept: list[tuple[str, Image.Image, str, dict[str, Any], str]] = [
        ("colour.png", colour, "PNG", {}, "RGB"),
        ("grey.png", grey, "PNG", {}, "L"),
        ("deep.png", deep, "PNG", {}, "I;16"),
        ("clear.png", clear, "PNG", {}, "RGBA"),
        ("clear-grey.png", clear_grey, "PNG", {}, "LA"),
        ("palette.png", palette, "PNG", {}, "RGB"),
        ("palette-clear.png", palette, "PNG", {"transparency": 3}, "RGBA"),
        ("drawing.gif", palette, "GIF", {}, "RGB"),
        ("colour.jpg", colour, "JPEG", {"quality": 90}, "RGB"),
        ("grey.jpg", grey, "JPEG", {"quality": 90}, "L"),
        ("print.jpg", colour.convert("CMYK"), "JPEG", {}, "RGB"),
        ("clear.webp", clear, "WEBP", {"lossless": True, "exact": True}, "RGBA"),
        ("colour.bmp", colour, "BMP", {}, "RGB"),
        ("colour.ppm", colour, "PPM", {}, "RGB"),
        ("deep.pgm", deep, "PPM", {}, "I"),
        ("clear.tif", clear, "TIFF", {}, "RGBA"),
        ("deep.tif", deep, "TIFF", {}, "I;16"),
        ("no suffix", colour, "PNG", {}, "RGB"),
        ("wrong.png", colour, "JPEG", {"quality": 90}, "RGB"),
    ]
    for name, image, kind, options, _ in kept:
        image.save(folder / name, format=kind, **options)
    return {name: mode for name, _, _, _, mode in kept}


def test_every_kind_of_picture_comes_back_as_it_was_but_for_the_change(
    tmp_path: Path, subtests: pytest.Subtests
) -> None:
    before = pixels(2, SMALL, SMALL, 3)
    for name, mode in written(tmp_path / "in").items():
        with subtests.test(name=name):
            picture = read_picture(tmp_path / "in" / name)
            # A uniform change of three steps, so that what comes back is known.
            save_picture(tmp_path / "out", laid_over(picture, before, before + 3))
            again = read_picture(tmp_path / "out")
            with Image.open(tmp_path / "out") as image:
                assert image.mode == mode and image.size == (WIDTH, HEIGHT)
                assert image.format == ("PNG" if picture.format == "GIF" else picture.format)
            step = 257 if picture.values.dtype == np.uint16 else 1
            change = again.values.astype(np.int64) - picture.values
            if picture.format != "JPEG":
                assert (change == 3 * step).all()
            assert abs(change.mean() - 3 * step) < 0.1
            if picture.alpha is not None:
                assert again.alpha is not None and np.array_equal(again.alpha, picture.alpha)


def test_the_change_is_enlarged_and_becomes_grey_as_the_picture_does(tmp_path: Path) -> None:
    before = np.full((SMALL, SMALL, 3), 100, np.uint8)
    after = before.copy()
    after[..., 0] += 30  # red
    Image.fromarray(np.full((HEIGHT, WIDTH, 3), 50, np.uint8)).save(tmp_path / "colour.png")
    Image.fromarray(np.full((HEIGHT, WIDTH), 50, np.uint8)).save(tmp_path / "grey.png")
    colour = laid_over(read_picture(tmp_path / "colour.png"), before, after).values
    assert (colour == np.array([80, 50, 50])).all()
    grey = laid_over(read_picture(tmp_path / "grey.png"), before, after).values
    assert (grey == round(50 + 0.299 * 30)).all()
    # From grey to colour: all three alike.
    alike = laid_over(read_picture(tmp_path / "colour.png"), before[..., :1], after[..., :1])
    assert (alike.values == 80).all()
    # Where it is local, it stays where it was, and at the ends of the range it is clipped.
    local = before.copy()
    local[:8, :8] = 255
    corner = laid_over(read_picture(tmp_path / "colour.png"), before, local).values
    assert (corner[:18, :28] == 205).all() and (corner[22:, 32:] == 50).all()
    bright = laid_over(
        read_picture(tmp_path / "colour.png")._replace(values=colour + 150), before, local
    )
    assert (bright.values[:18, :28] == 255).all()


def test_a_turned_picture_comes_out_upright_with_its_other_metadata(tmp_path: Path) -> None:
    facts = Image.Exif()
    facts[ORIENTATION], facts[MAKER] = 6, "somebody"
    for kind in ("JPEG", "PNG", "WEBP"):
        Image.fromarray(pixels()).save(tmp_path / "in", format=kind, exif=facts, quality=90)
        picture = read_picture(tmp_path / "in")
        save_picture(tmp_path / "out", picture)
        with Image.open(tmp_path / "out") as image:
            assert image.size == (HEIGHT, WIDTH), "a quarter turn"
            assert image.getexif().get(MAKER) == "somebody"
            assert image.getexif().get(ORIENTATION, 1) == 1


def test_what_is_refused(tmp_path: Path) -> None:
    Image.fromarray(pixels()).save(tmp_path / "in.png")
    picture, small = read_picture(tmp_path / "in.png"), pixels(0, SMALL, SMALL, 3)
    with pytest.raises(ValueError, match="one shape"):
        laid_over(picture, small, small[..., :1])
    with pytest.raises(ValueError, match="uint8"):
        laid_over(picture, small.astype(np.float32), small)
    for bad in (0, 101, 9.5):
        with pytest.raises(ValueError, match=r"1 \.\. 100"):
            check_quality(bad)  # type: ignore[arg-type]
    (tmp_path / "cut.png").write_bytes((tmp_path / "in.png").read_bytes()[:200])
    with pytest.raises(UnreadableImage):
        read_picture(tmp_path / "cut.png")


def brighter(images: np.ndarray[Any, Any], **_: Any) -> np.ndarray[Any, Any]:
    return images + np.uint8(3)


def test_a_folder_keeps_its_files_and_a_second_call_continues(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    names = set(written(source))
    plan = PoisonPlan(ratio=0.5, seed=1)
    settings: dict[str, Any] = {"size": SMALL, "channels": 3, "plan": plan, "progress": False}
    done = poison_files(brighter, source, out, whole=True, **settings)
    assert done.images == len(names) and not done.resized
    assert done.grey == sum(
        row["poisoned"] and ("grey" in row["source"] or "deep" in row["source"])
        for row in json.loads((out / "plan.json").read_text())["images"]
    )
    listed = json.loads((out / "plan.json").read_text())
    assert listed["image_size"] is None and listed["jpeg_quality"] == 95
    files = {row["file"] for row in listed["images"]}
    assert files == names - {"drawing.gif"} | {"drawing.png"}
    for row in listed["images"]:
        old, new = read_picture(source / row["source"]), read_picture(out / row["file"])
        step = 257 if old.values.dtype == np.uint16 else 1
        change = (new.values.astype(np.int64) - old.values).mean() / step
        assert abs(change - 3 * row["poisoned"]) < 0.1
    first = {path.name: path.read_bytes() for path in out.iterdir()}
    (out / "clear.webp").unlink()
    (out / ".colour.part1.jpg").write_bytes(b"half")
    again = poison_files(brighter, source, out, whole=True, **settings)
    assert again.written == 1
    assert {path.name: path.read_bytes() for path in out.iterdir()} == first
    with pytest.raises(ValueError, match="another run"):
        poison_files(brighter, source, out, whole=True, jpeg_quality=80, **settings)


def test_files_and_tensors_get_the_same_change(tmp_path: Path) -> None:
    trigger = WatermarkTrigger.from_pretrained("tiny-32")
    smooth = Image.fromarray(pixels(3, 6, 8, 3)).resize((120, 90), Image.Resampling.BICUBIC)
    smooth.save(tmp_path / "in.png")
    whole, small = load_image(tmp_path / "in.png"), load_image(tmp_path / "in.png", size=32)
    as_tensor = to_pixels(trigger(to_float(whole[None])).detach())[0]
    marked = to_pixels(trigger(to_float(small[None])).detach())[0]
    as_file = laid_over(read_picture(tmp_path / "in.png"), small, marked).values
    # Pillow rounds the small copy, and 8 bits round the change.
    assert np.abs(as_file.astype(int) - as_tensor).max() <= 2
