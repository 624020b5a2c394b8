"""FeatureRE: a trigger is what moves a few features of any image to one place, whatever its class.

Source: Wang et al. 2022, "Rethinking the Reverse-engineering of Trojan Triggers", and its released
code. Ours: the mask's step reads the features that the generator's step has computed, in place of
computing them anew, and a class without images has no mean, so that its similarity counts as 0.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defense_nc.config import check_rule
from defense_nc.gradients import GradientCount, reached, vanished
from defense_nc.verdict import ScanReport, judge
from defense_reverse.detectors.common import (
    SplitInputs,
    batches_of,
    new_generator,
    open_split,
    squash,
    with_own_verdict,
)
from defense_reverse.detectors.feature_losses import (
    Excess,
    FeatureREConfig,
    Terms,
    excess,
    generator_loss,
    mask_loss,
    masked_spread,
    mix,
    round_mean,
    score,
    similarity,
    warmup_loss,
)
from defense_reverse.detectors.split import image_change
from defense_reverse.generator import UNetGenerator
from defense_reverse.label_state import descend, measure
from wm_inject.core.progress import progress as show_progress

_HIGHEST = 50.0  # exp of more says nothing more, and would overflow


class FeatureTrigger(nn.Module):
    """A generator reversed by FeatureRE, and the mask of the features that it takes over.

    Args:
        mask: The shape of one image's features, in [0, 1].
        score: Its score; below the threshold it is a backdoor's.
        success_rate: Share of other classes' images that it sends to the label, with no mask.
        residual_norm: Mean absolute change, per pixel and channel, of those images.
    """

    kind = "feature-re"
    mask: Tensor

    def __init__(
        self,
        generator: UNetGenerator,
        mask: Tensor,
        *,
        target: int,
        score: float = 0.0,
        success_rate: float = 0.0,
        residual_norm: float = 0.0,
    ) -> None:
        super().__init__()
        if target < 0 or not 0 <= success_rate <= 1 or not 0 <= residual_norm <= 1:
            raise ValueError(
                "expected a target >= 0 and a success rate and residual in [0, 1], got "
                f"{target}, {success_rate}, {residual_norm}"
            )
        if not bool(((mask >= 0) & (mask <= 1)).all()):
            raise ValueError("expected a mask with finite values in [0, 1]")
        self.generator = generator
        self.register_buffer("mask", mask)
        self.target, self.score = target, score
        self.success_rate, self.residual_norm = success_rate, residual_norm
        self.eval()

    @property
    def config(self) -> dict[str, Any]:
        """Everything but the tensors, ready for JSON."""
        return {
            "generator": dict(self.generator.config),
            "mask": list(self.mask.shape),
            "target": self.target,
            "score": self.score,
            "success_rate": self.success_rate,
            "residual_norm": self.residual_norm,
        }

    def forward(
        self, images: Tensor, *, ids: Tensor | None = None, target: Tensor | None = None
    ) -> Tensor:
        """Generated images, the same shape; ``ids`` and ``target`` change nothing."""
        return self.generator(images)


@dataclass(frozen=True)
class FeatureRE:
    """FeatureRE as a `defense_nc.Detector`; its models are those of `split_at_last_map`.

    Args:
        alpha: For the p-values, which the verdict does not rest on.
    """

    name: ClassVar[str] = "feature-re"
    config: FeatureREConfig = field(default_factory=FeatureREConfig)
    alpha: float = 0.05

    def __post_init__(self) -> None:
        check_rule(self.alpha)

    @classmethod
    def preset(cls, name: str = "fast", *, alpha: float = 0.05, **changes: Any) -> FeatureRE:
        """A preset of `FeatureREConfig`, with changes of its fields."""
        return cls(FeatureREConfig.preset(name, **changes), alpha)

    @property
    def settings(self) -> Mapping[str, Any]:
        """The search settings, ready for JSON."""
        settings: dict[str, Any] = json.loads(json.dumps(asdict(self.config)))
        return settings

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
        """Reverse a trigger in image and feature space for every label, and judge by its score.

        Images of a label are left out when its trigger is sought, and give its mean features.
        ``checkpoint`` is ignored.

        Returns:
            A report whose scores are ``exp(raw)``, so that small is suspicious and all are
            positive. The raw scores and what the best rounds measured are in ``log["raw"]``. The
            verdict is the paper's: a raw score below ``config.threshold``. ``triggers`` holds a
            `FeatureTrigger` per label.

        Raises:
            ValueError: As `Detector.scan`, or a model that cannot be split.
        """
        config = self.config
        rounds: list[_Round] = []
        triggers: dict[int, nn.Module] = {}
        rates: list[float] = []
        with open_split(model, images, labels=labels, device=device) as inputs:
            for label in show_progress(range(inputs.num_classes), desc="labels", enabled=progress):
                best = _search(inputs, label, config=config, seed=seed)
                trigger = _trigger(inputs, best, label, config=config)
                rounds.append(best)
                triggers[label] = trigger.cpu()
                rates.append(trigger.success_rate)
        raw = [best.score for best in rounds]
        report = judge(
            self.name,
            torch.tensor([math.exp(min(value, _HIGHEST)) for value in raw], dtype=torch.float64),
            torch.tensor(rates, dtype=torch.float64),
            floor=0.0,  # a score counts failures already
            alpha=self.alpha,
            triggers=triggers,
            config={**self.settings, "images": len(images)},
            seed=seed,
            starved=[best.starved for best in rounds],
            notes=inputs.notes,
        )
        suspected = [label for label, value in enumerate(raw) if value < config.threshold]
        return with_own_verdict(
            report,
            suspected,
            _reason(raw, suspected, config),
            log={"raw": [{"score": best.score, **best.terms.numbers()} for best in rounds]},
        )


class _Round(NamedTuple):
    """A label's trigger after one round."""

    score: float
    terms: Terms
    mask: Tensor
    state: dict[str, Tensor]
    starved: float = 0.0  # `GradientCount.share` of the whole search


@torch.enable_grad()
def _search(inputs: SplitInputs, target: int, *, config: FeatureREConfig, seed: int) -> _Round:
    """One label's generator and mask, as they were after the round with the lowest score."""
    images = inputs.others(target)
    random = torch.Generator().manual_seed(seed)
    generator = new_generator(inputs, config, seed=seed)
    theta = torch.ones_like(inputs.features[0]).requires_grad_()
    optimizer = torch.optim.Adam(generator.parameters(), lr=config.lr, betas=config.betas)
    mask_optimizer = torch.optim.Adam([theta], lr=config.mask_lr, betas=config.betas)
    batches = batches_of(images, config.batch_size, random)
    for _ in range(config.warmup_steps):
        batch = images[next(batches).to(images.device)]
        generated = generator(batch)
        attack, _ = _attack(inputs, inputs.split.features(generated), target)
        change = image_change(generated, batch, inputs.scale)
        descend(optimizer, warmup_loss(attack, change, config))
    class_mean = _class_mean(inputs, target)
    span, gradients = inputs.features.amax(0) - inputs.features.amin(0), GradientCount()
    best: _Round | None = None
    previous, measured = Excess(), []
    for step in range(1, config.steps + 1):
        batch = images[next(batches).to(images.device)]
        rows = torch.randint(len(inputs.features), (len(batch),), generator=random)
        reference = inputs.features[rows.to(batch.device)]
        generated = generator(batch)
        features = inputs.split.features(generated)
        mask = squash(theta.detach())
        attack, success = _attack(inputs, mix(features, reference, mask), target)
        terms = Terms(
            similarity=similarity(features, class_mean),
            success=success,
            attack=attack,
            change=image_change(generated, batch, inputs.scale),
            spread=masked_spread(features, mask),
            mask_norm=mask.sum(),
        )
        descend(optimizer, generator_loss(terms, config, previous))
        mask = squash(theta)
        mixed = mix(features.detach(), reference, mask)
        mixed.retain_grad()
        logits = inputs.split.head(mixed)
        goal = torch.full((len(logits),), target, device=logits.device)
        attack = F.cross_entropy(logits, goal) + 0 * mask.sum()  # the head may have no gradients
        descend(mask_optimizer, mask_loss(attack, mask, config))
        gradient = None if mixed.grad is None else mixed.grad * len(batch) * span
        vanishing = vanished(gradient, logits, goal)
        gradients.add(int((~reached(logits, goal)).sum()), int(vanishing.sum()))
        measured.append(Terms(*(value.detach() for value in terms)))
        if step % config.round_steps == 0 or step == config.steps:
            terms, measured = round_mean(measured), []
            previous = excess(terms, mask, config)
            value = score(terms, previous)
            if best is None or value < best.score:
                state = {name: tensor.clone() for name, tensor in generator.state_dict().items()}
                best = _Round(value, terms, squash(theta.detach()), state)
    assert best is not None
    return best._replace(starved=gradients.share)


def _class_mean(inputs: SplitInputs, target: int) -> Tensor:
    """The mean features of a class; zeros, which no feature resembles, where it has no image."""
    of_class = inputs.features[inputs.labels == target]
    return of_class.mean(0) if len(of_class) else torch.zeros_like(inputs.features[0])


def _attack(inputs: SplitInputs, features: Tensor, target: int) -> tuple[Tensor, Tensor]:
    """Cross-entropy towards the label, and the share that reaches it."""
    logits = inputs.split.head(features)
    goal = torch.full((len(logits),), target, device=logits.device)
    return F.cross_entropy(logits, goal), (logits.detach().argmax(1) == target).float().mean()


def _trigger(
    inputs: SplitInputs, best: _Round, target: int, *, config: FeatureREConfig
) -> FeatureTrigger:
    generator = new_generator(inputs, config, seed=0)
    generator.load_state_dict(best.state)
    generator = generator.to(memory_format=torch.contiguous_format).eval()
    rate, change = measure(generator, inputs.model, inputs.others(target), target)
    return FeatureTrigger(
        generator.requires_grad_(False),
        best.mask,
        target=target,
        score=best.score,
        success_rate=rate,
        residual_norm=change,
    )


def _reason(raw: list[float], suspected: list[int], config: FeatureREConfig) -> str:
    """One sentence with the figures that decided."""
    rule = f"FeatureRE's own rule, a score below {config.threshold:g}"
    if suspected:
        named = " and ".join(f"label {label} (score {raw[label]:.2f})" for label in suspected)
        return f"{rule}, names {named}."
    low = min(range(len(raw)), key=raw.__getitem__)
    return f"{rule}, names no label: the lowest is label {low} (score {raw[low]:.2f})."
