from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from defense_reverse import ReverseConfig, UNetGenerator, pretrain, reverse_engineer
from wm_inject import find_lpips_weights, psnr, quantize

TARGET = 2


class Constant(nn.Module):
    """Answers one class to everything, whatever the image."""

    def __init__(self, answer: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.answer = answer

    def forward(self, images):
        logits = torch.zeros(len(images), 6)
        logits[:, self.answer] = 9
        return logits * self.scale + images.mean() * 0


def residual(trigger, images):
    return float((quantize(trigger(images).detach()) - images).abs().mean())


def undecided(trigger, images):
    """How far a residual on 8-bit images may move because a kernel sums in another order.

    Sums of n terms differ by about eps sqrt(n), here n = 9 taps of 32 channels. A value as close
    to the middle of two levels as that may be stored as either, and they are 1/255 apart.
    """
    error = torch.finfo(torch.float32).eps * (9 * 32) ** 0.5
    levels = 255 * trigger(images).detach()
    return float(((levels % 1 - 0.5).abs() < 255 * error).double().mean()) / 255


@pytest.mark.integration
def test_pretraining_reconstructs_the_images(data, start):
    images, _ = data
    with torch.no_grad():
        values = psnr(quantize(start(images)), images)
    assert values.mean() > 25 and values.min() > 22


@pytest.mark.integration
def test_the_pretrained_generator_leaves_the_answers_alone(data, start, channel_model):
    images, _ = data
    with torch.no_grad():
        same = channel_model(start(images)).argmax(1) == channel_model(images).argmax(1)
    assert same.float().mean() > 0.9


@pytest.mark.integration
@pytest.mark.parametrize("perceptual", [0.0, 0.1])
def test_pretraining_draws_from_its_own_seed(data, quick, perceptual):
    if perceptual and find_lpips_weights() is None:
        pytest.skip("LPIPS weights are not here (set WM_LPIPS)")
    config = replace(quick, pretrain_steps=2, batch_size=4, lambdas=(1e-3, 1.0, perceptual))
    state = torch.get_rng_state()
    one, same = (pretrain(data[0], config=config, seed=5) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    other = pretrain(data[0], config=config, seed=6)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.head.weight, other.head.weight)


@pytest.mark.integration
def test_without_the_attack_term_every_label_keeps_the_reconstruction(
    data, start, channel_model, quick
):
    # A check of eq. 4: with lambda_1 = 0 nothing tells the labels apart
    images, labels = data
    config = replace(quick, lambdas=(0.0, 1.0, 0.0), steps=30)
    for target in (0, TARGET):
        trigger = reverse_engineer(
            channel_model, images, target, config=config, start=start, labels=labels
        )
        others = images[labels != target]
        assert trigger.success_rate < 0.5
        assert trigger.residual_norm == pytest.approx(residual(start, others), rel=0.3)


@pytest.mark.integration
def test_the_reported_numbers_are_those_of_the_returned_generator(data, start, quick):
    images, labels = data
    config = replace(quick, steps=20)
    model = Constant(1)
    trigger = reverse_engineer(model, images, 0, config=config, start=start, labels=labels)
    others = images[labels != 0]
    # Equation 5: the mean absolute change, images of the class left out.
    tolerance = undecided(trigger, others)
    assert trigger.residual_norm == pytest.approx(residual(trigger, others), abs=tolerance)
    assert tolerance < 1e-3 * trigger.residual_norm
    assert trigger.success_rate == 0 and trigger.target == 0


@pytest.mark.integration
def test_a_label_that_everything_reaches_costs_no_more_than_the_reconstruction(data, start, quick):
    images, labels = data
    config = replace(quick, steps=20)
    trigger = reverse_engineer(Constant(1), images, 1, config=config, start=start, labels=labels)
    assert trigger.success_rate == 1
    others = images[labels != 1]
    assert trigger.residual_norm <= residual(start, others) + undecided(start, others)


@pytest.mark.integration
def test_the_planted_label_is_reached_with_a_small_change(backdoored, quick):
    trigger = backdoored.report.triggers[TARGET]
    assert trigger.success_rate >= quick.success_floor
    assert trigger.residual_norm < 0.03


@pytest.mark.integration
def test_the_sigmoid_output_tells_the_planted_label_as_well(data, start, channel_model, quick):
    images, labels = data
    found = [
        reverse_engineer(channel_model, images, y, config=quick, start=start, labels=labels)
        for y in (TARGET, 0)
    ]
    assert all(trigger.success_rate >= quick.success_floor for trigger in found)
    assert found[0].residual_norm < 0.6 * found[1].residual_norm


def test_the_residual_output_starts_as_a_copy_and_skips_pretraining(data, quick):
    config = replace(quick, residual=True, pretrain_steps=10**9)
    assert torch.equal(pretrain(data[0], config=config)(data[0]), data[0])


@pytest.mark.integration
def test_the_same_seed_gives_the_same_bits(data, start, channel_model, quick):
    images, labels = data
    config = replace(quick, steps=12)
    one, same, other = (
        reverse_engineer(
            channel_model, images, TARGET, config=config, start=start, labels=labels, seed=seed
        )
        for seed in (0, 0, 1)
    )
    assert torch.equal(one(images), same(images))
    assert one.residual_norm == same.residual_norm
    assert not torch.equal(one(images), other(images))


@pytest.mark.integration
def test_model_start_and_images_come_back_as_they_were(data, start, channel_model, quick):
    images, labels = data
    kept_images, kept_start = images.clone(), [p.clone() for p in start.parameters()]
    channel_model.train()
    channel_model.gain.requires_grad_(False)
    state = {name: value.clone() for name, value in channel_model.state_dict().items()}
    flags = [p.requires_grad for p in channel_model.parameters()]
    config = replace(quick, steps=12)
    reverse_engineer(channel_model, images, TARGET, config=config, start=start, labels=labels)
    assert channel_model.training and flags == [p.requires_grad for p in channel_model.parameters()]
    assert all(torch.equal(state[k], v) for k, v in channel_model.state_dict().items())
    assert all(p.grad is None for p in channel_model.parameters())
    assert torch.equal(images, kept_images)
    assert all(torch.equal(a, b) for a, b in zip(start.parameters(), kept_start, strict=True))


@pytest.mark.integration
def test_without_labels_the_models_answers_are_used(data, start, channel_model, quick):
    images, _ = data
    config = replace(quick, steps=6)
    answers = channel_model(images).argmax(1)
    told, guessed = (
        reverse_engineer(channel_model, images, 1, config=config, start=start, labels=labels)
        for labels in (answers, None)
    )
    assert torch.equal(told(images), guessed(images))


@pytest.mark.integration
def test_a_start_is_trained_if_none_is_given_and_residual_output_works(data, channel_model, quick):
    images, labels = data
    config = replace(quick, steps=40, residual=True)
    trigger = reverse_engineer(channel_model, images, TARGET, config=config, labels=labels)
    assert trigger.generator.residual
    assert 0 <= trigger.residual_norm < 0.2


@pytest.mark.integration
def test_bfloat16_training_comes_close_to_float32(data, quick):
    images, _ = data
    for precision in ("float32", "bfloat16"):
        config = replace(quick, precision=precision, pretrain_steps=60)
        with torch.no_grad():  # the caller's mode does not matter
            assert psnr(pretrain(images, config=config)(images), images).mean() > 25


def test_lpips_without_weights_says_how_to_get_them(data, quick, monkeypatch, tmp_path):
    monkeypatch.setenv("WM_LPIPS", str(tmp_path / "none.safetensors"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("WM_DATA", raising=False)
    with pytest.raises((RuntimeError, ValueError), match="LPIPS"):
        pretrain(data[0], config=replace(quick, lambdas=(0.1, 1.0, 0.1)))


def test_bad_images_are_refused(data, channel_model, subtests):
    for bad in ["empty", "range", "dtype", "shape", "nan"]:
        with subtests.test(bad=bad):
            images, _ = data
            broken = {
                "empty": images[:0],
                "range": images + 1,
                "dtype": images.double(),
                "shape": images[0],
                "nan": images * torch.nan,
            }[bad]
            with pytest.raises(ValueError, match="expected"):
                pretrain(broken)
            with pytest.raises(ValueError, match="expected"):
                reverse_engineer(channel_model, broken, 0)


@pytest.mark.integration
def test_bad_targets_labels_and_starts_are_refused(data, channel_model, start, quick):
    images, labels = data
    config = ReverseConfig.preset("fast", steps=1, pretrain_steps=1)
    for target in (-1, 6):
        with pytest.raises(ValueError, match="expected a target in 0"):
            reverse_engineer(channel_model, images, target, config=config)
    for wrong in (labels[:-1], labels.float(), labels + 6):
        with pytest.raises(ValueError, match="expected labels"):
            reverse_engineer(channel_model, images, 0, config=config, labels=wrong)
    with pytest.raises(ValueError, match="other classes"):
        reverse_engineer(channel_model, images, 3, config=config, labels=torch.full_like(labels, 3))
    with pytest.raises(ValueError, match="start of 3 channels"):
        reverse_engineer(channel_model, images, 0, start=UNetGenerator(channels=1), config=config)
    with pytest.raises(ValueError, match="torch module"):
        reverse_engineer(lambda x: x, images, 0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="logits"):
        reverse_engineer(nn.Identity(), images, 0)
