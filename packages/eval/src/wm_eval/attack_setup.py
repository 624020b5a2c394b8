"""The two attacks with the watermark, and what a victim's training gets of any attack."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from wm_eval.config import WatermarkConfig, plain
from wm_eval.measure import parameters
from wm_extract import UNetExtractor, train_jointly
from wm_inject import (
    BlendTrigger,
    CoTraining,
    PoisonPlan,
    WatermarkTrigger,
    default_watermark,
    load_image,
    pretrained_card,
    to_float,
)
from wm_inject.attacks import Attack, Length
from wm_victim import ImageSet


@dataclass(frozen=True)
class WatermarkAttack:
    """Poison with the watermark: hidden by its own injector, or blended in as equation 2 has it.

    Args:
        name: "watermark" or "equation2".
        config: How the trigger is made.

    Source: Wang et al., "Spy-Watermark", sections 2.1 (equation 2) and 2.2.
    """

    name: Literal["watermark", "equation2"]
    config: WatermarkConfig
    ratio = 0.1
    label_map: Literal["all-to-one", "clean-label"] = "all-to-one"
    mode: Literal["static", "per_batch"] = "static"

    @property
    def described(self) -> dict[str, Any]:
        """What the trigger depends on, for a record."""
        config = plain(self.config)
        if self.name == "equation2":
            return {"name": self.name, "weight": config["weight"]}
        made = "joint" if self.config.pretrained is None else "pretrained"
        return {"name": self.name, made: config[made], "strength": config["strength"]}

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


TableAttack = Attack | WatermarkAttack


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


class Watermark(NamedTuple):
    """The watermark's trigger, its extractor if there is one, and facts for a record."""

    trigger: nn.Module
    extractor: UNetExtractor | None
    facts: dict[str, Any]


def fit_watermark(
    attack: WatermarkAttack,
    images: ImageSet,
    *,
    seed: int,
    checkpoint: Path,
    progress: bool,
) -> Watermark:
    """Train injector and extractor, take them ready-made, or draw the picture to blend in.

    Raises:
        ValueError: Images that the networks cannot take.
        RuntimeError: The loss is no longer finite.
    """
    config = attack.config
    channels, size = images.images.shape[1:3]
    if attack.name == "equation2":
        picture = default_watermark(size).repeat(channels, 1, 1)
        blend = BlendTrigger(
            alpha=config.weight, picture=picture, image_size=size, channels=channels
        )
        return Watermark(blend, None, {})
    if config.pretrained is not None:
        return _ready_made(config, channels, size)
    picture = None
    if config.picture is not None:
        picture = to_float(load_image(config.picture, size=size, channels=1)[None])[0]
    trained = train_jointly(
        images.images,
        config=config.joint,
        watermark=picture,
        seed=seed,
        checkpoint=checkpoint,
        progress=progress,
    )
    trigger = WatermarkTrigger(
        trained.injector.cpu(), watermark=trained.watermark.cpu(), strength=config.strength
    )
    facts = {
        "recipe": config.joint.recipe,
        "size": config.joint.size,
        "injector_parameters": parameters(trained.injector),
        "extractor_parameters": parameters(trained.extractor),
        "history": [row._asdict() for row in trained.history],
    }
    return Watermark(trigger, trained.extractor, facts)


def _ready_made(config: WatermarkConfig, channels: int, size: int) -> Watermark:
    name = str(config.pretrained)
    card = pretrained_card(name)
    if (card["channels"], card["image_size"]) != (channels, size):
        raise ValueError(
            f"expected images of {card['channels']} channels and {card['image_size']} px for the "
            f"weights {name}, got {channels} and {size}"
        )
    ready = WatermarkTrigger.from_pretrained(name)
    trigger = WatermarkTrigger(ready.injector, watermark=ready.watermark, strength=config.strength)
    extractor = UNetExtractor.from_pretrained(name)
    facts = {
        "recipe": card["recipe"],
        "size": card["size"],
        "trained_on": card["data"],
        "injector_parameters": parameters(trigger),
        "extractor_parameters": parameters(extractor),
    }
    return Watermark(trigger, extractor, facts)


__all__ = ["Planting", "TableAttack", "Watermark", "WatermarkAttack", "fit_watermark"]
