"""Triggers by kind: build one from its settings, save it, load it back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from wm_inject.attacks import ATTACKS, TRIGGER_KINDS
from wm_inject.core.checkpoint import CheckpointError, load_checkpoint, save_checkpoint


def build_trigger(
    kind: str, config: Mapping[str, Any], *, state: Mapping[str, Tensor] | None = None
) -> nn.Module:
    """Build a trigger, in evaluation mode.

    Args:
        kind: One of `wm_inject.attacks.TRIGGER_KINDS`.
        config: The constructor's settings, as the trigger's ``config`` gives them.
        state: The trigger's tensors, as its ``state_dict`` gives them; fresh ones if None.

    Raises:
        ValueError: An unknown kind, settings that the trigger does not take, or another's tensors.
    """
    if kind not in ATTACKS:
        raise ValueError(f"expected a trigger in {', '.join(TRIGGER_KINDS)}, got {kind!r}")
    if not isinstance(config, Mapping):
        raise ValueError(f"expected the settings of a {kind} trigger, got {type(config).__name__}")
    # A picture that was given travels in the state, under the name of its setting.
    settings = {
        name: (state or {}).get(name) if isinstance(value, str) and value == "given" else value
        for name, value in config.items()
    }
    try:
        trigger = ATTACKS[kind].trigger(**settings)
    except TypeError as error:
        raise ValueError(f"expected the settings of a {kind} trigger: {error}") from error
    if state is not None:
        try:
            trigger.load_state_dict(state)
        except RuntimeError as error:
            reason = " ".join(str(error).split())  # torch writes a line for each tensor
            raise ValueError(f"expected the tensors of this {kind} trigger: {reason}") from error
    return trigger.eval()


def save_trigger(
    trigger: nn.Module, path: str | Path, metadata: Mapping[str, Any] | None = None
) -> None:
    """Write a trigger to a safetensors file that `load_trigger` reads back.

    Args:
        trigger: One of this package's triggers.
        metadata: What else to record, such as the seed and data it was trained with.

    Raises:
        ValueError: Not a trigger of this package, or metadata that JSON cannot hold.
    """
    kind, config = getattr(trigger, "kind", None), getattr(trigger, "config", None)
    if kind not in TRIGGER_KINDS or not isinstance(config, Mapping):
        raise ValueError(f"expected one of this package's triggers, got {type(trigger).__name__}")
    save_checkpoint(
        path, kind=str(kind), config=config, state=trigger.state_dict(), metadata=metadata
    )


def load_trigger(path: str | Path) -> nn.Module:
    """Read a trigger, on the CPU, in evaluation mode; it gives the same bits as the saved one.

    Raises:
        CheckpointError: Not a trigger's checkpoint, damaged, or its tensors do not fit it.
    """
    kind, config, state, _ = load_checkpoint(path, kind=TRIGGER_KINDS)
    try:
        return build_trigger(kind, config, state=state)
    except ValueError as error:
        raise CheckpointError(f"{Path(path).name} holds no usable trigger: {error}") from error
