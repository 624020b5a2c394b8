"""Triggers by name: build one from its settings, save it, load it back."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from wm_inject.core.checkpoint import CheckpointError, load_checkpoint, save_checkpoint

# Where each kind lives; imported when asked for, because the watermark brings timm.
_CLASSES = {
    "badnets": ("badnets", "BadNetsTrigger"),
    "blend": ("blend", "BlendTrigger"),
    "refool": ("refool", "RefoolTrigger"),
    "blindnet": ("blindnet", "BlindNetTrigger"),
    "ssba": ("ssba", "SsbaTrigger"),
    "sig": ("sig", "SigTrigger"),
    "ftrojan": ("ftrojan", "FTrojanTrigger"),
    "lf": ("lf", "LfTrigger"),
    "wanet": ("wanet", "WaNetTrigger"),
    "marksman": ("marksman", "MarksmanTrigger"),
    "input-aware": ("input_aware", "InputAwareTrigger"),
    "watermark": ("watermark", "WatermarkTrigger"),
}
_MODULES = {name: module for module, name in _CLASSES.values()}
TRIGGER_KINDS = tuple(_CLASSES)
__all__ = sorted([*_MODULES, "TRIGGER_KINDS", "build_trigger", "load_trigger", "save_trigger"])


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def build_trigger(
    kind: str, config: Mapping[str, Any], *, state: Mapping[str, Tensor] | None = None
) -> nn.Module:
    """Build a trigger from its kind and settings.

    Args:
        kind: One of `TRIGGER_KINDS`.
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
    # A picture that was given travels in the state, under the name of its setting.
    settings = {
        name: (state or {}).get(name) if isinstance(value, str) and value == "given" else value
        for name, value in config.items()
    }
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
