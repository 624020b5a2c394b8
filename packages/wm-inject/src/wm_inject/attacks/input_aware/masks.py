"""Phase A: the masks, from clean images alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wm_inject.attacks.common import check_batch
from wm_inject.attacks.cotraining import channels_last, in_mode, load_optimizer, load_weights
from wm_inject.attacks.input_aware.trigger import InputAwareTrigger
from wm_inject.core.presets import preset_of
from wm_inject.core.progress import Progress
from wm_inject.core.progress import progress as show_progress
from wm_inject.core.randomness import derive_seed
from wm_inject.core.resume import fingerprint, load_state, save_state

BETAS = (0.5, 0.9)  # of Adam, in both phases
_MASK_MILESTONES = (10 / 25, 20 / 25)  # shares of phase A after which its rate falls to a tenth
_KIND = "input-aware-masks"
_SAVE_EVERY, _LOG_EVERY = 100, 50  # steps
_TINY = 1e-8  # inside the roots: images that differ by less than 1e-4 count as one


@dataclass(frozen=True)
class InputAwareConfig:
    """How masks (phase A) and patterns (phase B) are fitted.

    Args:
        mask_steps: Steps of phase A.
        batch_size: Pairs of images a step of phase A, at least 2.
        mask_lr: Learning rate of Adam in phase A; a tenth after 2/5 and 4/5 of the steps.
        lr: Learning rate of Adam for the patterns in phase B.
        total_steps: Steps of phase B, if its rate is to fall to a tenth after 1/3, 1/2, 2/3 and 5/6
            of them as published; the rate is constant if None.
        lambda_div: Weight of diversity: different images must differ in masks and in patterns.
        lambda_norm: Weight of the masks' values above the trigger's density.
    """

    mask_steps: int = 9775
    batch_size: int = 128
    mask_lr: float = 1e-2
    lr: float = 1e-2
    total_steps: int | None = None
    lambda_div: float = 1.0
    lambda_norm: float = 100.0

    def __post_init__(self) -> None:
        if self.mask_steps < 1 or (self.total_steps is not None and self.total_steps < 1):
            got = f"{self.mask_steps} and {self.total_steps}"
            raise ValueError(f"expected at least 1 step of either phase, got {got}")
        if self.batch_size < 2:
            raise ValueError(f"expected batches of at least 2 pairs, got {self.batch_size}")
        for name in ("mask_lr", "lr"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"expected {name} above 0, got {getattr(self, name)}")
        for name in ("lambda_div", "lambda_norm"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"expected {name} >= 0, got {getattr(self, name)}")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> InputAwareConfig:
        """Named settings, with changes; "small" and "tiny" are ours."""
        return preset_of(cls, _PRESETS, name, **changes)


_PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"mask_steps": 30, "batch_size": 8},
    "small": {"mask_steps": 200, "batch_size": 32, "lr": 1e-3},
    "paper": {},  # 25 epochs of 50,000 images for the masks
}


def fit_masks(
    trigger: InputAwareTrigger,
    images: Tensor,
    *,
    config: InputAwareConfig,
    seed: int = 0,
    checkpoint: Path | None = None,
    progress: bool = True,
) -> list[dict[str, float]]:
    """Fit where the triggers lie (phase A), in place: no labels, no victim.

    Masks of two batches in independent orders shall differ as their images do, and cost what they
    exceed the trigger's density by.

    Args:
        trigger: On the images' device; only its masks are fitted.
        images: At least 2.

    Returns:
        For every 50th step and the last: ``step``, ``loss``, ``diversity`` (the ratio of distances)
        and ``density`` (the mean of the masks).

    Raises:
        ValueError: Images that do not fit the trigger, fewer than 2, or another run's checkpoint.
        RuntimeError: The loss is no longer finite.

    Source: Nguyen & Tran (NeurIPS 2020). Ours: the small constant inside the roots, and distances
    of images in [0, 1] (there: normalised; 4, 2, 1 times ours on CIFAR-10, MNIST and GTSRB).
    """
    check_batch(images, trigger.config)
    if len(images) < 2:
        raise ValueError(f"expected at least 2 images to tell apart, got {len(images)}")
    net = trigger.eval().mask_net
    optimizer = torch.optim.Adam(net.parameters(), lr=config.mask_lr, betas=BETAS)
    run = {
        **asdict(config),
        "trigger": trigger.config,
        "seed": seed,
        "images": fingerprint(images),
    }
    start, history = 0, []
    if checkpoint is not None and (saved := load_state(checkpoint, kind=_KIND, run=run)):
        start, history = saved["step"], saved["history"]
        load_weights(net, saved["mask_net"])
        load_optimizer(optimizer, saved["optimizer"])
    pairs = _pairs(len(images), config.batch_size, seed=seed, start=start)
    bar: Progress[None]
    with (
        show_progress(total=config.mask_steps, desc="fit masks", enabled=progress) as bar,
        in_mode(net, training=True),
        torch.enable_grad(),
    ):
        bar.update(start)
        for step in range(start, config.mask_steps):
            set_rate(optimizer, config.mask_lr, step, config.mask_steps, _MASK_MILESTONES)
            first, second = (channels_last(images[p.to(images.device)]) for p in next(pairs))
            row = _mask_step(trigger, optimizer, first, second, config)
            last = step + 1 == config.mask_steps
            if last or (step + 1) % _LOG_EVERY == 0:
                history.append({"step": step + 1, **{name: float(v) for name, v in row.items()}})
                _check_finite(history[-1], step)
                bar.set_postfix(loss=history[-1]["loss"], density=history[-1]["density"])
            if checkpoint is not None and (last or (step + 1) % _SAVE_EVERY == 0):
                state = {
                    "step": step + 1,
                    "history": history,
                    "mask_net": net.state_dict(),
                    "optimizer": optimizer.state_dict(),
                }
                save_state(checkpoint, state, kind=_KIND, run=run)
            bar.update()
    return history


def diversity(images: tuple[Tensor, Tensor], outputs: tuple[Tensor, Tensor]) -> Tensor:
    """Mean over pairs of the RMS distance of two images over that of their outputs: a scalar.

    It and its gradient stay finite where two images or two outputs are the same.
    """
    near, far = (_rms(a - b) for a, b in (outputs, images))
    return (far / (near + 1e-7)).mean()


def _rms(difference: Tensor) -> Tensor:
    # The root's slope at zero is infinite.
    return (difference.square().mean(dim=(1, 2, 3)) + _TINY).sqrt()


def set_rate(
    optimizer: torch.optim.Optimizer, lr: float, step: int, total: int, shares: tuple[float, ...]
) -> None:
    """Set the learning rate of a step: a tenth of ``lr`` for every share that has passed."""
    passed = sum(step >= share * total for share in shares)
    for group in optimizer.param_groups:
        group["lr"] = lr * 0.1**passed


def _mask_step(
    trigger: InputAwareTrigger,
    optimizer: torch.optim.Adam,
    first: Tensor,
    second: Tensor,
    config: InputAwareConfig,
) -> dict[str, Tensor]:
    optimizer.zero_grad(set_to_none=True)
    masks = trigger.mask(torch.cat([first, second]))
    spread = diversity((first, second), (masks[: len(first)], masks[len(first) :]))
    excess = F.relu(masks - trigger.config["density"]).mean()
    loss = config.lambda_div * spread + config.lambda_norm * excess
    loss.backward()
    optimizer.step()
    row = {"loss": loss, "diversity": spread, "density": masks.mean()}
    return {name: value.detach() for name, value in row.items()}


def _pairs(count: int, batch: int, *, seed: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Two batches of row numbers a step, from two orders drawn anew every epoch."""
    # They depend on seed and step alone: a resumed run has no generator to restore.
    batch = min(batch, count)
    steps = count // batch
    epoch, place = divmod(start, steps)
    while True:
        generator = torch.Generator().manual_seed(derive_seed("masks", seed, epoch))
        orders = [torch.randperm(count, generator=generator) for _ in range(2)]
        for step in range(place, steps):
            first, second = (order[step * batch : (step + 1) * batch] for order in orders)
            yield first, second
        epoch, place = epoch + 1, 0


def _check_finite(row: dict[str, float], step: int) -> None:
    if not all(abs(value) < float("inf") for value in row.values()):
        raise RuntimeError(f"the loss is not finite at step {step + 1}: lower mask_lr")
