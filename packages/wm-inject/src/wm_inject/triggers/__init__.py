"""Triggers by name: build one from its settings, save it, load it back."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from wm_inject.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from wm_inject.triggers.badnets import BadNetsTrigger as BadNetsTrigger
from wm_inject.triggers.blend import BlendTrigger as BlendTrigger
from wm_inject.triggers.wanet import WaNetTrigger as WaNetTrigger

__all__ = [
    "TRIGGER_KINDS",
    "BadNetsTrigger",
    "BlendTrigger",
    "WaNetTrigger",
    "build_trigger",
    "load_trigger",
    "save_trigger",
]

# Where each kind lives; imported when asked for, because the watermark brings timm.
_CLASSES = {
    "blend": ("blend", "BlendTrigger"),
    "badnets": ("badnets", "BadNetsTrigger"),
    "wanet": ("wanet", "WaNetTrigger"),
    "watermark": ("watermark", "WatermarkTrigger"),
}
TRIGGER_KINDS = tuple(_CLASSES)


def build_trigger(
    kind: str, config: Mapping[str, Any], *, state: Mapping[str, Tensor] | None = None
) -> nn.Module:
    """Build a trigger from its kind and settings.

    Args:
        kind: "patch", "blend", "warp" or "watermark".
        config: The constructor's settings, as the trigger's ``config`` gives them.
        state: The trigger's tensors, as its ``state_dict`` gives them; fresh ones if None.

    Returns:
        The trigger, in evaluation mode.

    Raises:
        ValueError: An unknown kind, settings that the trigger does not take, or another's tensors.
    """
    if kind not in _CLASSES:
        raise ValueError(f"expected a trigger in {', '.join(TRIGGER_KINDS)}, got {kind!r}")
    if not isinstance(config, Mapping):
        raise ValueError(f"expected the settings of a {kind} trigger, got {type(config).__name__}")
    module, name = _CLASSES[kind]
    settings = dict(config)
    if kind == "blend" and state is not None and settings.get("picture") == "given":
        settings["picture"] = state.get("picture")
    trigger_class = getattr(import_module(f"{__name__}.{module}"), name)
    try:
        trigger: nn.Module = trigger_class(**settings)
    except TypeError as error:
        raise ValueError(f"expected the settings of a {kind} trigger: {error}") from error
    if state is not None:
        try:
            trigger.load_state_dict(state)
        except RuntimeError as error:
            told = " ".join(str(error).split())  # torch writes a line for each tensor
            raise ValueError(f"expected the tensors of this {kind} trigger: {told}") from error
    return trigger.eval()


def save_trigger(
    trigger: nn.Module, path: str | Path, metadata: Mapping[str, Any] | None = None
) -> None:
    """Write a trigger to a safetensors file that `load_trigger` reads back.

    Args:
        trigger: One of this package's triggers.
        path: The file to write, atomically.
        metadata: What else to record, such as the seed and data it was trained with.

    Raises:
        ValueError: Not a trigger of this package, or metadata that JSON cannot hold.
    """
    kind, config = getattr(trigger, "kind", None), getattr(trigger, "config", None)
    if kind not in _CLASSES or not isinstance(config, Mapping):
        raise ValueError(f"expected one of this package's triggers, got {type(trigger).__name__}")
    save_checkpoint(
        path, kind=str(kind), config=config, state=trigger.state_dict(), metadata=metadata
    )


def load_trigger(path: str | Path) -> nn.Module:
    """Read a trigger that `save_trigger` wrote; it gives the same bits as the one that was saved.

    Args:
        path: The safetensors file.

    Returns:
        The trigger, on the CPU, in evaluation mode.

    Raises:
        CheckpointError: Not a trigger's checkpoint, damaged, or its tensors do not fit it.
    """
    kind, config, state, _ = load_checkpoint(path, kind=TRIGGER_KINDS)
    try:
        return build_trigger(kind, config, state=state)
    except ValueError as error:
        raise CheckpointError(f"{Path(path).name} holds no usable trigger: {error}") from error
