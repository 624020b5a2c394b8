"""FeatureRE: a trigger is what moves a few features of any image to one place, whatever its class.

Source: Wang et al. 2022, "Rethinking the Reverse-engineering of Trojan Triggers", and its released
code.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defense_nc import ScanReport, judge
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
from defense_reverse.detectors.feature_losses import (
    Asked,
    Excess,
    FeatureREConfig,
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
from defense_reverse.detectors.feature_trigger import FeatureTrigger
from defense_reverse.detectors.split import image_change
from wm_inject.core.progress import progress as show_progress

_HIGHEST = 50.0  # exp of more says nothing more, and would overflow


class _Found(NamedTuple):
    """The best round of one label's search."""

    score: float
    asked: Asked
    mask: Tensor
    state: dict[str, Tensor]


def scan(
    model: nn.Module,
    images: Tensor,
    *,
    config: FeatureREConfig | None = None,
    alpha: float = 0.05,
    labels: Tensor | None = None,
    seed: int = 0,
    progress: bool = True,
    device: torch.device | str | None = None,
) -> ScanReport:
    """Reverse a trigger in image and feature space for every label, and judge by its score.

    Args:
        model: A classifier that `split_at_last_map` takes; given back as it came.
        images: Clean float32 ``(N, C, H, W)`` in [0, 1], at least two classes.
        config: Settings; the preset "small" if None.
        alpha: For the p-values, which the verdict does not rest on.
        labels: int64 ``(N,)``, the true classes; the model's own answers if None. Images of a label
            are left out when its trigger is sought, and give its mean features.
        seed: Seeds every label's generator and its draws alike.
        progress: Show how far it is.
        device: Where to compute; where the model is, if None.

    Returns:
        A report whose scores are ``exp(raw)``, so that small is suspicious and all are positive.
        The raw scores and what the best rounds measured are in ``config["raw"]``. The verdict is
        the paper's: a raw score below ``config.threshold``. ``triggers`` holds a `FeatureTrigger`
        per label.

    Raises:
        ValueError: Bad images, labels or settings, images of one class only, or a model that cannot
            be split.

    Source: the released code. Ours: the mask's step reads the features that the generator's step
        has computed, in place of computing them anew, and a class without images has no mean, so
        that its similarity counts as 0.
    """
    config = FeatureREConfig() if config is None else config
    check_alpha(alpha)
    found: dict[int, _Found] = {}
    triggers: dict[int, nn.Module] = {}
    rates: list[float] = []
    with examine(model, images, labels, device) as seen:
        for label in show_progress(range(seen.num_classes), desc="labels", enabled=progress):
            best = found[label] = _search(seen, label, config=config, seed=seed)
            trigger = _trigger(seen, best, label, config=config)
            triggers[label] = trigger.cpu()
            rates.append(trigger.success_rate)
    raw = [best.score for best in found.values()]
    report = judge(
        "feature-re",
        torch.tensor([math.exp(min(value, _HIGHEST)) for value in raw], dtype=torch.float64),
        torch.tensor(rates, dtype=torch.float64),
        floor=0.0,  # a score counts failures already
        alpha=alpha,
        triggers=triggers,
        config={
            **asdict(config),
            "betas": list(config.betas),
            "images": len(images),
            "raw": [{"score": best.score, **_numbers(best.asked)} for best in found.values()],
        },
        seed=seed,
    )
    suspected = [label for label, value in enumerate(raw) if value < config.threshold]
    return with_own_verdict(report, suspected, _reason(raw, suspected, config))


@torch.enable_grad()
def _search(seen: Examined, target: int, *, config: FeatureREConfig, seed: int) -> _Found:
    """One label's generator and mask, as they were after the round with the lowest score."""
    images = seen.images[seen.labels != target]
    random = torch.Generator().manual_seed(seed)
    generator = new_generator(seen, config, seed=seed)
    theta = torch.ones_like(seen.features[0]).requires_grad_()
    optimizer = torch.optim.Adam(generator.parameters(), lr=config.lr, betas=config.betas)
    mask_optimizer = torch.optim.Adam([theta], lr=config.mask_lr, betas=config.betas)
    order = batches(len(images), config.batch_size, random)
    for _ in range(config.warmup_steps):
        batch = images[next(order).to(images.device)]
        descend(optimizer, _warm_up(seen, generator, batch, target, config))
    mean = _class_mean(seen, target)
    best: _Found | None = None
    broken, said = Excess(), []
    for step in range(1, config.steps + 1):
        batch = images[next(order).to(images.device)]
        rows = torch.randint(len(seen.features), (len(batch),), generator=random)
        reference = seen.features[rows.to(batch.device)]
        generated = generator(batch)
        features = seen.split.features(generated)
        change = image_change(generated, batch, seen.scale)
        asked = _ask(seen, features, reference, squash(theta.detach()), mean, change, target)
        descend(optimizer, generator_loss(asked, config, broken))
        mask = squash(theta)
        attack, _ = _attack(seen, mix(features.detach(), reference, mask), target)
        descend(mask_optimizer, mask_loss(attack, mask, config))
        said.append(Asked(*(value.detach() for value in asked)))
        if step % config.round_steps == 0 or step == config.steps:
            asked, said = round_mean(said), []
            broken = excess(asked, mask, config)
            value = score(asked, broken)
            if best is None or value < best.score:
                state = {name: tensor.clone() for name, tensor in generator.state_dict().items()}
                best = _Found(value, asked, squash(theta.detach()), state)
    assert best is not None
    return best


def _class_mean(seen: Examined, target: int) -> Tensor:
    """The mean features of a class; zero, like which nothing is, where it has no image."""
    of_class = seen.features[seen.labels == target]
    return of_class.mean(0) if len(of_class) else torch.zeros_like(seen.features[0])


def _warm_up(
    seen: Examined, generator: nn.Module, batch: Tensor, target: int, config: FeatureREConfig
) -> Tensor:
    generated = generator(batch)
    attack, _ = _attack(seen, seen.split.features(generated), target)
    return warmup_loss(attack, image_change(generated, batch, seen.scale), config)


def _ask(
    seen: Examined,
    features: Tensor,
    reference: Tensor,
    mask: Tensor,
    class_mean: Tensor,
    change: Tensor,
    target: int,
) -> Asked:
    """All that a batch is judged by, from the features of its generated images."""
    attack, success = _attack(seen, mix(features, reference, mask), target)
    return Asked(
        similarity=similarity(features, class_mean),
        success=success,
        attack=attack,
        change=change,
        spread=masked_spread(features, mask),
        mask_norm=mask.sum(),
    )


def _attack(seen: Examined, features: Tensor, target: int) -> tuple[Tensor, Tensor]:
    """Cross-entropy towards the label, and the share that reaches it."""
    logits = seen.split.head(features)
    goal = torch.full((len(logits),), target, device=logits.device)
    return F.cross_entropy(logits, goal), (logits.detach().argmax(1) == target).float().mean()


def _trigger(
    seen: Examined, best: _Found, target: int, *, config: FeatureREConfig
) -> FeatureTrigger:
    generator = new_generator(seen, config, seed=0)
    generator.load_state_dict(best.state)
    generator = generator.to(memory_format=torch.contiguous_format).eval()
    answers, change = measure(seen, generator, seen.images[seen.labels != target])
    return FeatureTrigger(
        generator.requires_grad_(False),
        best.mask,
        target=target,
        score=best.score,
        success_rate=float((answers == target).double().mean()),
        residual_norm=change,
    )


def _numbers(asked: Asked) -> dict[str, float]:
    return {name: float(value) for name, value in asked._asdict().items()}


def _reason(raw: list[float], suspected: list[int], config: FeatureREConfig) -> str:
    """One sentence with the figures that decided."""
    rule = f"FeatureRE's own rule, a score below {config.threshold:g}"
    if suspected:
        told = " and ".join(f"label {label} (score {raw[label]:.2f})" for label in suspected)
        return f"{rule}, names {told}."
    low = min(range(len(raw)), key=raw.__getitem__)
    return f"{rule}, names no label: the lowest is label {low} (score {raw[low]:.2f})."
