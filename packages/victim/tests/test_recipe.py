import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, OneCycleLR

from wm_victim import TrainConfig
from wm_victim.augment import PADDING, augment
from wm_victim.train_config import learning_rate


def torch_rates(scheduler: str, lr: float, total: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    schedule: LRScheduler
    if scheduler == "cosine":
        schedule = CosineAnnealingLR(optimizer, total)
    else:
        schedule = OneCycleLR(optimizer, lr, total, pct_start=0.1, cycle_momentum=False)
    rates = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the optimiser never steps here
        for _ in range(total):
            rates.append(optimizer.param_groups[0]["lr"])
            schedule.step() if len(rates) < total else None
    return rates


def test_rates_are_those_of_torchs_schedulers(subtests: pytest.Subtests) -> None:
    for schedule in ["cosine", "onecycle"]:
        for total in [50, 1000]:
            with subtests.test(schedule=schedule, total=total):
                config = TrainConfig(schedule=schedule, lr=0.3)  # type: ignore[arg-type]
                ours = [learning_rate(config, step, total) for step in range(total)]
                assert ours == pytest.approx(torch_rates(schedule, 0.3, total), rel=1e-6, abs=1e-9)


def test_rates_stay_in_range_however_short_the_run() -> None:
    for schedule in ("cosine", "onecycle", "constant"):
        for total in (1, 2, 3, 7):
            rates = [
                learning_rate(TrainConfig(schedule=schedule, lr=0.3), step, total)  # type: ignore[arg-type]
                for step in range(total)
            ]
            assert all(0 < rate <= 0.3 and math.isfinite(rate) for rate in rates)
    assert learning_rate(TrainConfig(schedule="constant", lr=0.3), 5, 9) == 0.3


def test_a_step_outside_the_run_is_refused() -> None:
    for step, total in ((-1, 4), (4, 4), (0, 0)):
        with pytest.raises(ValueError, match="expected a step"):
            learning_rate(TrainConfig(), step, total)


def test_settings_out_of_range_are_refused(subtests: pytest.Subtests) -> None:
    for changes, message in [
        ({"epochs": 0}, "epochs"),
        ({"batch_size": 1}, "batch_size"),
        ({"lr": 0.0}, "lr > 0"),
        ({"lr": math.nan}, "lr > 0"),
        ({"momentum": 1.0}, "momentum in"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"nesterov": True, "momentum": 0.0}, "nesterov"),
        ({"schedule": "step"}, "schedule in"),
        ({"augment": "flip"}, "augment in"),
        ({"precision": "float16"}, "precision in"),
        ({"seed": -1}, "seed in"),
    ]:
        with (
            subtests.test(changes=changes, message=message),
            pytest.raises(ValueError, match=message),
        ):
            TrainConfig(**changes)  # type: ignore[arg-type]


def test_presets_can_be_changed() -> None:
    paper = TrainConfig.preset("paper")
    assert (paper.epochs, paper.lr, paper.momentum, paper.schedule) == (100, 0.1, 0.9, "cosine")
    assert TrainConfig.preset("fast", epochs=2).epochs == 2
    assert TrainConfig.preset("mnist").augment == "none"
    with pytest.raises(ValueError, match="paper, fast, mnist"):
        TrainConfig.preset("slow")  # type: ignore[arg-type]


def slow_augment(images: torch.Tensor, *, flip: bool, generator: torch.Generator) -> torch.Tensor:
    """The same draws, but one image at a time with plain slices."""
    count, _, height, width = images.shape
    offsets = torch.randint(0, 2 * PADDING + 1, (2, count, 1), generator=generator)
    flipped = torch.rand((count, 1), generator=generator) < 0.5
    out = []
    for image, top, left, mirrored in zip(images, *offsets, flipped, strict=True):
        padded = F.pad(image, [PADDING] * 4)
        crop = padded[:, int(top) : int(top) + height, int(left) : int(left) + width]
        out.append(crop.flip(2) if flip and mirrored else crop)
    return torch.stack(out)


def test_one_gather_equals_a_loop_of_crops(subtests: pytest.Subtests) -> None:
    for mode in ["crop", "crop-flip"]:
        for shape in [(17, 3, 9, 9), (5, 1, 12, 6)]:
            with subtests.test(mode=mode, shape=shape):
                images = torch.rand(shape)
                fast = augment(images, mode=mode, generator=torch.Generator().manual_seed(5))  # type: ignore[arg-type]
                generator = torch.Generator().manual_seed(5)
                assert torch.equal(
                    fast, slow_augment(images, flip=mode == "crop-flip", generator=generator)
                )
                assert fast.is_contiguous(memory_format=torch.channels_last)


def test_no_augmentation_is_no_copy_and_other_modes_are_refused() -> None:
    images = torch.rand(2, 1, 4, 4)
    assert augment(images, mode="none", generator=torch.Generator()) is images
    with pytest.raises(ValueError, match="crop-flip"):
        augment(images, mode="flip", generator=torch.Generator())  # type: ignore[arg-type]
