"""An attack by its name in the table: the baselines, and the two that plant the watermark."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from torch import Tensor, nn

from wm_eval.attacks.config import AttackStudyConfig
from wm_eval.measure import parameters
from wm_extract import JointConfig, train_jointly
from wm_inject import BlendTrigger, CoTraining, PoisonPlan, WatermarkTrigger, default_watermark
from wm_inject.attacks import FitContext, Fitted, Length, attack


class Plantable(Protocol):
    """What a study asks of an attack; `wm_inject.attacks.Attack` is one."""

    @property
    def ratio(self) -> float:
        """The share it poisons unless told otherwise."""

    @property
    def label_map(self) -> Literal["all-to-one", "clean-label"]:
        """How poisoned images are labelled."""

    @property
    def mode(self) -> Literal["static", "per_batch"]:
        """Whether the attack takes part in the victim's training."""

    def fit(self, context: FitContext) -> Fitted:
        """Make the trigger."""

    def plan(
        self, labels: Tensor, *, target: int, ratio: float | None = None, seed: int = 0
    ) -> PoisonPlan:
        """Whom it poisons."""

    def hook(
        self,
        trigger: nn.Module,
        plan: PoisonPlan,
        *,
        num_classes: int,
        length: Length | None = None,
    ) -> CoTraining | None:
        """What takes part in the victim's training, if anything does."""


@dataclass(frozen=True)
class MarkAttack:
    """Poison with the watermark: hidden by its own injector, or blended in as equation 2 has it.

    Args:
        name: "watermark" or "equation2".
        joint: Training of injector and extractor, for "watermark".
        weight: lambda of equation 2, for "equation2".

    Source: Wang et al., "Spy-Watermark", sections 2.1 (equation 2) and 2.2.
    """

    name: Literal["watermark", "equation2"]
    joint: JointConfig | None = None
    weight: float | None = None
    ratio: float = 0.1
    label_map: Literal["all-to-one", "clean-label"] = "all-to-one"
    mode: Literal["static", "per_batch"] = "static"

    def fit(self, context: FitContext) -> Fitted:
        """Train the injector with its extractor, or draw the picture that is blended in.

        Raises:
            ValueError: Images that the injector or the extractor cannot take.
            RuntimeError: The loss is no longer finite.
        """
        if self.joint is None:
            size, channels = context.shape["image_size"], context.shape["channels"]
            picture = default_watermark(size).repeat(channels, 1, 1)
            blend = BlendTrigger(alpha=self.weight or 0.0, picture=picture, **context.shape)
            return Fitted(blend.to(context.images.device).eval(), {})
        done = train_jointly(
            context.images,
            config=self.joint,
            seed=context.seed,
            checkpoint=context.checkpoint,
            progress=context.progress,
        )
        facts: dict[str, Any] = {
            "injector_parameters": parameters(done.injector),
            "history": [row._asdict() for row in done.history],
        }
        return Fitted(WatermarkTrigger(done.injector, watermark=done.watermark).eval(), facts)

    def plan(
        self, labels: Tensor, *, target: int, ratio: float | None = None, seed: int = 0
    ) -> PoisonPlan:
        """A static share of all images, relabelled."""
        return PoisonPlan(ratio=self.ratio if ratio is None else ratio, target=target, seed=seed)

    def hook(
        self,
        trigger: nn.Module,
        plan: PoisonPlan,
        *,
        num_classes: int,
        length: Length | None = None,
    ) -> CoTraining | None:
        """None: nothing takes part in training."""
        return None


class Planting(NamedTuple):
    """What a victim's training gets of an attack; all None for a clean victim."""

    trigger: nn.Module | None = None
    plan: PoisonPlan | None = None
    hook: CoTraining | None = None

    def arguments(self) -> dict[str, Any]:
        """For `wm_victim.train_classifier`: a plan and its trigger, or a hook."""
        if self.hook is not None:
            return {"hook": self.hook}
        return {} if self.plan is None else {"plan": self.plan, "trigger": self.trigger}

    def now(self) -> nn.Module | None:
        """The trigger as it is by now: a hook may have trained it."""
        trigger: nn.Module | None = getattr(self.hook, "trigger", self.trigger)
        return trigger


def table_attack(name: str, config: AttackStudyConfig) -> Plantable:
    """An attack of a study by its name in the table.

    Raises:
        ValueError: No such attack.
    """
    if name == "watermark":
        return MarkAttack("watermark", joint=config.joint)
    if name == "equation2":
        return MarkAttack("equation2", weight=config.weight)
    settings: Mapping[str, Any] = config.settings.get(name, {})
    return attack(name, profile=config.profile, **settings)
