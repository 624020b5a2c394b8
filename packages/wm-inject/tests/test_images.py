from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from wm_inject.core.image_size import (
    as_image_size,
    describe_size,
    height_width,
    size_from_json,
    size_to_json,
)
from wm_inject.core.images import (
    check_images,
    check_labels,
    check_pair,
    check_pixels,
    check_side,
    list_images,
    load_image,
    quantize,
    save_image,
    to_float,
    to_pixels,
)


def test_good_images_come_back_as_they_are():
    images = torch.rand(2, 3, 4, 5)
    assert check_images(images, channels=3, size=(4, 5)) is images


def test_bad_images_are_refused_in_one_line(subtests):
    for images, message in [
        (np.zeros((1, 3, 4, 4), np.float32), "as a tensor"),
        (torch.zeros(3, 4, 4), r"of shape \(N, C, H, W\), got \(3, 4, 4\)"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.float64), "dtype float32"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), "dtype float32"),
        (torch.zeros(0, 3, 4, 4), "empty batch"),
        (torch.zeros(1, 2, 4, 4), "of shape"),
        (torch.full((1, 3, 4, 4), 1.5), r"in \[0, 1\], got \[1.5, 1.5\]"),
        (torch.full((1, 3, 4, 4), -0.1), "in .0, 1."),
        (torch.full((1, 3, 4, 4), float("nan")), "finite"),
    ]:
        with subtests.test(images=images, message=message):
            with pytest.raises(ValueError, match=message) as caught:
                check_images(images)
            assert "\n" not in str(caught.value)


def test_asked_channels_and_size_are_held():
    with pytest.raises(ValueError, match=r"\(N, 1, H, W\)"):
        check_images(torch.zeros(1, 3, 4, 4), channels=1)
    with pytest.raises(ValueError, match=r"\(N, C, 5, 5\)"):
        check_images(torch.zeros(1, 3, 4, 4), size=(5, 5))


def test_pairs_have_one_shape():
    check_pair(torch.zeros(1, 1, 4, 4), torch.ones(1, 1, 4, 4))
    with pytest.raises(ValueError, match="one shape"):
        check_pair(torch.zeros(1, 1, 4, 4), torch.zeros(2, 1, 4, 4))
    with pytest.raises(ValueError, match="reference"):
        check_pair(torch.zeros(1, 1, 4, 4), torch.full((1, 1, 4, 4), 2.0))


def test_bad_labels_are_refused(subtests):
    for labels, count in [
        ([1, 2], 2),
        (torch.tensor([0.0, 1.0]), 2),
        (torch.tensor([0, 1]), 3),
        (torch.tensor([[0, 1]]), 2),
        (torch.tensor([], dtype=torch.int64), 0),
        (torch.tensor([-1, 0]), 2),
        (torch.tensor([0, 5]), 2),
    ]:
        with (
            subtests.test(labels=labels, count=count),
            pytest.raises(ValueError, match="expected labels"),
        ):
            check_labels(labels, count, num_classes=5)


def test_any_label_count_without_a_bound():
    labels = torch.tensor([0, 99])
    assert check_labels(labels, 2) is labels


def test_bad_pixels_are_refused(subtests):
    for pixels in [
        torch.zeros(1, 2, 2, 3, dtype=torch.uint8),
        np.zeros((1, 2, 2, 3), np.float32),
        np.zeros((2, 2, 3), np.uint8),
        np.zeros((1, 2, 2, 4), np.uint8),
        np.zeros((0, 2, 2, 3), np.uint8),
    ]:
        with subtests.test(pixels=pixels):
            for function in (check_pixels, to_float):
                with pytest.raises(ValueError, match="expected"):
                    function(pixels)


def test_bad_sides_are_refused(subtests):
    for side in [0, -1, 4097, 3.0, "32"]:
        with subtests.test(side=side), pytest.raises(ValueError, match="image side"):
            check_side(side)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 3]))
def test_pixels_survive_the_way_to_floats_and_back(seed, channels):
    pixels = np.random.default_rng(seed).integers(0, 256, (2, 5, 4, channels), dtype=np.uint8)
    images = to_float(pixels)
    assert images.shape == (2, channels, 5, 4)
    assert np.array_equal(to_pixels(images), pixels)
    assert torch.equal(quantize(images), images)


def test_quantize_rounds_half_up_and_clips():
    levels = torch.tensor([-3.0, 0.49, 0.5, 1.5, 2.5, 254.6, 300.0]) / 255
    assert (quantize(levels.view(1, 1, 1, 7)) * 255).round().flatten().tolist() == [
        0, 0, 1, 2, 3, 255, 255,
    ]  # fmt: skip


def test_quantize_moves_no_value_by_more_than_half_a_level():
    images = torch.rand(2, 3, 8, 8)
    assert (quantize(images) - images).abs().max() <= 0.5 / 255 + 1e-6


@pytest.mark.parametrize(
    "bad", [torch.zeros(1, 1, 2, 2, dtype=torch.uint8), torch.zeros(0, 1, 2, 2)]
)
def test_quantize_refuses(bad):
    with pytest.raises(ValueError, match="expected images"):
        quantize(bad)


@pytest.mark.parametrize("channels", [1, 3])
def test_saved_images_come_back_exactly(tmp_path, channels):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 5, channels), dtype=np.uint8)
    save_image(tmp_path / "deep" / "a.png", pixels)
    assert np.array_equal(load_image(tmp_path / "deep" / "a.png", channels=channels), pixels)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["a.png"]


def test_images_are_resized_and_turned_upright(tmp_path):
    picture = Image.new("RGB", (8, 4))
    picture.putpixel((0, 0), (255, 255, 255))
    exif = picture.getexif()
    exif[0x0112] = 6  # stored lying on its side
    picture.save(tmp_path / "a.png", exif=exif)
    upright = load_image(tmp_path / "a.png")
    assert upright.shape == (8, 4, 3)
    assert upright[0, 3, 0] == 255
    assert load_image(tmp_path / "a.png", size=5, channels=1).shape == (5, 5, 1)
    wide = load_image(tmp_path / "a.png", size=(2, 6))
    pillows = Image.fromarray(upright).resize((6, 2), Image.Resampling.BILINEAR)
    assert np.array_equal(wide, np.asarray(pillows))


def test_a_size_is_a_side_or_height_and_width():
    for size, sides, text in ((7, (7, 7), "7"), ((48, 192), (48, 192), "48 x 192")):
        assert height_width(size) == sides and as_image_size(*sides) == size
        assert describe_size(size) == text
        assert size_from_json(json.loads(json.dumps(size_to_json(size)))) == size
    for wrong in (0, -1, 1.0, "7", (1, 2, 3), (1,), (0, 4), [4, 8]):
        with pytest.raises(ValueError, match="a side or \\(height, width\\)"):
            height_width(wrong)
    for wrong in (True, 3, 9, 7.0, "7", None, [7], [7, 3], [7, 9], [7, True], [7, 7, 7], [[7], 7]):
        with pytest.raises(ValueError, match=r"image size of 4 \.\. 8 pixels"):
            size_from_json(wrong, least=4, most=8)
    with pytest.raises(ValueError, match="image size"):
        size_from_json({"height": 7, "width": 8})


def test_unreadable_images_are_refused(tmp_path):
    picture = tmp_path / "a.png"
    save_image(picture, np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    (tmp_path / "cut.png").write_bytes(picture.read_bytes()[:2000])
    (tmp_path / "text.png").write_text("no image")
    for name in ("cut.png", "text.png", "none.png"):
        with pytest.raises(ValueError, match=name.split(".")[0]):
            load_image(tmp_path / name)
    with pytest.raises(ValueError, match="channels 1 or 3"):
        load_image(picture, channels=4)


def test_listing_is_sorted_and_deep(tmp_path):
    for name in ("b.png", "a/c.JPG", "a/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [p.name for p in list_images(tmp_path)] == ["c.JPG", "b.png"]
    with pytest.raises(ValueError, match="found none at"):
        list_images(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="found none"):
        list_images(tmp_path / "empty")
