import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from wm_inject import BadNetsTrigger, WaNetTrigger
from wm_inject.core.plan import PoisonPlan
from wm_victim import (
    Dataset,
    ImageSet,
    TrainConfig,
    accuracy,
    attack_success,
    build_classifier,
    load_dataset,
    predict,
    train_classifier,
)
from wm_victim.models import Classifier

QUICK = TrainConfig(epochs=4, batch_size=64, lr=0.02, precision="float32", seed=1)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset("digits", image_size=16)


@pytest.fixture(scope="module")
def few(digits: Dataset) -> ImageSet:
    return digits.train.subset(torch.arange(300))


def small_net(name: str = "resnet10") -> Classifier:
    return build_classifier(name, num_classes=10, channels=1, image_size=16, width=8)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def train(model: nn.Module, data: ImageSet, config: TrainConfig = QUICK, **settings: Any) -> Any:
    return train_classifier(model, data, config=config, progress=False, **settings)


class Counting:
    """A co-trained attack with a state: it darkens by a running count and moves one tensor."""

    def __init__(self) -> None:
        self.calls = 0
        self.memory = torch.zeros(3)

    def transform(
        self, images: Tensor, labels: Tensor, *, model: nn.Module, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        assert model.training
        self.calls += 1
        self.memory += torch.rand(3, generator=generator)
        return images * (1 - self.calls % 7 / 20), labels

    def state_dict(self) -> dict[str, Any]:
        return {"calls": self.calls, "nested": {0: [self.memory, None, (True, 0.5)]}}

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        self.calls = state["calls"]
        self.memory, nothing, rest = state["nested"][0]
        assert nothing is None and rest == (True, 0.5)


class Stop(Exception):
    pass


def stop_in_epoch(number: int) -> Any:
    def on_epoch(epoch: int, _model: nn.Module) -> None:
        if epoch == number:
            raise Stop

    return on_epoch


@pytest.mark.integration
def test_a_narrow_net_learns_real_digits_and_the_backdoor(digits: Dataset) -> None:
    model, trigger = small_net(), BadNetsTrigger(image_size=16, size=3)
    config = TrainConfig.preset("fast", epochs=5)
    plan = PoisonPlan(ratio=0.1, target=3)
    history = train(model, digits.train, config, plan=plan, trigger=trigger)
    assert len(history.losses) == len(history.accuracies) == len(history.seconds) == 5
    assert history.losses[-1] < history.losses[0] / 3
    assert accuracy(model, digits.test) > 0.93
    assert attack_success(model, digits.test, trigger, target=3) > 0.9
    assert not model.training
    assert "seconds" not in history.to_dict()


@pytest.mark.integration
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_it_overfits_64_images(digits: Dataset, precision: str) -> None:
    model, data = small_net(), digits.train.subset(torch.arange(64))
    config = TrainConfig(
        epochs=40,
        batch_size=32,
        lr=0.03,
        weight_decay=0.0,
        precision=precision,  # type: ignore[arg-type]
    )
    train(model, data, config)
    assert accuracy(model, data) == 1.0
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_same_seed_gives_the_same_bits(few: ImageSet, precision: str) -> None:
    config = TrainConfig(epochs=2, batch_size=64, lr=0.02, augment="crop", precision=precision)  # type: ignore[arg-type]
    runs = []
    for disturbance in (0, 99):
        torch.manual_seed(disturbance)  # the global state must not matter
        before = torch.get_rng_state()
        model = small_net("wanet-mnist")
        train(model, few, config)
        assert torch.equal(torch.get_rng_state(), before)
        runs.append(weights(model))
    assert same(*runs)
    other = small_net("wanet-mnist")
    train(other, few, TrainConfig(**{**vars(config), "seed": 5}))
    assert not same(weights(other), runs[0])


@pytest.mark.integration
@pytest.mark.parametrize(
    ("net", "augment", "hooked"),
    [("resnet10", "crop-flip", False), ("wanet-mnist", "crop", False), ("resnet10", "none", True)],
)
def test_a_stopped_run_goes_on_to_the_same_bits(
    few: ImageSet, tmp_path: Path, net: str, augment: str, hooked: bool
) -> None:
    config = TrainConfig(
        **{**vars(QUICK), "augment": augment, "schedule": "onecycle", "precision": "auto"}
    )

    def hook() -> Counting | None:
        return Counting() if hooked else None

    straight, resumed = small_net(net), small_net(net)
    whole = train(straight, few, config, hook=hook())
    path = tmp_path / "run.safetensors"
    with pytest.raises(Stop):
        train(small_net(net), few, config, hook=hook(), checkpoint=path, watch=stop_in_epoch(3))
    nn.init.zeros_(resumed.head.weight)  # what it starts from must not matter
    epochs: list[int] = []
    later = train(
        resumed, few, config, hook=hook(), checkpoint=path, watch=lambda e, _: epochs.append(e)
    )
    assert epochs == [3, 4]
    assert same(weights(straight), weights(resumed))
    assert later.to_dict() == whole.to_dict()
    assert [second > 0 for second in later.seconds] == [False, False, True, True]


def test_checkpoints_repeat_to_the_byte(few: ImageSet, tmp_path: Path) -> None:
    for name in ("a", "b"):
        train(small_net(), few, checkpoint=tmp_path / f"{name}.safetensors")
    first, second = (tmp_path / f"{name}.safetensors" for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()


def test_a_finished_run_is_not_run_again(few: ImageSet, tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    first = small_net()
    history = train(first, few, checkpoint=path)
    again = small_net()
    loaded = train(again, few, checkpoint=path, watch=stop_in_epoch(4))
    assert loaded.to_dict() == history.to_dict()
    assert loaded.seconds == (0.0,) * 4
    assert same(weights(first), weights(again))


def test_a_checkpoint_of_another_run_is_refused(few: ImageSet, tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    train(small_net(), few, TrainConfig(epochs=1), checkpoint=path)
    with pytest.raises(ValueError, match=r"another run \(different: recipe"):
        train(small_net(), few, TrainConfig(epochs=2), checkpoint=path)
    with pytest.raises(ValueError, match="different: model"):
        train(small_net("wanet-mnist"), few, TrainConfig(epochs=1), checkpoint=path)
    with pytest.raises(ValueError, match="different: data"):
        data = few.subset(torch.arange(200))
        train(small_net(), data, TrainConfig(epochs=1), checkpoint=path)
    with pytest.raises(ValueError, match="different: hook"):
        train(small_net(), few, TrainConfig(epochs=1), checkpoint=path, hook=Counting())
    path.write_bytes(b"half a file")
    with pytest.raises(ValueError, match="not one"):
        train(small_net(), few, TrainConfig(epochs=1), checkpoint=path)


def test_a_hook_sees_every_batch_and_wanets_noise_mode_runs(few: ImageSet) -> None:
    hook = Counting()
    train(small_net(), few, hook=hook)
    assert hook.calls == 4 * 5  # 300 images in batches of 64
    plan = PoisonPlan(ratio=0.1, mode="per_batch")
    noise = WaNetTrigger(image_size=16).noise_hook(plan, num_classes=10)
    train(small_net(), few, TrainConfig(epochs=1, lr=0.02), hook=noise)


def test_a_remainder_of_one_image_is_left_out(few: ImageSet) -> None:
    hook = Counting()
    train(
        small_net(), few.subset(torch.arange(65)), TrainConfig(epochs=1, batch_size=64), hook=hook
    )
    assert hook.calls == 1


def test_poisoned_images_are_spread_over_the_first_epoch(few: ImageSet) -> None:
    # The plan and the trainer share a seed by default: their draws must not be the same.
    config, plan = TrainConfig(epochs=1, batch_size=30), PoisonPlan(ratio=0.1)
    marked = plan.choose(few.labels)
    counts: list[int] = []

    class Watch(Counting):
        def transform(self, images: Tensor, labels: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
            counts.append(int(images[:, 0, 0, 0].sum()))
            return images, labels

    images = torch.where(marked.view(-1, 1, 1, 1), torch.ones(()), torch.zeros(())).expand(
        -1, 1, 16, 16
    )
    train(small_net(), ImageSet(images.clone(), few.labels, few.ids), config, hook=Watch())
    assert sum(counts) == 30
    assert max(counts) <= 10


def test_a_hook_beside_a_plan_gets_batches_of_the_poisoned_data(few: ImageSet) -> None:
    seen: list[int] = []

    class Watch(Counting):
        def transform(self, images: Tensor, labels: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
            white = (images == 1).flatten(1).all(1)
            assert bool((labels[white] == 3).all())
            seen.append(int(white.sum()))
            return images, labels

    def white(images: Tensor, **_: Any) -> Tensor:
        return torch.ones_like(images)

    plan = PoisonPlan(ratio=0.1, target=3)
    config = TrainConfig(epochs=1, batch_size=30)
    train(small_net(), few, config, plan=plan, trigger=white, hook=Watch())
    assert sum(seen) == 30


def test_bad_training_is_refused(few: ImageSet) -> None:
    trigger, plan = BadNetsTrigger(image_size=16), PoisonPlan()
    fewer = build_classifier("resnet10", num_classes=9, channels=1, image_size=16, width=8)
    with pytest.raises(ValueError, match="labels in 0"):
        train(fewer, few)
    with pytest.raises(ValueError, match="plan and a trigger together"):
        train(small_net(), few, plan=plan)
    with pytest.raises(ValueError, match="plan and a trigger together"):
        train(small_net(), few, trigger=trigger)
    with pytest.raises(ValueError, match="static one"):
        train(small_net(), few, plan=PoisonPlan(mode="per_batch"), trigger=trigger)


def test_a_diverging_run_says_so_and_keeps_its_checkpoint(few: ImageSet, tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    with pytest.raises(RuntimeError, match=r"the loss became .* in epoch 1: try a lower"):
        config = TrainConfig(epochs=1, lr=1e30, schedule="constant", precision="float32")
        train(small_net(), few, config, checkpoint=path)
    assert not path.exists()


class Odd(nn.Module):
    """Logits from the sum of an image: its mode, and what it saw, can be looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Dropout(0.5)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        total = self.inner(images.sum((1, 2, 3)) * self.scale)
        return torch.stack([total, 2 - total], dim=1)


def test_predictions_are_those_of_eval_mode_and_the_mode_comes_back() -> None:
    model = Odd()
    model.inner.eval()
    images = torch.rand(7, 1, 4, 4)
    logits = predict(model, images, batch_size=3)
    assert torch.allclose(logits[:, 0], images.sum((1, 2, 3)))
    assert model.training and not model.inner.training
    assert logits.grad_fn is None


def test_accuracy_and_attack_success_count_what_they_say() -> None:
    # An image of sum above 1 is class 0. The trigger adds a bright patch of 4 pixels.
    sums = torch.tensor([0.0, 0.5, 1.5, 2.0, 0.0, 3.0])
    images = (sums / 16).view(-1, 1, 1, 1).expand(-1, 1, 4, 4).clone()
    labels = torch.tensor([1, 0, 0, 0, 1, 1])
    data = ImageSet(images, labels, torch.arange(6))
    model = Odd()
    assert accuracy(model, data) == pytest.approx(4 / 6)
    patch = BadNetsTrigger(image_size=4, size=2)
    assert attack_success(model, data, patch, target=0) == 1.0
    dark = BadNetsTrigger(image_size=4, size=4, value=0.0)
    assert attack_success(model, data, dark, target=0, batch_size=2) == 0.0
    with pytest.raises(ValueError, match="other classes"):
        attack_success(model, data.subset(labels == 0), patch, target=0)
    with pytest.raises(ValueError, match="target label"):
        attack_success(model, data, patch, target=-1)


def test_predictions_of_nonsense_are_refused() -> None:
    model = Odd()
    for bad in (torch.rand(1, 4, 4), torch.rand(0, 1, 4, 4), torch.rand(2, 1, 4, 4) - 1):
        with pytest.raises(ValueError, match="expected"):
            predict(model, bad)
    with pytest.raises(ValueError, match="batch size"):
        predict(model, torch.rand(1, 1, 4, 4), batch_size=0)
    with pytest.raises(ValueError, match="logits of shape"):
        predict(nn.Identity(), torch.rand(1, 1, 4, 4))


@pytest.mark.slow
def test_a_killed_process_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    script = textwrap.dedent("""
        import sys, torch
        from pathlib import Path
        from wm_victim import *
        path = Path(sys.argv[1])
        data = load_dataset("digits", image_size=16)
        model = build_classifier("resnet10", num_classes=10, channels=1, image_size=16, width=8)
        config = TrainConfig(epochs=8, batch_size=32, lr=0.02, augment="crop", seed=2)
        train_classifier(model, data.train, config=config, checkpoint=path)
        save_classifier(model, path.with_name(path.stem + "-model.safetensors"))
    """)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = tmp_path / "killed.safetensors"
    command = [sys.executable, "-c", script]
    process = subprocess.Popen([*command, str(killed)], env=environment)
    deadline = time.monotonic() + 120
    while not killed.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert killed.exists()
    for path in (killed, tmp_path / "straight.safetensors"):
        subprocess.run([*command, str(path)], env=environment, check=True)
    first, second = (tmp_path / f"{n}-model.safetensors" for n in ("killed", "straight"))
    assert first.read_bytes() == second.read_bytes()
