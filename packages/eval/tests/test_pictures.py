from __future__ import annotations

from pathlib import Path

import pytest
import torch

from defense_nc import InvertedTrigger
from wm_eval.pictures import amplified, residual_gain, reversed_picture, save_picture
from wm_inject import BadNetsTrigger, load_image


def test_a_picture_comes_back_pixel_by_pixel(tmp_path: Path) -> None:
    image = torch.arange(256).view(1, 16, 16) / 255
    found = save_picture(tmp_path, "a", image, "caption")
    assert found == {"file": "a.png", "caption": "caption", "size": [16, 16]}
    assert torch.equal(
        torch.from_numpy(load_image(tmp_path / "a.png", channels=1).copy())[..., 0],
        torch.arange(256).view(16, 16).byte(),
    )


@pytest.mark.parametrize(("largest", "gain"), [(0.9, 1), (0.2, 2), (0.04, 10), (0.0, 50)])
def test_the_gain_fits_the_change(largest: float, gain: int) -> None:
    change = torch.full((2, 1, 8, 8), largest)
    assert residual_gain(change) == residual_gain(-change) == gain
    assert amplified(torch.zeros(3), gain).eq(0.5).all()


def test_reversed_triggers_show_what_they_do(tmp_path: Path) -> None:
    images = torch.full((4, 1, 8, 8), 0.5)
    mask, pattern = torch.zeros(1, 8, 8), torch.ones(1, 8, 8)
    mask[0, 0, 0] = 1
    inverted = reversed_picture(tmp_path, "nc", InvertedTrigger(mask, pattern), images)
    assert inverted["caption"] == "mask x pattern"
    shown = load_image(tmp_path / "nc.png", channels=1)
    assert shown[0, 0, 0] == 255 and shown.sum() == 255
    patch = reversed_picture(tmp_path, "patch", BadNetsTrigger(image_size=8, size=1), images)
    assert patch["caption"].startswith("mean change over 4 images, x ")
