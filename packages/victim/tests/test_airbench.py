from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from wm_victim import ImageSet, TrainConfig, build_classifier, load_dataset, train_classifier
from wm_victim.airbench import AirbenchBody
from wm_victim.augment import augment
from wm_victim.models import Classifier
from wm_victim.train_config import learning_rate
from wm_victim.training_run import Average, TrainingRun


@pytest.fixture(scope="module")
def few() -> ImageSet:
    return load_dataset("digits", image_size=25).train.subset(torch.arange(200))


def small() -> Classifier:
    return build_classifier("airbench", num_classes=10, channels=1, image_size=25, width=8)


def body_of(model: Classifier) -> AirbenchBody:
    assert isinstance(model.body, AirbenchBody)
    return model.body


def recipe(**changes: Any) -> TrainConfig:
    return TrainConfig.preset("airbench", **{"epochs": 2, "batch_size": 64, **changes})


def run_of(model: Classifier, data: ImageSet, config: TrainConfig) -> TrainingRun:
    return TrainingRun(model, data, config, None, torch.device("cpu"))


def test_it_has_the_parameters_of_the_published_network() -> None:
    model = build_classifier("airbench", num_classes=10, channels=3, image_size=32)
    convolutions = 24 * 64 + 64 * 64 + 64 * 256 + 3 * 256 * 256
    front, biases, head = 24 * 12 + 24, 2 * 64 + 4 * 256, 256 * 10 + 10
    trained = [p for p in model.parameters() if p.requires_grad]
    scales = 2 * 64 + 4 * 256
    total = 9 * convolutions + front + biases + head
    assert sum(p.numel() for p in model.parameters()) == total + scales
    assert sum(p.numel() for p in trained) == total - 24 * 12


def test_convolutions_hand_their_inputs_through_at_first() -> None:
    first = body_of(small()).groups[0]
    images = torch.rand(2, 8, 6, 6)
    assert torch.equal(first(images)[:, :8], images)


def test_whitened_patches_have_the_identity_as_second_moments() -> None:
    body = AirbenchBody(channels=3, image_size=25, width=8)
    mix = torch.tensor([[1.0, 0.8, 0.5], [0.0, 0.6, 0.5], [0.0, 0.0, 0.7]])
    images = torch.einsum("cd,ndhw->nchw", mix, torch.randn(400, 3, 25, 25))
    body.fit_whitening(images)
    with torch.no_grad():
        maps = body.whiten(images)
    assert torch.allclose(maps[:, :12], -maps[:, 12:], atol=1e-5)
    flat = maps[:, :12].transpose(0, 1).flatten(1)
    # The ridge takes at most its share of the smallest eigenvalue away.
    assert torch.allclose(flat @ flat.T / flat.shape[1], torch.eye(12), atol=0.02)


def test_the_front_is_set_before_training_and_its_bias_stops(few: ImageSet) -> None:
    model = small()
    train_classifier(model, few, config=recipe(epochs=4), progress=False)
    body, fresh = body_of(model), body_of(small())
    fresh.fit_whitening(model.normalize(few.images))
    assert torch.equal(body.whiten.weight, fresh.whiten.weight)
    bias = body.whiten.bias
    assert isinstance(bias, Tensor) and not bias.requires_grad and bool(bias.ne(0).any())
    norms = [m for m in body.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert all(torch.equal(norm.weight, torch.ones_like(norm.weight)) for norm in norms)
    assert all(bool(norm.bias.ne(0).any()) for norm in norms)


@pytest.mark.parametrize("optimizer", ["sgd", "muon"])
def test_a_stopped_run_goes_on_to_the_same_bits(
    few: ImageSet, tmp_path: Path, optimizer: str
) -> None:
    straight, stopped, config = small(), small(), recipe(optimizer=optimizer)
    train_classifier(straight, few, config=config, progress=False)

    def stop(epoch: int, model: object) -> None:
        if epoch == 2:
            raise KeyboardInterrupt

    path = tmp_path / "run.safetensors"
    with pytest.raises(KeyboardInterrupt):
        train_classifier(stopped, few, config=config, progress=False, checkpoint=path, watch=stop)
    again = small()
    train_classifier(again, few, config=config, progress=False, checkpoint=path)
    for name, value in straight.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_images_alternate_between_the_two_mirror_images() -> None:
    images = torch.rand(40, 3, 10, 10)
    mirrored = torch.arange(40) % 2 == 0
    even, odd = (
        augment(
            images,
            mode="alternating",
            generator=torch.Generator().manual_seed(3),
            mirrored=mirrored ^ flip,
        )
        for flip in (False, True)
    )
    # The same draw: the two differ by the mirror alone, and a crop mirrored is a crop.
    borders = F.pad(images, [2] * 4, mode="reflect")
    for index in range(40):
        plain, turned = (odd, even) if mirrored[index] else (even, odd)
        crops = [
            borders[index, :, top : top + 10, left : left + 10]
            for top in range(5)
            for left in range(5)
        ]
        assert any(torch.equal(plain[index], crop) for crop in crops)
        assert any(torch.equal(turned[index].flip(2), crop) for crop in crops)


def test_a_shift_is_the_same_without_the_mirror() -> None:
    images, draws = torch.rand(8, 3, 10, 10), torch.Generator()
    none = torch.zeros(8, dtype=torch.bool)
    shifted = augment(images, mode="shift", generator=draws.manual_seed(3), mirrored=~none)
    plain = augment(images, mode="alternating", generator=draws.manual_seed(3), mirrored=none)
    assert torch.equal(shifted, plain)


def test_every_image_is_mirrored_in_every_other_epoch(few: ImageSet) -> None:
    mirrored = run_of(small(), few, recipe()).mirrored
    assert 0.3 < float(mirrored.double().mean()) < 0.7
    assert torch.equal(mirrored, run_of(small(), few, recipe()).mirrored)
    assert not torch.equal(mirrored, run_of(small(), few, recipe(seed=1)).mirrored)


def test_biases_of_normalisation_have_their_own_rate_and_the_same_decay(few: ImageSet) -> None:
    config = recipe()
    others, biases = run_of(small(), few, config).optimizers[0].param_groups
    assert len(biases["params"]) == 6 and biases["factor"] == 64
    decays = (group["weight_decay"] * group["factor"] for group in (others, biases))
    assert next(decays) == pytest.approx(next(decays))
    (single,) = run_of(small(), few, recipe(bias_lr=1)).optimizers[0].param_groups
    assert single["factor"] == 1


def test_the_rate_has_the_published_corners() -> None:
    config, total = TrainConfig.preset("airbench"), 1000
    rates = [learning_rate(config, step, total) / config.lr for step in (0, 230, 999)]
    assert rates == pytest.approx([0.2, 1.0, 0.07], abs=2e-3)


def test_the_average_is_the_recursion_written_out() -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    values, decay, mean = [2.0, 5.0, -1.0], 0.25, 1.0
    model.weight.data.fill_(mean)
    average = Average(model)
    for value in values:
        model.weight.data.fill_(value)
        average.update(model, decay=decay)
        mean = decay * mean + (1 - decay) * value
        assert model.weight.item() == pytest.approx(mean)
    model.weight.data.fill_(9.0)
    average.update(model, decay=1.0)
    assert model.weight.item() == pytest.approx(mean)
