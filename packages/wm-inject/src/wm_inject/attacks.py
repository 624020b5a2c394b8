"""Attacks by name: how each gets its trigger, whom it poisons, what it adds to training.

An attack is three answers. `Attack.fit` makes the trigger from clean images; `Attack.plan` says
which images are poisoned and how they are labelled; `Attack.hook` is what takes part in training,
where the attack does. Whoever trains a victim asks these three and knows no attack by name.

The learned watermark of Spy-Watermark is fitted together with its extractor, which lives in
wm-extract, so it is not in this list; with its trigger at hand it is a fixed attack like another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from wm_inject.images import check_images, check_labels
from wm_inject.poison import CoTraining, PoisonPlan
from wm_inject.triggers import build_trigger

Profile = Literal["tiny", "small", "paper"]
PROFILES = ("tiny", "small", "paper")


class Length(NamedTuple):
    """How long a victim is trained: some attacks' own schedules follow it."""

    steps: int  # in an epoch
    epochs: int


@dataclass(frozen=True)
class FitContext:
    """What an attack may use to make its trigger.

    Args:
        images: Clean training images, float32 ``(N, C, H, W)`` in [0, 1], square.
        labels: Their labels, int64 ``(N,)``.
        num_classes: K.
        target: The label that the attack asks for.
        seed: Seeds every draw.
        co_train: Trains a fresh classifier by the victim's own recipe and returns it: clean for
            None (a surrogate to search on), together with the attack for a hook.
        length: How long that training is, if it is known.
        checkpoint: A file to keep what is half done in, and to go on from.
        progress: Show how far it is.

    Raises:
        ValueError: Bad images or labels, or a target that is no class.
    """

    images: Tensor
    labels: Tensor
    num_classes: int
    target: int
    seed: int
    co_train: Callable[[CoTraining | None], nn.Module]
    length: Length | None = None
    checkpoint: Path | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        check_images(self.images)
        check_labels(self.labels, len(self.images), num_classes=self.num_classes)
        if self.images.shape[2] != self.images.shape[3]:
            raise ValueError(f"expected square images, got {tuple(self.images.shape[2:])}")
        if not 0 <= self.target < self.num_classes:
            raise ValueError(f"expected a target below {self.num_classes}, got {self.target}")

    @property
    def shape(self) -> dict[str, int]:
        """Image side and channels, as the triggers' settings call them."""
        return {"image_size": self.images.shape[3], "channels": self.images.shape[1]}


class Fitted(NamedTuple):
    """A trigger ready to poison with, and what its making came to (JSON values)."""

    trigger: nn.Module
    facts: dict[str, Any]


@dataclass(frozen=True)
class Attack:
    """One attack of the field's table.

    Args:
        name: The kind of its trigger.
        settings: Settings of the trigger beside its size and channels.
        profile: How much its fitting may cost: "tiny" (tests), "small" (a CPU), "paper".
        ratio: The share it poisons unless told otherwise.
        label_map: "all-to-one" or "clean-label".
        mode: "static", or "per_batch" where the attack takes part in training.

    Raises:
        ValueError: Another name or profile.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    profile: Profile = "small"
    ratio: float = 0.1
    label_map: Literal["all-to-one", "clean-label"] = "all-to-one"
    mode: Literal["static", "per_batch"] = "static"

    def __post_init__(self) -> None:
        if self.name not in _FITS:
            raise ValueError(f"expected an attack in {', '.join(ATTACKS)}, got {self.name!r}")
        if self.profile not in PROFILES:
            raise ValueError(f"expected a profile in {', '.join(PROFILES)}, got {self.profile!r}")

    def fit(self, context: FitContext) -> Fitted:
        """Make the trigger, on the CPU or wherever the images are.

        What is fitted by the library is fitted here; the generator of input-aware is left for the
        training of the victim, see `hook`.

        Raises:
            ValueError: Settings that the trigger does not take, or images that it cannot use.
        """
        try:
            fitted = _FITS[self.name](self, context)
        except TypeError as error:
            raise ValueError(f"expected settings of {self.name}: {error}") from error
        return Fitted(fitted.trigger.to(context.images.device).eval(), fitted.facts)

    def plan(
        self, labels: Tensor, *, target: int, ratio: float | None = None, seed: int = 0
    ) -> PoisonPlan:
        """Whom it poisons.

        Args:
            labels: The training labels, int64 ``(N,)``; a clean-label plan counts them.
            target: The label that the attack asks for.
            ratio: Share of the training set or of a batch; the attack's own if None. For a
                clean-label attack it is the share of the *target class*, so that no plan is
                impossible on a set whose classes are small (SIG's published 0.1 of all CIFAR-10
                images is 1.0 of the class, and cannot be drawn from GTSRB's class 0).
            seed: Seeds a static choice.

        Raises:
            ValueError: A ratio out of range, or no image of the target class.
        """
        ratio = self.ratio if ratio is None else ratio
        if self.label_map == "all-to-one":
            return PoisonPlan(ratio=ratio, target=target, mode=self.mode, seed=seed)
        check_labels(labels, len(labels))
        share = float((labels == target).float().mean())
        if share == 0:
            raise ValueError(f"expected images of the target class {target}, got none")
        return PoisonPlan(
            ratio=ratio * share, target=target, label_map="clean-label", pool="target", seed=seed
        )

    def hook(
        self,
        trigger: nn.Module,
        plan: PoisonPlan,
        *,
        num_classes: int,
        length: Length | None = None,
    ) -> CoTraining | None:
        """What takes part in the victim's training; None where a static plan is all there is.

        Args:
            trigger: What `fit` gave, on the device of the training.
            plan: What `plan` gave.
            num_classes: K.
            length: How long the training is; schedules that follow it are constant if None.

        Raises:
            ValueError: Another attack's trigger, or a plan that does not fit.
        """
        make = _HOOKS.get(self.name)
        return None if make is None else make(self, trigger, plan, num_classes, length)


def attack(name: str, *, profile: Profile = "small", **settings: Any) -> Attack:
    """An attack of the table by name, with its usual ratio and label map.

    Args:
        name: One of `ATTACKS`.
        profile: How much fitting may cost.
        settings: Settings of its trigger.

    Raises:
        ValueError: Another name or profile.
    """
    return Attack(name, settings, profile, **_USUAL.get(name, {}))


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
_FITS: dict[str, Callable[[Attack, FitContext], Fitted]] = {
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
_HOOKS: dict[str, Callable[[Attack, nn.Module, PoisonPlan, int, Length | None], CoTraining]] = {
    "wanet": _wanet_hook,
    "marksman": _marksman_hook,
    "input-aware": _input_aware_hook,
}
_USUAL: dict[str, dict[str, Any]] = {
    "sig": {"ratio": 0.5, "label_map": "clean-label"},
    "wanet": {"mode": "per_batch"},
    "marksman": {"ratio": 0.5, "mode": "per_batch"},
    "input-aware": {"mode": "per_batch"},
}
ATTACKS = tuple(_FITS)

__all__ = ["ATTACKS", "PROFILES", "Attack", "FitContext", "Fitted", "Length", "attack"]
