"""Neuron pruning: silence the penultimate neurons that a reversed trigger excites."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from defense_nc.mitigations.common import check_repair
from defense_nc.protocols import Repaired
from defense_nc.trigger import put_trigger
from wm_inject.core.images import quantize
from wm_inject.core.plan import Trigger
from wm_inject.core.presets import preset_of
from wm_victim.activations import last_linear, penultimate
from wm_victim.inference import predict


@dataclass(frozen=True, kw_only=True)
class NeuronPruning:
    """Neural Cleanse's second mitigation; it needs the reversed triggers and no training.

    Pruning stops when at most ``success_rate`` of other classes' images still reach the label.
    """

    name: ClassVar[str] = "neuron-pruning"
    cap: float = 0.3  # of the penultimate neurons may be pruned, at most, in (0, 1]
    success_rate: float = 0.05  # in [0, 1)

    def __post_init__(self) -> None:
        if not 0 < self.cap <= 1:
            raise ValueError(f"expected cap in (0, 1], got {self.cap}")
        if not 0 <= self.success_rate < 1:
            raise ValueError(f"expected success_rate in [0, 1), got {self.success_rate}")

    @classmethod
    def preset(cls, name: str = "fast", **changes: Any) -> NeuronPruning:
        """Named settings with changes; "paper" and "fast" are the same."""
        return preset_of(cls, {"paper": {}, "fast": {}}, name, **changes)

    def repair(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        *,
        triggers: Mapping[int, Trigger] | None = None,
        seed: int = 0,
        progress: bool = False,
    ) -> Repaired:
        """Prune a copy, neuron by neuron, until the reversed triggers no longer work.

        Labels are taken in order, with one cap for all; nothing is drawn. The log has, for each
        label, the neurons pruned for it in order and the trigger's success before and after; and
        the accuracy on the images before and after.

        Raises:
            ValueError: As `check_repair`, no trigger, a label that the model does not have, no
                image of another class, or a model whose last linear layer does not give the logits.

        Source: Neural Cleanse, section VI-B. The cap is the paper's; ``success_rate`` is ours.
        """
        num_classes = check_repair(model, images, labels)
        pairs = _check_triggers(triggers, num_classes)
        pruned_model = copy.deepcopy(model).eval()
        head = last_linear(pruned_model)
        images, labels = images.to(head.weight.device), labels.to(head.weight.device)
        clean = penultimate(pruned_model, images)  # (N, F)
        _check_head(pruned_model, head, images, clean)
        keep = torch.ones(head.in_features, device=clean.device)
        before = _agreement(head, clean * keep, labels)
        pruned_labels = []
        for label, trigger in pairs:
            others = labels != label
            if not bool(others.any()):
                raise ValueError(f"expected images of other classes than {label}, found none")
            triggered = penultimate(pruned_model, quantize(put_trigger(trigger, images[others])))
            pruned_labels.append(self._prune(head, clean[others], triggered, label, keep))
        with torch.no_grad():
            head.weight.mul_(keep)
        log = {
            "labels": pruned_labels,
            "pruned": int((keep == 0).sum()),
            "neurons": head.in_features,
            "accuracy": [before, _agreement(head, clean, labels)],
        }
        return Repaired(pruned_model, log)

    def _prune(
        self, head: nn.Linear, clean: Tensor, triggered: Tensor, label: int, keep: Tensor
    ) -> dict[str, Any]:
        """Zero ``keep`` from the most excited neuron down; return the log of one label."""
        order = (triggered.mean(0) - clean.mean(0)).sort(descending=True, stable=True).indices
        goal = torch.full((len(triggered),), label, device=triggered.device)
        start = success = _agreement(head, triggered * keep, goal)
        pruned: list[int] = []
        for neuron in order.tolist():
            if success <= self.success_rate or int((keep == 0).sum()) >= int(self.cap * len(keep)):
                break
            if keep[neuron] == 0:
                continue
            keep[neuron] = 0
            pruned.append(neuron)
            success = _agreement(head, triggered * keep, goal)
        return {"label": label, "neurons": pruned, "success": [start, success]}


def _check_triggers(
    triggers: Mapping[int, Trigger] | None, num_classes: int
) -> list[tuple[int, Trigger]]:
    if not triggers:
        raise ValueError("expected the reversed trigger of at least one label, got none")
    for label in triggers:
        if not isinstance(label, int) or not 0 <= label < num_classes:
            raise ValueError(f"expected triggers of labels in 0 .. {num_classes - 1}, got {label}")
    return sorted(triggers.items())


def _check_head(model: nn.Module, head: nn.Linear, images: Tensor, clean: Tensor) -> None:
    logits = predict(model, images[:8])
    with torch.no_grad():
        if not torch.allclose(head(clean[:8]), logits, atol=1e-4):
            raise ValueError("expected logits from the model's last linear layer, got others")


def _agreement(head: nn.Linear, features: Tensor, labels: Tensor) -> float:
    """Share of the rows that are classified as their label."""
    with torch.no_grad():
        return float((head(features).argmax(1) == labels).double().mean())
