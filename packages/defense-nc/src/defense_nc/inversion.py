"""Trigger inversion: the smallest patch that sends images of every other class to one label."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defense_nc.schedule import CostSchedule, NCConfig
from defense_nc.trigger import InvertedTrigger, compose
from wm_inject.cli_common import Progress
from wm_inject.cli_common import progress as show_progress
from wm_inject.images import check_images, check_labels

# tanh / (2 - epsilon) + 1/2, as in the original; the PyTorch ports have 2 + epsilon.
_EPSILON = 1e-7


class _Candidate(NamedTuple):
    norm: float
    mask: Tensor
    pattern: Tensor
    succeeded: bool  # whether its step's success reached the threshold


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
        The trigger with the smallest norm among the steps that succeeded (or the next smallest that
        reaches ``config.floor``, or the last one if no step succeeded), with its success rate on
        all the images used.

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
        if not isinstance(target, int) or not 0 <= target < answers.shape[1]:
            raise ValueError(f"expected a target in 0 .. {answers.shape[1] - 1}, got {target}")
        if labels is None:
            labels = answers.argmax(1)
        check_labels(labels, len(images), num_classes=answers.shape[1])
        images = images[labels.to(images.device) != target]
        if len(images) == 0:
            raise ValueError(f"expected images of other classes than {target}, found none")
        found: list[_Candidate] = []
        steps = 0
        for index, start in enumerate(config.starts):
            again, taken = _search(
                model, images, target, start, config=config, seed=seed + index, progress=progress
            )
            found, steps = [*found, *again], steps + taken
        # A search that never succeeded has a norm as well: it comes last.
        found.sort(key=lambda candidate: (not candidate.succeeded, candidate.norm))
        best, success = _choose(model, images, target, found, floor=config.floor)
    return InvertedTrigger(
        best.mask, best.pattern, target=target, success_rate=success, steps=steps
    )


def _search(
    model: nn.Module,
    images: Tensor,
    target: int,
    start: str,
    *,
    config: NCConfig,
    seed: int,
    progress: bool,
) -> tuple[list[_Candidate], int]:
    """The best masks and patterns, the smallest first, and how many steps were taken."""
    generator = torch.Generator().manual_seed(seed)
    free = [_draw(start, shape, generator) for shape in _shapes(images)]
    theta_mask, theta_pattern = (theta.to(images.device).requires_grad_() for theta in free)
    optimizer = torch.optim.Adam([theta_mask, theta_pattern], lr=config.lr, betas=config.betas)
    schedule = CostSchedule(config)
    batches = _batches(len(images), config.batch_size, generator)
    kept: deque[_Candidate] = deque(maxlen=config.fallbacks)
    step, norm = 0, float("inf")
    bar: Progress[None] = show_progress(
        total=config.steps, desc=f"label {target}", enabled=progress
    )
    with bar, torch.enable_grad():
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
            now = _candidate(theta_mask, theta_pattern, average >= config.threshold)
            if now.succeeded and now.norm < norm:
                kept.appendleft(now)
                norm = now.norm
            schedule.update(average, norm)
            bar.update()
            bar.set_postfix(success=average, norm=now.norm, cost=schedule.cost)
    return list(kept) or [_candidate(theta_mask, theta_pattern, False)], step


def _choose(
    model: nn.Module, images: Tensor, target: int, found: list[_Candidate], *, floor: float
) -> tuple[_Candidate, float]:
    """The first candidate that reaches the floor on all images, or the first, and its success."""
    rates = []
    for candidate in found:
        stamped = compose(images, candidate.mask, candidate.pattern).clamp(0, 1)
        hits = predict_in_batches(model, stamped).argmax(1) == target
        rates.append(float(hits.double().mean()))
        if rates[-1] >= floor:
            return candidate, rates[-1]
    return found[0], rates[0]


def _shapes(images: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    channels, height, width = images.shape[1:]
    return (1, height, width), (channels, height, width)


def _draw(start: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if start == "ones":
        return torch.ones(shape)
    # In double precision the ends of the range stay finite.
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
    return torch.atanh((uniform - 0.5) * (2 - _EPSILON)).float()


def _squash(theta: Tensor) -> Tensor:
    return torch.tanh(theta) / (2 - _EPSILON) + 0.5


def _candidate(theta_mask: Tensor, theta_pattern: Tensor, succeeded: bool) -> _Candidate:
    mask, pattern = (_squash(t.detach()).clamp(0, 1) for t in (theta_mask, theta_pattern))
    return _Candidate(float(mask.sum()), mask, pattern, succeeded)


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
