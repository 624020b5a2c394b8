"""What all triggers share: their settings as text, and the check of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from wm_inject.core.images import check_images


def show_config(trigger: Any) -> str:
    """The settings of a trigger, for ``repr``: its ``extra_repr``."""
    return ", ".join(f"{name}={value!r}" for name, value in trigger.config.items())


def check_batch(images: Tensor, config: Mapping[str, Any], *, name: str = "images") -> Tensor:
    """Check that a batch has the size, and the channels if any, of a trigger's settings."""
    size = (config["image_size"],) * 2
    return check_images(images, channels=config.get("channels"), size=size, name=name)
