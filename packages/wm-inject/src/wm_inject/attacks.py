"""Attacks by name: how each gets its trigger, whom it poisons, what it adds to training.

An attack is three answers. `Attack.fit` makes the trigger from clean images; `Attack.plan` says
which images are poisoned and how they are labelled; `Attack.hook` is what takes part in training,
where the attack does. Whoever trains a victim asks these three and knows no attack by name.

The learned watermark of Spy-Watermark is fitted together with its extractor, which lives in
wm-extract, so it is not in this list; with its trigger at hand it is a fixed attack like another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from wm_inject.attack_kinds import FITS, HOOKS
from wm_inject.core.images import check_labels
from wm_inject.core.plan import CoTraining, PoisonPlan
from wm_inject.fitting import FitContext, Fitted, Length

Profile = Literal["tiny", "small", "paper"]
PROFILES = ("tiny", "small", "paper")


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
        if self.name not in FITS:
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
            fitted = FITS[self.name](self, context)
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
        make = HOOKS.get(self.name)
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


_USUAL: dict[str, dict[str, Any]] = {
    "sig": {"ratio": 0.5, "label_map": "clean-label"},
    "wanet": {"mode": "per_batch"},
    "marksman": {"ratio": 0.5, "mode": "per_batch"},
    "input-aware": {"mode": "per_batch"},
}
ATTACKS = tuple(FITS)

__all__ = ["ATTACKS", "PROFILES", "Attack", "FitContext", "Fitted", "Length", "attack"]
