"""Input-aware: every image has its own pattern and mask; the victim's training finishes it."""

from __future__ import annotations

from wm_inject.attacks.definition import Attack, FitContext, Fitted, Length
from wm_inject.attacks.input_aware.masks import InputAwareConfig, diversity, fit_masks
from wm_inject.attacks.input_aware.patterns import InputAwareHook
from wm_inject.attacks.input_aware.trigger import WIDTHS, InputAwareTrigger
from wm_inject.core.plan import PoisonPlan


def _fit(attack: Attack, context: FitContext) -> Fitted:
    """Phase A."""
    trigger = attack.build(context, width=WIDTHS[attack.profile])
    history = fit_masks(
        trigger.to(context.images.device),
        context.images,
        config=attack.fit_config(),
        seed=context.seed,
        checkpoint=context.checkpoint,
        progress=context.progress,
    )
    return Fitted(trigger, {"history": history})


def _hook(
    attack: Attack,
    trigger: InputAwareTrigger,
    plan: PoisonPlan,
    num_classes: int,
    length: Length | None,
) -> InputAwareHook:
    """Phase B."""
    total = None if length is None else length.steps * length.epochs
    config = attack.fit_config(total_steps=total)
    return InputAwareHook(trigger, plan, num_classes=num_classes, config=config)


ATTACK = Attack(
    "input-aware",
    "Input-aware",
    InputAwareTrigger,
    needs="victim",
    mode="per_batch",
    config=InputAwareConfig,
    fitter=_fit,
    co_training=_hook,
)

__all__ = [
    "ATTACK",
    "WIDTHS",
    "InputAwareConfig",
    "InputAwareHook",
    "InputAwareTrigger",
    "diversity",
    "fit_masks",
]
