"""BTI-DBF: find the benign features first; a trigger is what changes the others.

Source: Xu et al. 2024, "Towards Reliable and Efficient Backdoor Trigger Inversion via Decoupling
Benign Features", and its released code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defense_nc.config import check_rule
from defense_nc.gradients import GradientCount
from defense_nc.verdict import ScanReport, judge
from defense_reverse.detectors.bti_losses import (
    BtiDbfConfig,
    Changes,
    decoupling_loss,
    feature_changes,
    inversion_loss,
    pretraining_loss,
)
from defense_reverse.detectors.common import (
    SplitInputs,
    batches_of,
    new_generator,
    open_split,
    squash,
    with_own_verdict,
)
from defense_reverse.detectors.split import image_change
from defense_reverse.generator import UNetGenerator
from defense_reverse.label_state import descend, measure
from defense_reverse.trigger import ReversedTrigger
from wm_inject.core.progress import progress as show_progress

_NUDGE = 1e-2  # deviation of a residual head's first weights
_LEAST = 1e-3  # the score of a label that every image reaches: scores must be positive


class Inverted(NamedTuple):
    """The result of an inversion."""

    generator: UNetGenerator
    mask: Tensor  # of the benign features, the shape of one image's, in [0, 1]
    changes: Changes  # of the last batch
    starved: float  # share of the steps without a gradient, of the mask's or of the inversion's


@dataclass(frozen=True)
class BtiDbf:
    """BTI-DBF as a `defense_nc.Detector`; its models are those of `split_at_last_map`.

    Args:
        alpha: For the p-values, which the verdict does not rest on.
    """

    name: ClassVar[str] = "bti-dbf"
    config: BtiDbfConfig = field(default_factory=BtiDbfConfig)
    alpha: float = 0.05

    def __post_init__(self) -> None:
        check_rule(self.alpha)

    @classmethod
    def preset(cls, name: str = "fast", *, alpha: float = 0.05, **changes: Any) -> BtiDbf:
        """A preset of `BtiDbfConfig`, with changes of its fields."""
        return cls(BtiDbfConfig.preset(name, **changes), alpha)

    @property
    def settings(self) -> Mapping[str, Any]:
        """The search settings, ready for JSON."""
        return asdict(self.config)

    def scan(
        self,
        model: nn.Module,
        images: Tensor,
        *,
        labels: Tensor | None = None,
        seed: int = 0,
        progress: bool = True,
        device: torch.device | str | None = None,
        checkpoint: Path | None = None,
    ) -> ScanReport:
        """Reverse one trigger, whatever its target, and see where it sends the images.

        ``checkpoint`` is ignored.

        Returns:
            A report whose success rates are the share of other classes' images that the generator
            sends to each label, and whose scores are one minus that. ``triggers`` holds the
            generator, under the most frequent label; the changes of the last batch are in
            ``log["raw"]``.

        Raises:
            ValueError: As `Detector.scan`, or a model that cannot be split.

        Source: the released code. It names the most frequent label, of clean models too; that
            ``config.min_share`` of the other classes' images must reach the label is ours. The
            classifier stays in eval mode, where the released code lets its statistics drift.
        """
        config = self.config
        with open_split(model, images, labels=labels, device=device) as inputs:
            inverted = invert(inputs, config, seed=seed, progress=progress)
            predictions = _noisy_predictions(inputs, inverted.generator, config, seed=seed)
            target = int(predictions.bincount(minlength=inputs.num_classes).argmax())
            shares = _shares(predictions, inputs.labels, inputs.num_classes)
            others = inputs.others(target)
            rate, change = measure(inverted.generator, inputs.model, others, target)
        generator = inverted.generator.to(memory_format=torch.contiguous_format)
        trigger = ReversedTrigger(
            generator.requires_grad_(False).cpu(),
            target=target,
            success_rate=rate,
            residual_norm=change,
        )
        report = judge(
            self.name,
            (1 - shares).clamp(min=_LEAST),
            shares,
            floor=0.0,  # a share is a score in itself
            alpha=self.alpha,
            triggers={target: trigger},
            config={**self.settings, "images": len(images)},
            seed=seed,
            starved=[inverted.starved] * inputs.num_classes,
            notes=inputs.notes,
        )
        share = float(shares[target])
        finding = (
            f"{share:.2f} of the other classes' images reach label {target}, the most frequent"
        )
        suspected = [target] if share >= config.min_share else []
        compared = "at least" if suspected else "less than"
        reason = f"BTI-DBF's rule: {finding}, {compared} {config.min_share:g}."
        log = {"raw": inverted.changes.numbers()}
        return with_own_verdict(report, suspected, reason, log=log)


def invert(
    inputs: SplitInputs,
    config: BtiDbfConfig,
    *,
    seed: int,
    target: int | None = None,
    start: UNetGenerator | None = None,
    progress: bool = False,
) -> Inverted:
    """Decouple the features, then train a generator that changes those that are not benign.

    Args:
        target: A label to reach as well; the later rounds of unlearning know it.
        start: The generator to continue training; a fresh one if None.
    """
    random = torch.Generator().manual_seed(seed)
    gradients = GradientCount()
    with torch.enable_grad():
        mask, starved = _decouple(inputs, config, random)
        generator = _start(inputs, config, seed=seed) if start is None else start
        optimizer = torch.optim.Adam(generator.parameters(), lr=config.lr)
        batches = batches_of(inputs.images, config.batch_size, random)
        for _ in show_progress(range(config.steps), desc="inversion", enabled=progress):
            rows = next(batches).to(inputs.images.device)
            generated = generator(inputs.images[rows])
            generated.retain_grad()
            features = inputs.split.features(generated)
            change = image_change(generated, inputs.images[rows], inputs.scale)
            changes = feature_changes(inputs.features[rows], features, mask, change)
            loss = inversion_loss(changes, config)
            if target is not None:
                goal = torch.full((len(rows),), target, device=rows.device)
                loss = loss + F.cross_entropy(inputs.split.head(features), goal)
            descend(optimizer, loss)
            gradients.add(1, not _leads(generated.grad))
    last = Changes(*(value.detach() for value in changes))
    return Inverted(generator.eval(), mask, last, max(starved, gradients.share))


def frequent_label(
    inputs: SplitInputs, generator: UNetGenerator, config: BtiDbfConfig, *, seed: int
) -> tuple[int, float]:
    """The most frequent prediction for generated images, and its share of all predictions."""
    predictions = _noisy_predictions(inputs, generator, config, seed=seed)
    counts = predictions.bincount(minlength=inputs.num_classes)
    label = int(counts.argmax())
    return label, float(counts[label]) / len(predictions)


def _decouple(
    inputs: SplitInputs, config: BtiDbfConfig, random: torch.Generator
) -> tuple[Tensor, float]:
    """The mask of the benign features, and the share of its steps without a gradient."""
    theta = torch.randn(inputs.features.shape[1:], generator=random).to(inputs.images.device)
    theta.requires_grad_()
    optimizer, gradients = torch.optim.Adam([theta], lr=config.mask_lr), GradientCount()
    batches = batches_of(inputs.features, config.batch_size, random)
    for _ in range(config.mask_steps):
        rows = next(batches).to(inputs.images.device)
        mask = squash(theta)
        loss = decoupling_loss(inputs.split.head, inputs.features[rows], inputs.labels[rows], mask)
        descend(optimizer, loss)
        gradients.add(1, not _leads(theta.grad))
    return squash(theta.detach()), gradients.share


def _leads(gradient: Tensor | None) -> bool:
    """Whether a gradient is finite and not zero everywhere."""
    return gradient is not None and bool(gradient.isfinite().all() & gradient.any())


def _start(inputs: SplitInputs, config: BtiDbfConfig, *, seed: int) -> UNetGenerator:
    """A generator that keeps images, features and predictions about as they are."""
    generator = new_generator(inputs, config, seed=seed)
    random = torch.Generator().manual_seed(seed)
    if config.residual:
        # From a perfect copy the changed features have no gradient to follow.
        nudge = torch.randn(generator.head.weight.shape, generator=random) * _NUDGE
        with torch.no_grad():
            generator.head.weight.copy_(nudge)
        return generator
    optimizer = torch.optim.Adam(generator.parameters(), lr=config.lr)
    batches = batches_of(inputs.images, config.batch_size, random)
    with torch.no_grad():
        logits = inputs.split.head(inputs.features)
    for _ in range(config.pretrain_steps):
        rows = next(batches).to(inputs.images.device)
        generated = generator(inputs.images[rows])
        features = inputs.split.features(generated)
        loss = pretraining_loss(
            logits[rows],
            inputs.split.head(features),
            F.mse_loss(features, inputs.features[rows]),
            image_change(generated, inputs.images[rows], inputs.scale),
        )
        descend(optimizer, loss)
    return generator


def _noisy_predictions(
    inputs: SplitInputs, generator: UNetGenerator, config: BtiDbfConfig, *, seed: int
) -> Tensor:
    """The predictions for images generated from slightly noisy ones."""
    random = torch.Generator().manual_seed(seed)
    noise = torch.randn(inputs.images.shape, generator=random).to(inputs.images.device)
    noisy = (inputs.images + config.noise * inputs.scale * noise).clamp(0, 1)
    with torch.no_grad():
        parts = [inputs.model(generator(part)).argmax(1) for part in noisy.split(256)]
    return torch.cat(parts)


def _shares(predictions: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """The share of other classes' images that each label gets, float64 ``(K,)``."""
    predictions, labels = predictions.cpu(), labels.cpu()
    shares = [(predictions[labels != k] == k).double().mean() for k in range(num_classes)]
    return torch.stack(shares)
