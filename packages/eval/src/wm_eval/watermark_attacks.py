"""The triggers of the two attacks with the watermark: hidden by an injector, or blended in."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from wm_eval.config import WatermarkConfig
from wm_eval.measure import parameters
from wm_extract import UNetExtractor, train_jointly
from wm_inject import (
    BlendTrigger,
    WatermarkTrigger,
    default_watermark,
    load_image,
    pretrained_card,
    to_float,
)
from wm_victim import ImageSet


class Watermark(NamedTuple):
    """The watermark's trigger, its extractor if there is one, and facts for a record."""

    trigger: nn.Module
    extractor: UNetExtractor | None
    facts: dict[str, Any]


def fit_watermark(
    config: WatermarkConfig, images: ImageSet, *, seed: int, checkpoint: Path, progress: bool
) -> Watermark:
    """Train injector and extractor together, or take them ready-made.

    Raises:
        ValueError: Images that the networks cannot take.
        RuntimeError: The loss is no longer finite.

    Source: Wang et al., "Spy-Watermark", section 2.2.
    """
    channels, size = images.images.shape[1:3]
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


def blend_watermark(config: WatermarkConfig, images: ImageSet) -> Watermark:
    """Blend the watermark's picture in, as equation 2 has it.

    Source: Wang et al., "Spy-Watermark", section 2.1.
    """
    channels, size = images.images.shape[1:3]
    picture = default_watermark(size).repeat(channels, 1, 1)
    blend = BlendTrigger(alpha=config.weight, picture=picture, image_size=size, channels=channels)
    return Watermark(blend, None, {})


def _ready_made(config: WatermarkConfig, channels: int, size: int) -> Watermark:
    name = str(config.pretrained)
    card = pretrained_card(name)
    if card["channels"] != channels or size < card["image_size"]:
        raise ValueError(
            f"expected images of {card['channels']} channels and at least {card['image_size']} px "
            f"for the weights {name}, got {channels} and {size}"
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
