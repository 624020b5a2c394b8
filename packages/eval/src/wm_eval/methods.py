"""Every mitigation by the name it has in the tables. None is imported before it is used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from wm_eval.titles import AUDIT

if TYPE_CHECKING:
    from defense_nc.protocols import Mitigator

_UNLEARNING = "defense_nc.mitigations.unlearning:Unlearning"
# Neural Cleanse puts its trigger on a fifth of the images, the reverse-generator paper adds a
# triggered copy of each.
_GENERATORS: tuple[str, dict[str, Any]] = (_UNLEARNING, {"trigger_share": 1.0, "append": True})
_METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "fine-tuning": ("defense_reverse.mitigations.fine_tuning:FineTuning", {}),
    "unlearning-nc": (_UNLEARNING, {"trigger_share": 0.2, "append": False}),
    "unlearning-reverse": _GENERATORS,
    "unlearning-uap": _GENERATORS,
    "unlearning-warp": _GENERATORS,
    "unlearning-audit": _GENERATORS,
    "unlearning-reverse-lpips": _GENERATORS,
    "head-unlearning": ("defense_reverse.mitigations.head_unlearning:HeadUnlearning", {}),
    "neuron-pruning": ("defense_nc.mitigations.neuron_pruning:NeuronPruning", {}),
    "nad": ("defense_reverse.mitigations.nad:NAD", {}),
    "fine-pruning": ("defense_reverse.mitigations.fine_pruning:FinePruning", {}),
    "anp": ("defense_reverse.mitigations.anp:ANP", {}),
    "i-bau": ("defense_reverse.mitigations.i_bau:IBAU", {}),
    "ft-sam": ("defense_reverse.mitigations.ft_sam:FTSAM", {}),
    "clp": ("defense_reverse.mitigations.channel_lipschitz:ChannelLipschitzPruning", {}),
    "fst": ("defense_reverse.mitigations.feature_shift:FeatureShiftTuning", {}),
}
_SCANS = {"neuron-pruning": ("nc",), "head-unlearning": ("head",), "unlearning-audit": AUDIT}
# Fine-tuning by the settings of unlearning: what the triggers add is the difference.
CONTROLS = {"control-nc": "unlearning-nc", "control": "unlearning-reverse"}
_STEPLESS = ("neuron-pruning", "clp", "head-unlearning")  # they run no optimiser on the network


def build_method(name: str, *, steps: int, preset: str = "fast", **changes: Any) -> Mitigator:
    """A mitigation by its name, to run for so many optimiser steps.

    Args:
        name: One of `wm_eval.titles.METHODS`.
        steps: Optimiser steps. What only prunes takes none.
        preset: Of the method's own settings, "fast" or "paper", or another that it has.
        changes: Settings that differ from the preset's.

    Raises:
        ValueError: No such method or preset, or a setting that it refuses.
    """
    if name in CONTROLS:
        from defense_reverse.mitigations.fine_tuning import FineTuning

        unlearning = build_method(CONTROLS[name], steps=steps, preset=preset, **changes)
        return FineTuning(sgd=unlearning.sgd)  # type: ignore[attr-defined]
    if name not in _METHODS:
        known = ", ".join((*CONTROLS, *_METHODS))
        raise ValueError(f"expected a method out of {known}, got {name!r}")
    module, _, kind = _METHODS[name][0].partition(":")
    settings = {**_METHODS[name][1], **({} if name in _STEPLESS else {"steps": steps}), **changes}
    built: Mitigator = getattr(import_module(module), kind).preset(preset, **settings)
    return built


def detectors_of(method: str) -> tuple[str, ...]:
    """Whose labels and reversed triggers a method works with; several are judged together."""
    if method in _SCANS:
        return _SCANS[method]
    return (method.removeprefix("unlearning-"),) if method.startswith("unlearning-") else ()


def rescanned(method: str) -> bool:
    """Whether a method leaves a classifier that its detector can scan again."""
    return method.startswith("unlearning-") and len(detectors_of(method)) == 1
