"""Trigger inversion: the smallest patch that sends images of every other class to one label."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from wm_inject.cli_common import progress as show_progress
from wm_inject.images import check_images, check_labels

from defense_nc.schedule import CostSchedule, NCConfig

# tanh / (2 - epsilon) + 1/2, as in the original; the PyTorch ports have 2 + epsilon.
_EPSILON = 1e-7


class InvertedTrigger(nn.Module):
    """A reversed trigger, and itself a Trigger: ``(1 - mask) * images + mask * pattern``.

    Args:
        mask: ``(1, H, W)`` in [0, 1].
        pattern: ``(C, H, W)`` in [0, 1].
        target: The label it was made for.
        success_rate: Share of other classes' clean images that it sends to the label.
        steps: Steps of the schedule that it took.
    """

    kind = "nc"
    mask: Tensor
    pattern: Tensor

    def __init__(
        self,
        mask: Tensor,
        pattern: Tensor,
        *,
        target: int = 0,
        success_rate: float = 0.0,
        steps: int = 0,
    ) -> None:
        super().__init__()
        check_images(pattern[None] if pattern.ndim == 3 else pattern, name="pattern")
        if mask.shape != (1, *pattern.shape[1:]) or not bool(((mask >= 0) & (mask <= 1)).all()):
            raise ValueError(f"expected a mask (1, H, W) in [0, 1], got {tuple(mask.shape)}")
        self.register_buffer("mask", mask)
        self.register_buffer("pattern", pattern)
        self.target, self.success_rate, self.steps = target, success_rate, steps

    @property
    def l1_norm(self) -> float:
        """Sum of the mask, counted once per pixel."""
        return float(self.mask.sum())

    @property
    def config(self) -> dict[str, Any]:
        """What this trigger is, ready for JSON."""
        return {
            "shape": list(self.pattern.shape),
            "target": self.target,
            "success_rate": self.success_rate,
            "steps": self.steps,
        }

    def forward(
        self, images: Tensor, *, ids: Tensor | None = None, target: Tensor | None = None
    ) -> Tensor:
        """Triggered images, the same shape, in [0, 1]; ``ids`` and ``target`` change nothing.

        Raises:
            ValueError: Images that break the image contract or have another shape.
        """
        channels, height, width = self.pattern.shape
        check_images(images, channels=channels, size=(height, width))
        return compose(images, self.mask, self.pattern).clamp(0, 1)


class _Candidate(NamedTuple):
    norm: float
    mask: Tensor
    pattern: Tensor


def invert_trigger(
    model: nn.Module,
    images: Tensor,
    target: int,
    *,
    config: NCConfig | None = None,
    labels: Tensor | None = None,
    seed: int = 0,
    progress: bool = False,
) -> InvertedTrigger:
    """Find the smallest mask and pattern that send images of other classes to ``target``.

    Args:
        model: Images in [0, 1] to logits ``(N, K)``; used in eval mode, given back as it came.
        images: Clean float32 ``(N, C, H, W)`` in [0, 1], on the model's device.
        target: The label to reach.
        config: Settings; the preset "robust" if None.
        labels: int64 ``(N,)``: the true classes, or the model's own answers if None. Images of the
            target class are left out: they would count as successes of any trigger.
        seed: Seeds the start and the order of the images; every label starts from the same mask.
        progress: Show how far it is.

    Returns:
        The trigger with the smallest norm among the steps that succeeded, or the last one if none
        did, with its success rate on all the images used.

    Raises:
        ValueError: Bad images or labels, a target that the model does not have, or no image of
            another class.

    Source: Neural Cleanse, equation 3 and released code. There images of the target class are not
        left out.
    """
    config = NCConfig() if config is None else config
    check_images(images)
    with frozen(model):
        answers = predict_in_batches(model, images[:1] if labels is not None else images)
        if not 0 <= target < answers.shape[1]:
            raise ValueError(f"expected a target in 0 .. {answers.shape[1] - 1}, got {target}")
        if labels is None:
            labels = answers.argmax(1)
        check_labels(labels, len(images), num_classes=answers.shape[1])
        images = images[labels.to(images.device) != target]
        if len(images) == 0:
            raise ValueError(f"expected images of other classes than {target}, found none")
        mask, pattern, steps = _search(
            model, images, target, config=config, seed=seed, progress=progress
        )
        hits = predict_in_batches(model, compose(images, mask, pattern).clamp(0, 1)).argmax(1)
    success = float((hits == target).double().mean())
    return InvertedTrigger(mask, pattern, target=target, success_rate=success, steps=steps)


def _search(
    model: nn.Module,
    images: Tensor,
    target: int,
    *,
    config: NCConfig,
    seed: int,
    progress: bool,
) -> tuple[Tensor, Tensor, int]:
    """The best mask ``(1, H, W)`` and pattern ``(C, H, W)``, and how many steps were taken."""
    generator = torch.Generator().manual_seed(seed)
    free = [_start(config, shape, generator) for shape in _shapes(images)]
    theta_mask, theta_pattern = (theta.to(images.device).requires_grad_() for theta in free)
    optimizer = torch.optim.Adam([theta_mask, theta_pattern], lr=config.lr, betas=config.betas)
    schedule = CostSchedule(config)
    batches = _batches(len(images), config.batch_size, generator)
    best: _Candidate | None = None
    step = 0
    with show_progress(total=config.steps, desc=f"label {target}", enabled=progress) as bar:
        while step < config.steps and not schedule.stop:
            step += 1
            success = torch.zeros((), device=images.device)
            for _ in range(config.batches):
                index = next(batches).to(images.device)
                mask, pattern = _squash(theta_mask), _squash(theta_pattern)
                logits = model(compose(images[index], mask, pattern))
                goal = torch.full((len(index),), target, device=images.device)
                loss = F.cross_entropy(logits, goal) + schedule.cost * mask.sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                success += (logits.detach().argmax(1) == target).float().mean()
            average = min(1.0, float(success) / config.batches)
            found = _candidate(theta_mask, theta_pattern)
            if average >= config.threshold and (best is None or found.norm < best.norm):
                best = found
            schedule.update(average, best.norm if best else float("inf"))
            bar.update()
            bar.set_postfix(success=average, norm=found.norm, cost=schedule.cost)
    chosen = best or _candidate(theta_mask, theta_pattern)
    return chosen.mask, chosen.pattern, step


def compose(images: Tensor, mask: Tensor, pattern: Tensor) -> Tensor:
    """Put a masked pattern ``(C, H, W)`` into images ``(N, C, H, W)``, in the pixel domain."""
    return images + mask * (pattern - images)


def _shapes(images: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    channels, height, width = images.shape[1:]
    return (1, height, width), (channels, height, width)


def _start(config: NCConfig, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if config.start == "ones":
        return torch.ones(shape)
    # In double precision the ends of the range stay finite.
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
    return torch.atanh((uniform - 0.5) * (2 - _EPSILON)).float()


def _squash(theta: Tensor) -> Tensor:
    return torch.tanh(theta) / (2 - _EPSILON) + 0.5


def _candidate(theta_mask: Tensor, theta_pattern: Tensor) -> _Candidate:
    mask, pattern = (_squash(t.detach()).clamp(0, 1) for t in (theta_mask, theta_pattern))
    return _Candidate(float(mask.sum()), mask, pattern)


def _batches(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Index batches without end: every image once before any image again."""
    rest = torch.empty(0, dtype=torch.int64)
    while True:
        while len(rest) < size:
            rest = torch.cat([rest, torch.randperm(count, generator=generator)])
        yield rest[:size]
        rest = rest[size:]


def predict_in_batches(model: nn.Module, images: Tensor, *, batch_size: int = 256) -> Tensor:
    """Logits ``(N, K)`` of a frozen model, without gradients.

    Raises:
        ValueError: The model's answer is not a matrix of at least two finite columns.
    """
    with torch.no_grad():
        logits = torch.cat([model(part) for part in images.split(batch_size)])
    if logits.ndim != 2 or len(logits) != len(images) or logits.shape[1] < 2:
        raise ValueError(f"expected logits of shape (N, K), K >= 2, got {tuple(logits.shape)}")
    if not bool(torch.isfinite(logits).all()):
        raise ValueError("expected finite logits, got NaN or infinity")
    return logits


@contextmanager
def frozen(model: nn.Module) -> Iterator[nn.Module]:
    """Hold a model in eval mode without parameter gradients, then give it back as it came."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"expected a torch module as the model, got {type(model).__name__}")
    modes = [(module, module.training) for module in model.modules()]
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield model.eval().requires_grad_(False)
    finally:
        for module, training in modes:
            module.training = training
        for parameter, requires_grad in wanted:
            parameter.requires_grad_(requires_grad)
