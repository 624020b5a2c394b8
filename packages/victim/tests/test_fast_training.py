from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wm_inject import BadNetsTrigger
from wm_inject.core.plan import PoisonPlan
from wm_inject.core.precision import onednn_bfloat16
from wm_victim import (
    Dataset,
    ImageSet,
    TrainConfig,
    accuracy,
    attack_success,
    build_classifier,
    load_dataset,
    train_classifier,
)
from wm_victim.augment import augment
from wm_victim.image_store import ImageStore, pack, unpack
from wm_victim.models import Classifier
from wm_victim.train_config import learning_rate
from wm_victim.training_run import TrainingRun, training_forward

CPU = torch.device("cpu")
CUDA = torch.device("cuda")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="needs a torch with oneDNN"
)

needs_bfloat16 = pytest.mark.skipif(
    not onednn_bfloat16(), reason="needs a processor on which oneDNN convolves in bfloat16"
)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset("digits", image_size=16)


@pytest.fixture(scope="module")
def few(digits: Dataset) -> ImageSet:
    return digits.train.subset(torch.arange(200))


def small_net(name: str = "preactresnet10") -> Classifier:
    return build_classifier(name, num_classes=10, channels=1, image_size=16, width=8)


def recipe(**changes: Any) -> TrainConfig:
    usual: dict[str, Any] = {"epochs": 2, "batch_size": 64, "lr": 0.02, "augment": "crop"}
    return TrainConfig(**{**usual, **changes})


def train(model: nn.Module, data: ImageSet, config: TrainConfig, **more: Any) -> Any:
    return train_classifier(model, data, config=config, progress=False, **more)


def same(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def gradients(model: nn.Module, config: TrainConfig, data: ImageSet) -> tuple[Tensor, Tensor]:
    """One pass: the logits, and all gradients in one vector."""
    forward = training_forward(model.train(), config, CPU)
    logits = forward(data.images[:64])
    F.cross_entropy(logits, data.labels[:64]).backward()
    found = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    assert len(found) == len(list(model.parameters()))
    return logits.detach(), torch.cat(found)


def apart(first: Tensor, second: Tensor) -> float:
    return float((first - second).norm() / second.norm())


# The blocked layout


@needs_onednn
@pytest.mark.parametrize("name", ["resnet10", "preactresnet10"])
def test_the_blocked_layout_computes_the_same_network(name: str, few: ImageSet) -> None:
    exact, blocked = small_net(name).train().double(), small_net(name)
    truth = exact(few.images[:64].double())
    F.cross_entropy(truth, few.labels[:64]).backward()
    logits, found = gradients(blocked, recipe(precision="float32", layout="blocked"), few)
    slopes = [p.grad.flatten() for p in exact.parameters() if p.grad is not None]
    assert apart(logits, truth.detach()) < 1e-4
    # A ReLU whose input rounds to the other side of 0 has another slope: hence the wider bound.
    assert apart(found, torch.cat(slopes)) < 1e-2
    for (key, ours), theirs in zip(
        blocked.state_dict().items(), exact.state_dict().values(), strict=True
    ):
        assert torch.allclose(ours, theirs.to(ours.dtype), rtol=1e-4, atol=1e-6), key
    assert blocked.head.weight.dtype == torch.float32


@needs_bfloat16
def test_bfloat16_errs_no_more_in_the_blocked_layout_than_under_autocast(few: ImageSet) -> None:
    truth = gradients(small_net(), recipe(precision="float32"), few)
    found = [
        gradients(small_net(), recipe(precision="bfloat16", layout=layout), few)
        for layout in ("channels-last", "blocked")
    ]
    for place, whole in enumerate(truth):
        autocast, blocked = (apart(one[place], whole) for one in found)
        assert 0 < blocked < 1.5 * autocast


@pytest.mark.integration
@needs_onednn
def test_the_blocked_layout_learns_digits_and_the_backdoor(digits: Dataset) -> None:
    model, trigger = small_net("resnet10"), BadNetsTrigger(image_size=16, size=3)
    config = TrainConfig.preset("fast", epochs=5, layout="blocked")
    train(model, digits.train, config, plan=PoisonPlan(ratio=0.1, target=3), trigger=trigger)
    assert accuracy(model, digits.test) > 0.93
    assert attack_success(model, digits.test, trigger, target=3) > 0.9


@pytest.mark.integration
@needs_onednn
@pytest.mark.parametrize("precision", ["float32", pytest.param("bfloat16", marks=needs_bfloat16)])
def test_a_stopped_run_in_the_blocked_layout_goes_on_to_the_same_bits(
    few: ImageSet, tmp_path: Path, precision: str
) -> None:
    config = recipe(epochs=3, layout="blocked", precision=precision)

    class Stop(Exception):
        pass

    def stop(epoch: int, _model: nn.Module) -> None:
        if epoch == 2:
            raise Stop

    straight, resumed = small_net(), small_net()
    path = tmp_path / "run.safetensors"
    whole = train(straight, few, config)
    with pytest.raises(Stop):
        train(small_net(), few, config, checkpoint=path, watch=stop)
    with pytest.raises(ValueError, match="different: recipe"):
        train(small_net(), few, recipe(epochs=3, precision=precision), checkpoint=path)
    again = train(resumed, few, config, checkpoint=path)
    assert same(straight, resumed)
    assert again.to_dict() == whole.to_dict()


def test_the_blocked_layout_is_refused_where_it_cannot_be(
    few: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = recipe(layout="blocked")
    with pytest.raises(ValueError, match=r"expected a resnet or preactresnet .* got MnistNetBody"):
        train(small_net("wanet-mnist"), few, config)
    with pytest.raises(ValueError, match=r"expected a resnet or preactresnet .* got Linear"):
        training_forward(nn.Linear(2, 2), config, CPU)
    with pytest.raises(ValueError, match="expected the CPU with layout blocked, got cuda"):
        training_forward(small_net(), recipe(layout="blocked", precision="float32"), CUDA)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with pytest.raises(ValueError, match="expected a torch with oneDNN"):
        training_forward(small_net(), config, CPU)


# Where the images lie


def test_images_on_the_grid_are_packed_without_a_loss(few: ImageSet) -> None:
    every = torch.arange(256).float().div(255).view(1, 1, 16, 16)
    for images in (every, few.images):
        packed = pack(images)
        assert packed.dtype == torch.uint8
        assert torch.equal(unpack(packed), images)
    off = few.images.clone()
    off[-1, 0, 0, 0] = 0.3
    assert pack(off) is off
    assert unpack(off) is off


def test_batches_are_the_same_wherever_the_images_lie(
    few: ImageSet, subtests: pytest.Subtests
) -> None:
    for limit in [None, 0, 10**9]:
        with subtests.test(limit=limit):
            store, index = ImageStore(few, CPU, limit=limit), torch.tensor([5, 0, 199])
            images, labels = store.take(index)
            assert len(store) == len(few)
            assert store.resident == (limit != 0)
            assert torch.equal(images, few.images[index]) and torch.equal(labels, few.labels[index])
            if limit is None:
                assert store.images is few.images  # no copy on the CPU


def test_a_streamed_run_ends_with_the_same_bits(few: ImageSet) -> None:
    models = small_net(), small_net()
    for model, limit in zip(models, (None, 0), strict=True):
        train(model, few, recipe(epochs=1), resident_bytes=limit)
    assert same(*models)
    with pytest.raises(ValueError, match="limit of at least 0 bytes, got -1"):
        train(small_net(), few, recipe(), resident_bytes=-1)


# The recipe


def test_the_triangle_rises_for_five_epochs_of_24_and_falls_to_nothing() -> None:
    config, total = TrainConfig.preset("record"), 24 * 98
    rates = [learning_rate(config, step, total) for step in range(total)]
    top = max(range(total), key=rates.__getitem__)
    assert top == pytest.approx(5 * 98, abs=2)
    assert max(rates) == pytest.approx(0.4, rel=1e-2)
    assert 0 < rates[0] < 1e-3 and 0 < rates[-1] < 1e-3
    steps = [after - before for before, after in pairwise(rates)]
    assert steps[: top - 1] == pytest.approx([steps[0]] * (top - 1))
    assert steps[top + 1 :] == pytest.approx([steps[-1]] * (total - top - 2))
    for few in (1, 2, 3):
        assert all(0 < learning_rate(config, step, few) <= 0.4 for step in range(few))


def test_the_record_recipe_trains(few: ImageSet) -> None:
    config = TrainConfig.preset("record", epochs=2, batch_size=64, lr=0.05, label_smoothing=0.1)
    assert config.nesterov and config.cutout == 8
    history = train(small_net(), few, config)
    assert history.losses[1] < history.losses[0]


def test_cutout_blackens_one_square_inside_every_image() -> None:
    images, count, side = torch.ones(300, 3, 9, 7), 300, 4
    out = augment(images, mode="none", generator=torch.Generator().manual_seed(1), cutout=side)
    assert torch.equal(images, torch.ones_like(images))
    assert torch.equal(out[:, 0], out[:, 2])
    holes = out[:, 0] == 0
    assert bool((holes.sum((1, 2)) == side**2).all())
    assert bool((holes.any(2).sum(1) == side).all() and (holes.any(1).sum(1) == side).all())
    tops, lefts = holes.any(2).int().argmax(1), holes.any(1).int().argmax(1)
    assert set(tops.tolist()) == set(range(9 - side + 1))
    assert set(lefts.tolist()) == set(range(7 - side + 1))
    again = augment(images, mode="none", generator=torch.Generator().manual_seed(1), cutout=side)
    assert torch.equal(out, again) and len(out) == count


def test_cutout_comes_after_the_other_draws() -> None:
    images = torch.rand(8, 1, 12, 12)
    plain, cut = (
        augment(images, mode="crop-flip", generator=torch.Generator().manual_seed(2), cutout=c)
        for c in (0, 3)
    )
    assert torch.equal(cut, torch.where(cut == 0, cut, plain))


def test_label_smoothing_is_torchs(few: ImageSet) -> None:
    data = few.subset(torch.arange(64))
    config = recipe(epochs=1, augment="none", label_smoothing=0.2, precision="float32")
    model = small_net()
    expected = F.cross_entropy(
        small_net().train()(data.images), data.labels, label_smoothing=0.2
    ).item()
    assert train(model, data, config).losses[0] == pytest.approx(expected, rel=1e-4)


def test_settings_out_of_range_are_refused(subtests: pytest.Subtests) -> None:
    for changes, message in [
        ({"label_smoothing": 1.0}, "label_smoothing in"),
        ({"cutout": -1}, "cutout"),
        ({"layout": "NCHW"}, "layout in channels-last, blocked, got 'NCHW'"),
        ({"schedule": "step"}, "triangular"),
    ]:
        with (
            subtests.test(changes=changes, message=message),
            pytest.raises(ValueError, match=message),
        ):
            TrainConfig(**changes)


def test_what_the_data_or_the_device_does_not_allow_is_refused(few: ImageSet) -> None:
    with pytest.raises(ValueError, match="cutout of at most 16 pixels, got 17"):
        train(small_net(), few, recipe(cutout=17))
    with pytest.raises(ValueError, match="cutout of at most 4 pixels, got 5"):
        augment(torch.rand(2, 1, 4, 4), mode="none", generator=torch.Generator(), cutout=5)
    with pytest.raises(ValueError, match="expected a CUDA device with compile, got cpu"):
        train(small_net(), few, recipe(compile=True))


# On a GPU


@needs_cuda
def test_training_on_a_gpu(digits: Dataset, subtests: pytest.Subtests) -> None:
    for limit in [None, 0]:
        for compiled in [False, True]:
            with subtests.test(limit=limit, compiled=compiled):
                model, config = small_net(), recipe(epochs=4, augment="crop", compile=compiled)
                run = TrainingRun(model.to(CUDA), digits.train, config, None, CUDA, limit=limit)
                assert run.data.resident == (limit is None)
                assert run.data.images.dtype == torch.uint8
                assert run.data.images.is_cuda == (limit is None)
                history = train(model, digits.train, config, device=CUDA, resident_bytes=limit)
                assert history.losses[-1] < history.losses[0]
                assert accuracy(model, digits.test) > 0.8


@needs_cuda
def test_batches_and_augmentation_are_the_same_on_a_gpu(few: ImageSet) -> None:
    index = torch.arange(50)
    out = [
        augment(
            ImageStore(few, device).take(index)[0],
            mode="crop-flip",
            generator=torch.Generator().manual_seed(3),
            cutout=4,
        ).cpu()
        for device in (CPU, CUDA)
    ]
    assert torch.equal(*out)
