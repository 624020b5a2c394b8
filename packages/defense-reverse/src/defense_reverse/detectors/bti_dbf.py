"""BTI-DBF: find the benign features first; a trigger is what changes the others.

Source: Xu et al. 2024, "Towards Reliable and Efficient Backdoor Trigger Inversion via Decoupling
Benign Features", and its released code.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defense_nc import ScanReport, judge
from defense_reverse.detectors.bti_losses import (
    BtiDbfConfig,
    Changes,
    changes,
    decoupling_loss,
    inversion_loss,
    pretraining_loss,
)
from defense_reverse.detectors.common import (
    Examined,
    batches,
    check_alpha,
    descend,
    examine,
    measure,
    new_generator,
    squash,
    with_own_verdict,
)
from defense_reverse.detectors.split import image_change
from defense_reverse.generator import UNetGenerator
from defense_reverse.trigger import ReversedTrigger
from wm_inject.core.progress import progress as show_progress

_NUDGE = 1e-2  # deviation of a residual head's first weights
_LEAST = 1e-3  # the score of a label that every image reaches: scores must be positive


class Inverted(NamedTuple):
    """What the inversion found."""

    generator: UNetGenerator
    mask: Tensor  # of the benign features, the shape of one image's, in [0, 1]
    changed: Changes  # by the last batch


def scan(
    model: nn.Module,
    images: Tensor,
    *,
    config: BtiDbfConfig | None = None,
    alpha: float = 0.05,
    labels: Tensor | None = None,
    seed: int = 0,
    progress: bool = True,
    device: torch.device | str | None = None,
) -> ScanReport:
    """Reverse one trigger, whatever its target, and see where it sends the images.

    Args:
        model: A classifier that `split_at_last_map` takes; given back as it came.
        images: Clean float32 ``(N, C, H, W)`` in [0, 1], at least two classes.
        config: Settings; the preset "small" if None.
        alpha: For the p-values, which the verdict does not rest on.
        labels: int64 ``(N,)``, the true classes; the model's own answers if None.
        seed: Seeds the mask, the generator, the order of the images and the noise.
        progress: Show how far it is.
        device: Where to compute; where the model is, if None.

    Returns:
        A report whose success rates are the share of other classes' images that the generator sends
        to each label, and whose scores are one minus that. ``triggers`` holds the generator, under
        the most frequent label; what the last batch changed is in ``config["raw"]``.

    Raises:
        ValueError: Bad images, labels or settings, images of one class only, or a model that cannot
            be split.

    Source: the released code. It names the most frequent label, of clean models too; that the label
        must be reached by ``config.min_share`` of the other classes' images is ours. The classifier
        stays in eval mode throughout, where the released code lets its statistics drift.
    """
    config = BtiDbfConfig() if config is None else config
    check_alpha(alpha)
    with examine(model, images, labels, device) as seen:
        found = invert(seen, config, seed=seed, progress=progress)
        answers = _noisy_answers(seen, found.generator, config, seed=seed)
        named = int(answers.bincount(minlength=seen.num_classes).argmax())
        shares = _shares(answers, seen.labels, seen.num_classes)
        others = seen.images[seen.labels != named]
        sent, change = measure(seen, found.generator, others)
        rate = float((sent == named).double().mean())
    generator = found.generator.to(memory_format=torch.contiguous_format).requires_grad_(False)
    trigger = ReversedTrigger(
        generator.cpu(), target=named, success_rate=rate, residual_norm=change
    )
    report = judge(
        "bti-dbf",
        (1 - shares).clamp(min=_LEAST),
        shares,
        floor=0.0,  # a share is a score in itself
        alpha=alpha,
        triggers={named: trigger},
        config={
            **asdict(config),
            "images": len(images),
            "raw": {name: float(value) for name, value in found.changed._asdict().items()},
        },
        seed=seed,
    )
    share = float(shares[named])
    told = f"{share:.2f} of the other classes' images reach label {named}, the most frequent"
    suspected = [named] if share >= config.min_share else []
    compared = "at least" if suspected else "less than"
    return with_own_verdict(
        report, suspected, f"BTI-DBF's rule: {told}, {compared} {config.min_share:g}."
    )


def invert(
    seen: Examined,
    config: BtiDbfConfig,
    *,
    seed: int,
    target: int | None = None,
    start: UNetGenerator | None = None,
    progress: bool = False,
) -> Inverted:
    """Part the features, then train a generator that changes those that are not benign.

    Args:
        seen: The classifier and what it sees.
        config: Settings.
        seed: Seeds the mask, the generator and the order of the images.
        target: A label to reach as well; the later rounds of unlearning know it.
        start: The generator to go on training; a fresh one if None.
        progress: Show how far it is.
    """
    random = torch.Generator().manual_seed(seed)
    with torch.enable_grad():
        mask = _decouple(seen, config, random)
        generator = _start(seen, config, seed=seed) if start is None else start
        optimizer = torch.optim.Adam(generator.parameters(), lr=config.lr)
        order = batches(len(seen.images), config.batch_size, random)
        for _ in show_progress(range(config.steps), desc="inversion", enabled=progress):
            rows = next(order).to(seen.images.device)
            generated = generator(seen.images[rows])
            features = seen.split.features(generated)
            change = image_change(generated, seen.images[rows], seen.scale)
            changed = changes(seen.features[rows], features, mask, change)
            loss = inversion_loss(changed, config)
            if target is not None:
                goal = torch.full((len(rows),), target, device=rows.device)
                loss = loss + F.cross_entropy(seen.split.head(features), goal)
            descend(optimizer, loss)
    last = Changes(*(value.detach() for value in changed))
    return Inverted(generator.eval(), mask, last)


def frequent_label(
    seen: Examined, generator: UNetGenerator, config: BtiDbfConfig, *, seed: int
) -> tuple[int, float]:
    """The most frequent answer to generated images, and its share of all answers."""
    answers = _noisy_answers(seen, generator, config, seed=seed)
    counts = answers.bincount(minlength=seen.num_classes)
    named = int(counts.argmax())
    return named, float(counts[named]) / len(answers)


def _decouple(seen: Examined, config: BtiDbfConfig, random: torch.Generator) -> Tensor:
    """The mask of the benign features."""
    theta = torch.randn(seen.features.shape[1:], generator=random).to(seen.images.device)
    theta.requires_grad_()
    optimizer = torch.optim.Adam([theta], lr=config.mask_lr)
    order = batches(len(seen.features), config.batch_size, random)
    for _ in range(config.mask_steps):
        rows = next(order).to(seen.images.device)
        mask = squash(theta)
        loss = decoupling_loss(seen.split.head, seen.features[rows], seen.labels[rows], mask)
        descend(optimizer, loss)
    return squash(theta.detach())


def _start(seen: Examined, config: BtiDbfConfig, *, seed: int) -> UNetGenerator:
    """A generator that keeps images, features and answers about as they are."""
    generator = new_generator(seen, config, seed=seed)
    random = torch.Generator().manual_seed(seed)
    if config.residual:
        # From a perfect copy the changed features have no gradient to follow.
        nudge = torch.randn(generator.head.weight.shape, generator=random) * _NUDGE
        with torch.no_grad():
            generator.head.weight.copy_(nudge)
        return generator
    optimizer = torch.optim.Adam(generator.parameters(), lr=config.lr)
    order = batches(len(seen.images), config.batch_size, random)
    with torch.no_grad():
        answers = seen.split.head(seen.features)
    for _ in range(config.pretrain_steps):
        rows = next(order).to(seen.images.device)
        generated = generator(seen.images[rows])
        features = seen.split.features(generated)
        loss = pretraining_loss(
            answers[rows],
            seen.split.head(features),
            F.mse_loss(features, seen.features[rows]),
            image_change(generated, seen.images[rows], seen.scale),
        )
        descend(optimizer, loss)
    return generator


def _noisy_answers(
    seen: Examined, generator: UNetGenerator, config: BtiDbfConfig, *, seed: int
) -> Tensor:
    """The answers to images generated from slightly noisy ones."""
    random = torch.Generator().manual_seed(seed)
    noise = torch.randn(seen.images.shape, generator=random).to(seen.images.device)
    noisy = (seen.images + config.noise * seen.scale * noise).clamp(0, 1)
    with torch.no_grad():
        parts = [seen.model(generator(part)).argmax(1) for part in noisy.split(256)]
    return torch.cat(parts)


def _shares(answers: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """The share of other classes' images that each label gets, float64 ``(K,)``."""
    answers, labels = answers.cpu(), labels.cpu()
    return torch.stack([(answers[labels != k] == k).double().mean() for k in range(num_classes)])
