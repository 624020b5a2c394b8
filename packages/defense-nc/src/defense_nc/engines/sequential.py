"""Trigger inversion for one label after another: the reference for the batched engine."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defense_nc.batches import EndlessBatches
from defense_nc.config import NCConfig
from defense_nc.engines.candidates import (
    Candidate,
    candidate,
    check_inputs,
    conclude,
    draw,
    squash,
)
from defense_nc.engines.cost_schedule import CostSchedule
from defense_nc.gradients import GradientCount, reached, vanished
from defense_nc.scan_inputs import ScanInputs
from defense_nc.trigger import Inverted, InvertedTrigger, compose
from wm_inject.core.precision import resolve_precision
from wm_inject.core.progress import Progress
from wm_inject.core.progress import progress as show_progress
from wm_inject.core.resume import ResumeFile, fingerprint
from wm_victim.forward_fusion import fused_forward
from wm_victim.inference import frozen


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

    Returns:
        The trigger with the smallest norm among the steps that succeeded (or the next smallest that
        reaches ``config.floor``, or the last one if no step succeeded), with its success rate on
        all images of other classes.

    Source: Neural Cleanse, equation 3 and released code. There images of the target class are not
        left out.
    """
    config = NCConfig() if config is None else config
    with frozen(model):
        labels, _ = check_inputs(model, images, labels, [target])
        inputs = ScanInputs(model, images, labels, 0)
        return _invert(inputs, target, config=config, seed=seed, progress=progress)[0]


def invert_in_turn(
    inputs: ScanInputs,
    targets: Sequence[int],
    *,
    config: NCConfig,
    seed: int,
    progress: bool,
    checkpoint: Path | None,
) -> Inverted:
    """One label after the other; a checkpoint holds the labels that are done."""
    model, images, labels = inputs[:3]
    run = {
        "seed": seed,
        "data": fingerprint(*model.state_dict().values(), images, labels),
        "config": asdict(config),
        "targets": list(targets),
    }
    file = ResumeFile(checkpoint, kind="neural-cleanse-labels", run=run)
    done: list[dict[str, Any]] = file.load() or []
    for target in show_progress(targets[len(done) :], desc="labels", enabled=progress):
        trigger, starved = _invert(inputs, target, config=config, seed=seed, progress=False)
        state = {"tensors": trigger.cpu().state_dict(), "config": trigger.config}
        done.append({**state, "starved": starved})
        file.save(done)
    file.remove()
    triggers = []
    for target, state in zip(targets, done, strict=True):
        rate, steps = state["config"]["success_rate"], state["config"]["steps"]
        triggers.append(
            InvertedTrigger(**state["tensors"], target=target, success_rate=rate, steps=steps)
        )
    scores = tuple(trigger.l1_norm for trigger in triggers)
    return Inverted(tuple(triggers), scores, None, tuple(state["starved"] for state in done))


def _invert(
    inputs: ScanInputs, target: int, *, config: NCConfig, seed: int, progress: bool
) -> tuple[InvertedTrigger, float]:
    """One label's trigger, and the share of its images whose gradients had vanished."""
    model, images, labels = inputs[:3]
    images = images[labels != target]
    forward = fused_forward(model, config.precision, images.device)
    candidates: list[Candidate] = []
    steps, gradients = 0, GradientCount()
    for index, start in enumerate(config.starts):
        more, more_steps, more_gradients = _search(
            forward, images, target, start, config=config, seed=seed + index, progress=progress
        )
        candidates, steps = [*candidates, *more], steps + more_steps
        gradients += more_gradients
    trigger = conclude(model, images, target, candidates, floor=config.floor)
    trigger.steps = steps
    return trigger, gradients.share


def _search(
    forward: Callable[[Tensor], Tensor],
    images: Tensor,
    target: int,
    start: str,
    *,
    config: NCConfig,
    seed: int,
    progress: bool,
) -> tuple[list[Candidate], int, GradientCount]:
    """The best masks and patterns, the smallest first; steps taken; what gradients there were."""
    generator = torch.Generator().manual_seed(seed)
    theta_mask, theta_pattern = (
        theta.to(images.device).requires_grad_()
        for theta in draw(start, images.shape[1:], generator)
    )
    optimizer = torch.optim.Adam([theta_mask, theta_pattern], lr=config.lr, betas=config.betas)
    schedule = CostSchedule(config)
    batches = EndlessBatches(len(images), config.batch_size, generator)
    best: deque[Candidate] = deque(maxlen=config.fallbacks)
    step, norm, gradients = 0, float("inf"), GradientCount()
    exact = resolve_precision(config.precision, images.device) == torch.float32
    bar: Progress[None] = show_progress(
        total=config.steps, desc=f"label {target}", enabled=progress
    )
    with bar, torch.enable_grad():
        while step < config.steps and not schedule.stop:
            step += 1
            success = torch.zeros((), device=images.device)
            for _ in range(config.batches):
                index = next(batches).to(images.device)
                mask, pattern = squash(theta_mask), squash(theta_pattern)
                triggered = compose(images[index], mask, pattern)
                triggered.retain_grad()
                logits = forward(triggered)
                goal = torch.full((len(index),), target, device=images.device)
                loss = F.cross_entropy(logits, goal) + schedule.cost * mask.sum()
                optimizer.zero_grad()
                loss.backward()
                for theta in (theta_mask, theta_pattern):
                    if theta.grad is not None:
                        theta.grad.nan_to_num_(0, 0, 0)
                optimizer.step()
                hits = reached(logits, goal)
                success += (hits if exact else logits.detach().argmax(1) == target).float().mean()
                pixels = triggered.grad
                vanishing = vanished(None if pixels is None else pixels * len(index), logits, goal)
                gradients.add(int((~hits).sum()), int(vanishing.sum()))
            average = min(1.0, float(success) / config.batches)
            current = candidate(theta_mask, theta_pattern, average >= config.threshold)
            if current.succeeded and current.norm < norm:
                best.appendleft(current)
                norm = current.norm
            schedule.update(average, norm)
            bar.update()
            bar.set_postfix(success=average, norm=current.norm, cost=schedule.cost)
    return list(best) or [candidate(theta_mask, theta_pattern, False)], step, gradients
