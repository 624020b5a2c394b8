"""Attack by attack: how its trigger is made, and what takes part in training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

from wm_inject.core.plan import CoTraining, PoisonPlan
from wm_inject.fitting import FitContext, Fitted, Length
from wm_inject.triggers import build_trigger

if TYPE_CHECKING:
    from wm_inject.attacks import Attack


def _settings(attack: Attack, context: FitContext, *names: str) -> dict[str, Any]:
    """The trigger's settings: those of the images that it asks for, and the attack's own."""
    known = {**context.shape, "num_classes": context.num_classes, "seed": context.seed}
    return {**{name: known[name] for name in ("image_size", *names)}, **attack.settings}


def _fixed(*names: str) -> Callable[[Attack, FitContext], Fitted]:
    def make(attack: Attack, context: FitContext) -> Fitted:
        return Fitted(build_trigger(attack.name, _settings(attack, context, *names)), {})

    return make


def _blindnet(attack: Attack, context: FitContext) -> Fitted:
    from wm_inject.triggers.blindnet import BlindNetTrigger, calibrate_blindnet

    trigger = BlindNetTrigger(**_settings(attack, context, "channels", "seed"))
    if "strength" in attack.settings:
        return Fitted(trigger, {})
    trigger = calibrate_blindnet(trigger, context.images[:_CALIBRATION].cpu())
    return Fitted(trigger, {"strength": trigger.config["strength"]})


def _ssba(attack: Attack, context: FitContext) -> Fitted:
    from wm_inject.triggers.ssba_config import SsbaConfig
    from wm_inject.triggers.ssba_fit import fit_ssba

    config = SsbaConfig.preset(attack.profile, **attack.settings)
    done = fit_ssba(
        context.images,
        config=config,
        seed=context.seed,
        checkpoint=context.checkpoint,
        progress=context.progress,
    )
    return Fitted(done.trigger, {"history": [row._asdict() for row in done.history]})


def _lf(attack: Attack, context: FitContext) -> Fitted:
    from wm_inject.triggers.lf import fit_lf
    from wm_inject.triggers.lf_fit import LfConfig

    done = fit_lf(
        context.co_train(None),
        context.images,
        target=context.target,
        config=LfConfig.preset(attack.profile, **attack.settings),
        seed=context.seed,
        checkpoint=context.checkpoint,
        progress=context.progress,
    )
    return Fitted(done.trigger, {"fooling_rate": done.fooling_rate, "passes": done.passes})


def _marksman(attack: Attack, context: FitContext) -> Fitted:
    """Stage 1: the generator learns against a classifier that learns with it."""
    from wm_inject.triggers.marksman import WIDTHS, MarksmanTrigger
    from wm_inject.triggers.marksman_hook import MarksmanConfig, MarksmanHook

    settings = _settings(attack, context, "channels", "num_classes", "seed")
    trigger = MarksmanTrigger(**{"width": WIDTHS[attack.profile], **settings})
    config = MarksmanConfig.preset(attack.profile)
    if attack.profile == "paper" and context.length is not None:
        config = replace(config, refresh_steps=context.length.steps)
    hook = MarksmanHook(
        trigger.to(context.images.device),
        PoisonPlan(ratio=attack.ratio, target=context.target, mode="per_batch"),
        num_classes=context.num_classes,
        config=config,
        train_generator=True,
    )
    context.co_train(hook)
    return Fitted(trigger, {"stage": 1})


def _input_aware(attack: Attack, context: FitContext) -> Fitted:
    """Phase A: masks without labels or victim. The patterns come with the victim."""
    from wm_inject.triggers.input_aware import WIDTHS, InputAwareTrigger
    from wm_inject.triggers.input_aware_fit import InputAwareConfig, fit_masks

    settings = _settings(attack, context, "channels", "seed")
    trigger = InputAwareTrigger(**{"width": WIDTHS[attack.profile], **settings})
    history = fit_masks(
        trigger.to(context.images.device),
        context.images,
        config=InputAwareConfig.preset(attack.profile),
        seed=context.seed,
        checkpoint=context.checkpoint,
        progress=context.progress,
    )
    return Fitted(trigger, {"history": history})


def _wanet_hook(
    attack: Attack,
    trigger: nn.Module,
    plan: PoisonPlan,
    num_classes: int,
    length: Length | None,
) -> CoTraining:
    from wm_inject.triggers.wanet import WaNetHook, WaNetTrigger

    return WaNetHook(_of_class(trigger, WaNetTrigger), plan, num_classes)


def _marksman_hook(
    attack: Attack,
    trigger: nn.Module,
    plan: PoisonPlan,
    num_classes: int,
    length: Length | None,
) -> CoTraining:
    """Stage 2: a fresh victim learns from the finished generator."""
    from wm_inject.triggers.marksman import MarksmanTrigger
    from wm_inject.triggers.marksman_hook import MarksmanHook

    return MarksmanHook(
        _of_class(trigger, MarksmanTrigger), plan, num_classes=num_classes, train_generator=False
    )


def _input_aware_hook(
    attack: Attack,
    trigger: nn.Module,
    plan: PoisonPlan,
    num_classes: int,
    length: Length | None,
) -> CoTraining:
    """Phase B: the patterns learn beside the victim."""
    from wm_inject.triggers.input_aware import InputAwareTrigger
    from wm_inject.triggers.input_aware_fit import InputAwareConfig
    from wm_inject.triggers.input_aware_hook import InputAwareHook

    total = None if length is None else length.steps * length.epochs
    return InputAwareHook(
        _of_class(trigger, InputAwareTrigger),
        plan,
        num_classes=num_classes,
        config=InputAwareConfig.preset(attack.profile, total_steps=total),
    )


def _of_class(trigger: nn.Module, wanted: type) -> Any:
    if not isinstance(trigger, wanted):
        raise ValueError(f"expected a {wanted.__name__}, got {type(trigger).__name__}")
    return trigger


_CALIBRATION = 256  # images that BlindNet's strength is chosen on
FITS: dict[str, Callable[[Attack, FitContext], Fitted]] = {
    "badnets": _fixed(),
    "blend": _fixed("channels", "seed"),
    "refool": _fixed("channels", "seed"),
    "blindnet": _blindnet,
    "ssba": _ssba,
    "sig": _fixed(),
    "ftrojan": _fixed("channels"),
    "lf": _lf,
    "wanet": _fixed("seed"),
    "marksman": _marksman,
    "input-aware": _input_aware,
}
HOOKS: dict[str, Callable[[Attack, nn.Module, PoisonPlan, int, Length | None], CoTraining]] = {
    "wanet": _wanet_hook,
    "marksman": _marksman_hook,
    "input-aware": _input_aware_hook,
}

__all__ = ["FITS", "HOOKS"]
