"""Every mitigation by the name it has in the tables. None is imported before it is used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from defense_nc.protocols import Mitigator

_UNLEARNING = "defense_nc.mitigations.unlearning:Unlearning"
# Where each lives, and what it is told beside the steps: Neural Cleanse puts its trigger on a fifth
# of the images, the reverse-generator paper adds a triggered copy of each.
_HOMES: dict[str, tuple[str, dict[str, Any]]] = {
    "fine-tuning": ("defense_reverse.mitigations.fine_tuning:FineTuning", {}),
    "unlearning-nc": (_UNLEARNING, {"trigger_share": 0.2, "append": False}),
    "unlearning-reverse": (_UNLEARNING, {"trigger_share": 1.0, "append": True}),
    "neuron-pruning": ("defense_nc.mitigations.neuron_pruning:NeuronPruning", {}),
    "nad": ("defense_reverse.mitigations.nad:NAD", {}),
    "fine-pruning": ("defense_reverse.mitigations.fine_pruning:FinePruning", {}),
    "anp": ("defense_reverse.mitigations.anp:ANP", {}),
    "i-bau": ("defense_reverse.mitigations.i_bau:IBAU", {}),
    "ft-sam": ("defense_reverse.mitigations.ft_sam:FTSAM", {}),
}
_STEPLESS = ("neuron-pruning",)  # prunes until the reversed trigger fails: nothing is trained


def build_method(name: str, *, steps: int, preset: str = "fast", **changes: Any) -> Mitigator:
    """A mitigation by its name, to run for so many optimiser steps.

    Args:
        name: One of `wm_eval.cleaning.config.TITLES`.
        steps: Optimiser steps. Neuron pruning takes none.
        preset: Of the method's own settings, "fast" or "paper", or another that it has.
        changes: Settings that differ from the preset's.

    Raises:
        ValueError: No such method or preset, or a setting that it refuses.
    """
    if name == "control":
        twin = build_method("unlearning-reverse", steps=steps, preset=preset, **changes)
        return _without_triggers(twin)
    if name not in _HOMES:
        known = ", ".join(("control", *_HOMES))
        raise ValueError(f"expected a method out of {known}, got {name!r}")
    where, told = _HOMES[name]
    module, _, kind = where.partition(":")
    made = getattr(import_module(module), kind)
    settings = told | ({} if name in _STEPLESS else {"steps": steps}) | changes
    built: Mitigator = made.preset(preset, **settings)
    return built


def _without_triggers(unlearning: Mitigator) -> Mitigator:
    """Fine-tuning by the settings of unlearning: the control of what the triggers add."""
    from defense_reverse.mitigations.fine_tuning import FineTuning

    return FineTuning(sgd=unlearning.sgd)  # type: ignore[attr-defined]


__all__ = ["build_method"]
