"""Known values: the losses of FeatureRE and BTI-DBF by hand, and the split of every body."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from defense_reverse.detectors.bti_losses import (
    BtiDbfConfig,
    Changes,
    decoupling_loss,
    feature_changes,
    inversion_loss,
    pretraining_loss,
)
from defense_reverse.detectors.common import squash
from defense_reverse.detectors.feature_losses import (
    Excess,
    FeatureREConfig,
    Terms,
    excess,
    generator_loss,
    mask_bound,
    mask_loss,
    masked_spread,
    mix,
    round_mean,
    score,
    similarity,
    warmup_loss,
)
from defense_reverse.detectors.split import (
    check_split,
    image_change,
    image_scale,
    split_at_last_map,
)
from defense_reverse.mitigations import BtiDbfUnlearning
from wm_victim import build_classifier

FRE, BTI = FeatureREConfig(), BtiDbfConfig()


def number(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def terms(**changed: float) -> Terms:
    """A batch that keeps every bound."""
    kept = {
        "similarity": 0.2,
        "success": 1.0,
        "attack": 3.0,
        "change": 0.1,
        "spread": 0.5,
        "mask_norm": 1.0,
    }
    return Terms(**{name: number(value) for name, value in {**kept, **changed}.items()})


def test_similarity_is_the_cosine_of_means():
    features = torch.tensor([[[1.0, 0.0]], [[1.0, 2.0]]])  # the mean is (1, 1)
    assert float(similarity(features, torch.tensor([[1.0, 0.0]]))) == pytest.approx(0.5**0.5)
    assert float(similarity(features, torch.tensor([[-2.0, -2.0]]))) == pytest.approx(-1)


def test_the_spread_counts_only_what_the_mask_holds():
    features = torch.tensor([[0.0, 5.0], [2.0, -5.0]])
    held = torch.tensor([1.0, 0.0])
    assert float(masked_spread(features, held)) == pytest.approx(2**0.5)
    assert float(masked_spread(features, held / 2)) == pytest.approx(2**0.5)  # a weighted mean
    assert float(masked_spread(features[:1], held)) == 0  # a single image does not spread


def test_the_mask_takes_generated_features_and_leaves_the_others():
    mask = torch.tensor([1.0, 0.0, 0.25])
    mixed = mix(torch.full((2, 3), 8.0), torch.zeros(2, 3), mask)
    assert mixed.tolist() == [[8.0, 0.0, 2.0]] * 2


def test_warm_up_pays_for_the_image_only_above_its_bound():
    assert float(warmup_loss(number(3), number(0.15), FRE)) == pytest.approx(3)
    assert float(warmup_loss(number(3), number(0.16), FRE)) == pytest.approx(3 + 16)


def test_the_generator_pays_for_what_it_breaks(subtests):
    for changed, before, loss in [
        ({}, {}, 1.0),  # 5 x 0.2
        ({"similarity": -0.5}, {}, 0.0),
        ({"spread": 2.0}, {}, 1 + 20),
        ({"spread": 2.0}, {"spread": 0.5}, 1 + 30),
        ({"change": 0.3}, {}, 1 + 3),
        ({"change": 0.3}, {"change": 1.0}, 1 + 6),
        ({"success": 0.89}, {}, 1 + 3),
        ({"success": 0.0}, {"success": 1.0}, 1 + 6),
        ({"success": 0.9}, {"success": 1.0, "change": 1.0, "spread": 1.0}, 1.0),
    ]:
        with subtests.test(changed=changed, before=before, loss=loss):
            assert float(generator_loss(terms(**changed), FRE, Excess(**before))) == pytest.approx(
                loss
            )


def test_the_mask_pays_its_sum_above_three_per_cent():
    kept, over = torch.zeros(100), torch.zeros(100)
    kept[:3], over[:4] = 1, 1
    assert mask_bound(kept, FRE) == 3 and mask_bound(torch.zeros(5), FRE) == 1
    assert float(mask_loss(number(2), kept, FRE)) == 2
    assert float(mask_loss(number(2), over, FRE)) == 2 + 4


def test_the_score_is_similarity_less_success_and_what_was_broken():
    mask = torch.zeros(100)
    assert excess(terms(), mask, FRE) == Excess()
    said = terms(similarity=-0.1, success=0.45, change=0.3, spread=1.5, mask_norm=6.0)
    broken = excess(said, mask, FRE)
    assert broken == pytest.approx((1.0, 0.5, 0.5, 1.0))
    assert score(said, broken) == pytest.approx(-0.1 - 0.45 + 1 + 0.5 + 1)
    assert score(terms(), Excess()) == pytest.approx(-0.8)
    assert float(round_mean([terms(), terms(success=0.5)]).success) == 0.75


def test_decoupling_is_right_with_the_mask_and_wrong_without():
    features, labels = torch.tensor([[math.log(3), 0.0]]), torch.tensor([0])
    full, none = torch.ones(2), torch.zeros(2)
    right, even = -math.log(0.75), math.log(2)
    assert float(decoupling_loss(lambda f: f, features, labels, full)) == pytest.approx(
        right - even
    )
    assert float(decoupling_loss(lambda f: f, features, labels, none)) == pytest.approx(
        even - right
    )


def test_the_changes_are_parted_by_the_mask():
    clean, generated = torch.zeros(1, 2), torch.tensor([[2.0, 4.0]])
    parted = feature_changes(clean, generated, torch.tensor([1.0, 0.5]), number(0.1))
    assert float(parted.benign) == (4 + 4) / 2 and float(parted.backdoor) == (0 + 4) / 2
    assert float(parted.image) == pytest.approx(0.1)


def test_the_inversion_only_mends_the_image_beyond_a_bound(subtests):
    for image, benign, loss in [
        (0.3, 3.0, 0.03 - 7),
        (0.31, 1.0, 0.31),
        (0.1, 3.1, 0.1),
        (0.1, 1.0, 0.01 - 7),
    ]:
        with subtests.test(image=image, benign=benign, loss=loss):
            changed = Changes(number(image), number(benign), number(7))
            assert float(inversion_loss(changed, BTI)) == pytest.approx(loss)


def test_pretraining_keeps_answer_features_and_image():
    logits = torch.tensor([[math.log(3), 0.0]], dtype=torch.float64)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    near = pretraining_loss(logits, logits, number(2), number(0.1))
    far = pretraining_loss(logits, logits, number(2), number(0.2))
    assert float(near) == pytest.approx(entropy + 2 + 0.001)
    assert float(far) == pytest.approx(entropy + 2 + 20)


def test_a_mask_stays_between_zero_and_one():
    mask = squash(torch.tensor([-1e6, -1.0, 0.0, 1.0, 1e6]))
    assert mask[0] == 0 and mask[2] == 0.5 and mask[4] == 1
    assert float(mask[3]) == pytest.approx(0.8808, abs=1e-4)


def test_every_body_splits_at_its_last_map(subtests):
    for name, channels, size, shape in [
        ("resnet10", 3, 16, (64, 2, 2)),
        ("preactresnet10", 3, 16, (64, 2, 2)),
        ("vgg16", 1, 28, (64, 1, 1)),
        ("mobilenetv2", 3, 16, (160, 2, 2)),
        ("wanet-mnist", 1, 28, (8, 4, 4)),
    ]:
        with subtests.test(name=name, channels=channels, size=size, shape=shape):
            model = build_classifier(
                name, num_classes=4, channels=channels, image_size=size, width=8
            )
            model.eval()
            images = torch.rand(2, channels, size, size, generator=torch.Generator().manual_seed(0))
            split = split_at_last_map(model)
            assert split.features(images).shape[1:] == shape
            check_split(split, model, images)
            assert torch.equal(image_scale(model, images), model.normalize.std)


def test_a_model_with_features_and_head_splits_there():
    class Own(nn.Module):
        def features(self, images):
            return images.flatten(1)

        def head(self, features):
            return features[:, :2]

        def forward(self, images):
            return 1 + images.flatten(1)[:, :2]

    images = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 1, 4, 4)
    split = split_at_last_map(Own())
    assert split.features(images).shape == (2, 16)
    with pytest.raises(ValueError, match="model's logits"):
        check_split(split, Own(), images)
    scale = image_scale(Own(), images)
    assert scale.shape == (1, 1, 1, 1) and float(scale) == pytest.approx(0.5, abs=0.02)
    assert float(image_change(images + 0.2, images, torch.tensor(0.1))) == pytest.approx(4)
    with pytest.raises(ValueError, match="expected a wm_victim Classifier"):
        split_at_last_map(nn.Identity())


def test_settings_outside_their_range_are_refused(subtests):
    for kind, changed, message in [
        (FeatureREConfig, {"width": 0}, "width >= 1"),
        (FeatureREConfig, {"steps": 0}, "steps >= 1"),
        (FeatureREConfig, {"lr": 0.0}, "lr > 0"),
        (FeatureREConfig, {"image_bound": math.inf}, "image_bound > 0"),
        (FeatureREConfig, {"warmup_steps": -1}, "warmup_steps >= 0"),
        (FeatureREConfig, {"batch_size": 1}, "batch_size >= 2"),
        (FeatureREConfig, {"betas": (0.5, 1.0)}, "two betas"),
        (FeatureREConfig, {"mask_share": 0.0}, "mask_share in"),
        (FeatureREConfig, {"success_floor": 1.1}, "success_floor in"),
        (FeatureREConfig, {"threshold": 0.5}, "threshold in"),
        (BtiDbfConfig, {"mask_steps": 0}, "mask_steps >= 1"),
        (BtiDbfConfig, {"benign_bound": 0.0}, "benign_bound > 0"),
        (BtiDbfConfig, {"noise": -0.1}, "noise >= 0"),
        (BtiDbfConfig, {"pretrain_steps": -1}, "pretrain_steps >= 0"),
        (BtiDbfConfig, {"min_share": 0.0}, "min_share in"),
        (BtiDbfUnlearning, {"rounds": 0}, "rounds >= 1"),
        (BtiDbfUnlearning, {"steps": 1}, "a step for each round"),
        (BtiDbfUnlearning, {"batch_size": 1}, "batch_size >= 2"),
        (BtiDbfUnlearning, {"lr": 0.0}, "lr > 0"),
        (BtiDbfUnlearning, {"trigger_share": 0.0}, "trigger_share in"),
    ]:
        with subtests.test(kind=kind, changed=changed, message=message):
            with pytest.raises(ValueError, match=message):
                kind(**changed)
            with pytest.raises(ValueError, match="expected a preset in paper, fast"):
                kind.preset("huge")
            assert kind.preset("fast") == kind()
            assert kind.preset("paper", lr=0.5).lr == 0.5
