from __future__ import annotations

import pytest
import torch

from wm_extract.unet import UNetExtractor


def test_three_scales_of_full_size_and_a_map_in_range(subtests: pytest.Subtests) -> None:
    for channels, side in [(1, 28), (3, 32), (3, 40)]:
        with subtests.test(channels=channels, side=side):
            extractor = UNetExtractor(channels=channels, width=4).eval()
            images = torch.rand(2, channels, side, side)
            maps = extractor.scales(images)
            assert len(maps) == 3 and all(m.shape == (2, 1, side, side) for m in maps)
            out = extractor(images)
            assert out.min() >= 0 and out.max() <= 1
            assert torch.equal(out, maps[-1].sigmoid())


def test_every_head_is_its_own() -> None:
    extractor = UNetExtractor(channels=1, width=4).eval()
    coarse, middle, fine = extractor.scales(torch.rand(1, 1, 32, 32))
    assert not torch.allclose(coarse, fine) and not torch.allclose(middle, fine)


def test_an_image_does_not_depend_on_its_batch() -> None:
    extractor = UNetExtractor(channels=1, width=4).eval()
    images = torch.rand(3, 1, 32, 32)
    alone = torch.cat([extractor(i) for i in images.split(1)])
    assert torch.allclose(extractor(images), alone, atol=1e-6)


@pytest.mark.parametrize("settings", [{"channels": 2}, {"channels": 3, "width": 0}])
def test_settings_refused(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="expected"):
        UNetExtractor(**settings)


def test_images_refused(subtests: pytest.Subtests) -> None:
    for bad in [torch.rand(1, 1, 32, 32), torch.rand(3, 32, 32), torch.rand(0, 3, 32, 32)]:
        with subtests.test(bad=bad), pytest.raises(ValueError, match="expected"):
            UNetExtractor(channels=3, width=4)(bad)
