from pathlib import Path

import pytest
import torch

from defense_nc import InvertedTrigger
from defense_reverse import UniversalPicture, WarpField
from wm_eval.config import WatermarkConfig, load_study
from wm_eval.titles import attack_title
from wm_eval.trial import Trial, load_reversed, save_reversed
from wm_eval.watermark_attacks import blend_watermark, fit_watermark
from wm_inject import default_watermark, pretrained_card
from wm_victim import ImageSet


def images(size: int) -> ImageSet:
    return ImageSet(
        torch.rand(4, 3, size, size), torch.zeros(4, dtype=torch.int64), torch.arange(4)
    )


def test_shipped_weights_stand_in_for_a_training(tmp_path: Path) -> None:
    config, mark = WatermarkConfig(pretrained="tiny-32", strength=0.5), tmp_path / "state"
    weak = fit_watermark(config, images(32), seed=0, checkpoint=mark, progress=False)
    card = pretrained_card("tiny-32")
    assert weak.facts["recipe"] == card["recipe"] and weak.facts["trained_on"] == card["data"]
    assert weak.extractor is not None and not mark.exists()
    whole = fit_watermark(
        WatermarkConfig(pretrained="tiny-32"), images(32), seed=0, checkpoint=mark, progress=False
    )
    batch = images(32).images
    with torch.no_grad():
        half, full = (one.trigger(batch) - batch for one in (weak, whole))
    assert 0 < float(half.abs().sum()) < float(full.abs().sum())
    large = fit_watermark(config, images(40), seed=0, checkpoint=mark, progress=False)
    assert large.trigger(images(40).images).shape == images(40).images.shape
    with pytest.raises(ValueError, match="tiny-32, got 3 and 24"):
        fit_watermark(config, images(24), seed=0, checkpoint=mark, progress=False)


def test_weights_that_ship_are_attacks_by_their_name() -> None:
    study = load_study("marks-cifar10")
    trial = Trial(study, seed=0, attack="watermark-varied-32")
    assert trial.watermark is not None and trial.watermark.pretrained == "varied-32"
    assert trial.described["name"] == "watermark-varied-32"
    assert trial.described["pretrained"] == "varied-32" and study.watermark.pretrained is None
    assert Trial(study, seed=0).watermark is None
    assert "varied-32" in attack_title(trial.attack)


def test_equation_2_blends_the_watermark_by_its_weight() -> None:
    batch = images(32).images
    trigger = blend_watermark(WatermarkConfig(weight=0.25), images(32)).trigger
    expected = 0.75 * batch + 0.25 * default_watermark(32)
    assert torch.allclose(trigger(batch), expected, atol=1e-6)


def test_reversed_triggers_come_back_to_the_bit(tmp_path: Path) -> None:
    trigger = InvertedTrigger(torch.rand(1, 8, 8), torch.rand(3, 8, 8), target=3, success_rate=0.5)
    save_reversed(trigger, tmp_path / "patch.safetensors")
    again = load_reversed(tmp_path / "patch.safetensors")
    assert isinstance(again, InvertedTrigger)
    assert (again.target, again.success_rate) == (3, 0.5)
    assert torch.equal(again.mask, trigger.mask) and torch.equal(again.pattern, trigger.pattern)
    picture = UniversalPicture(torch.randn(3, 8, 8))
    save_reversed(picture, tmp_path / "picture.safetensors")
    again = load_reversed(tmp_path / "picture.safetensors")
    assert isinstance(again, UniversalPicture) and torch.equal(again.picture, picture.picture)
    warp = WarpField(torch.randn(2, 4, 4))
    save_reversed(warp, tmp_path / "warp.safetensors")
    again = load_reversed(tmp_path / "warp.safetensors")
    assert isinstance(again, WarpField) and torch.equal(again.field, warp.field)
    with pytest.raises(ValueError, match="got Identity"):
        save_reversed(torch.nn.Identity(), tmp_path / "other.safetensors")
