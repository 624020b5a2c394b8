"""What an attack is: its facts, how its trigger is made, whom it poisons, its part in training."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from wm_inject.core.checks import check_choice
from wm_inject.core.images import check_images, check_labels
from wm_inject.core.plan import CoTraining, LabelMap, PoisonPlan

if TYPE_CHECKING:
    from torch import Tensor, nn

Profile = Literal["tiny", "small", "paper"]
PROFILES = ("tiny", "small", "paper")
Needs = Literal["nothing", "images", "clean-classifier", "co-training", "victim", "extractor"]
_FIT_COMMANDS = {
    "images": "wm-inject fit --trigger {} IMAGES FILE",
    "extractor": "wm-extract train IMAGES --out FOLDER",
}


class Length(NamedTuple):
    """How long a victim is trained: some attacks' own schedules follow it."""

    steps: int  # in an epoch
    epochs: int


@dataclass(frozen=True)
class FitContext:
    """What an attack may use to make its trigger.

    Args:
        images: Clean training images, square.
        co_train: For None, a clean classifier of the victim's recipe and seed; for a hook, a fresh
            classifier of other first weights, trained together with that hook.
        length: How long that training is, if it is known.

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
    """A trigger ready to poison with, and measurements of its fit (JSON values)."""

    trigger: nn.Module
    facts: dict[str, Any]


@dataclass(frozen=True)
class Attack:
    """One attack. Each file of this folder has one as its constant ``ATTACK``.

    Args:
        name: On command lines and in records; also the ``kind`` of its trigger.
        needs: What making the trigger takes: "nothing" but settings, clean "images", a
            "clean-classifier" to search on, "co-training" with a classifier of the attacker's own,
            the "victim"'s training, which finishes it, or the watermark's "extractor".
        mode: "static", or "per_batch" for an attack that takes part in training.
        ratio: Its usual poison ratio; of the target class if clean-label.
        config: The settings of its fit, a class with ``preset(profile)``; None if it has none.
        fitter: Makes the trigger; None builds it from its settings.
        co_training: Makes the training hook; None for an attack without.
        settings: Settings of the trigger (or of its fit) that differ from the defaults.
        profile: How much the fit may cost: "tiny" (tests), "small" (a CPU), "paper".

    Raises:
        ValueError: Another profile.
    """

    name: str
    title: str
    trigger: type[nn.Module]
    needs: Needs = "nothing"
    mode: Literal["static", "per_batch"] = "static"
    label_map: LabelMap = "all-to-one"
    ratio: float = 0.1
    config: type | None = None
    fitter: Callable[[Attack, FitContext], Fitted] | None = None
    co_training: Callable[[Attack, Any, PoisonPlan, int, Length | None], CoTraining] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    profile: Profile = "small"

    def __post_init__(self) -> None:
        check_choice("a profile", self.profile, PROFILES)

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names of the trigger's settings."""
        return tuple(inspect.signature(self.trigger).parameters)

    @property
    def fit_command(self) -> str | None:
        """The command that fits the trigger; None for one that its settings are enough for."""
        if self.needs == "nothing":
            return None
        train = "wm-victim train --attack {} --save-trigger FILE"
        return _FIT_COMMANDS.get(self.needs, train).format(self.name)

    def build(self, context: FitContext, **defaults: Any) -> Any:
        """An unfitted trigger for these images: ``defaults`` and the attack's own settings."""
        known = {**context.shape, "num_classes": context.num_classes, "seed": context.seed}
        given = {name: value for name, value in known.items() if name in self.parameters}
        return self.trigger(**{**given, **defaults, **self.settings})

    def fit_config(self, **changes: Any) -> Any:
        """The settings of the fit at this attack's profile."""
        assert self.config is not None
        return self.config.preset(self.profile, **changes)  # type: ignore[attr-defined]

    def fit(self, context: FitContext) -> Fitted:
        """Make the trigger, where the images are, in evaluation mode.

        Raises:
            ValueError: Settings that the trigger does not take, images that it cannot use, or a
                trigger that is fitted elsewhere.
        """
        if self.needs == "extractor":
            raise ValueError(f'expected an attack that is fitted here; use "{self.fit_command}"')
        try:
            if self.fitter is None:
                fitted = Fitted(self.build(context), {})
            else:
                fitted = self.fitter(self, context)
        except TypeError as error:
            raise ValueError(f"expected settings of {self.name}: {error}") from error
        return Fitted(fitted.trigger.to(context.images.device).eval(), fitted.facts)

    def plan(
        self, labels: Tensor, *, target: int, ratio: float | None = None, seed: int = 0
    ) -> PoisonPlan:
        """Which images it poisons.

        Args:
            labels: The training labels; a clean-label plan counts them.
            ratio: Share of the training set or of a batch; the attack's own if None. For a
                clean-label attack, the share of the *target class*: SIG's published 0.1 of all
                images could not be drawn from a small class. For a source-specific one, the share
                of the source, which is the class after the target.
        """
        ratio = self.ratio if ratio is None else ratio
        common: dict[str, Any] = {"target": target, "label_map": self.label_map, "seed": seed}
        if self.label_map in ("all-to-one", "all-to-all"):
            return PoisonPlan(ratio=ratio, mode=self.mode, **common)
        check_labels(labels, len(labels))
        chosen, name = target, "target"
        if self.label_map == "clean-label":
            common["pool"] = "target"
        else:
            chosen, name = source_of(target, int(labels.max()) + 1), "source"
            common["source"] = chosen
        share = float((labels == chosen).float().mean())
        if share == 0:
            raise ValueError(f"expected images of the {name} class {chosen}, got none")
        return PoisonPlan(ratio=ratio * share, **common)

    def hook(
        self,
        trigger: nn.Module,
        plan: PoisonPlan,
        *,
        num_classes: int,
        length: Length | None = None,
    ) -> CoTraining | None:
        """The attack's part in the victim's training; None for a static attack.

        Schedules that follow ``length`` are constant if it is None.

        Raises:
            ValueError: Another attack's trigger, or a plan that does not fit.
        """
        if self.co_training is None:
            return None
        if not isinstance(trigger, self.trigger):
            expected = self.trigger.__name__
            raise ValueError(f"expected a {expected}, got {type(trigger).__name__}")
        return self.co_training(self, trigger, plan, num_classes, length)

    def to_dict(self) -> dict[str, Any]:
        """What tells this attack from the same one with other settings (JSON values)."""
        names = ("name", "profile", "ratio", "label_map", "mode")
        return {**{name: getattr(self, name) for name in names}, "settings": dict(self.settings)}


def source_of(target: int, num_classes: int) -> int:
    """The source of a source-specific attack on a target: the class after it."""
    return (target + 1) % num_classes
