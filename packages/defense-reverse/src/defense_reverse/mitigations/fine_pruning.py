"""Fine-pruning: switch off the channels that are least active on clean images, then fine-tune."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from defense_nc.mitigations import Sgd, check_repair, fine_tune, sgd_preset, trainable
from defense_nc.protocols import Repaired
from defense_reverse.mitigations.channels import ChannelMask, fold, mean_activations
from wm_inject.core.plan import Trigger
from wm_inject.core.progress import progress as show_progress
from wm_victim.activations import conv_stages, get_layer
from wm_victim.inference import frozen, predict


@dataclass(frozen=True, kw_only=True)
class FinePruning:
    """Prune the least active channels of the last maps, as many as accuracy allows, then fine-tune.

    Args:
        sgd: How it is fine-tuned.
        tolerance: Pruning ends before validation accuracy falls by this share of itself, in (0, 1).
        prune_step: Share of the channels that goes at a time, in (0, 1].
        validation_share: Share of the clean images that judges the accuracy, in (0, 1); the
            channels are ranked on the others. The fine-tuning has all of them.
        layer: Name of the layer to prune; the end of the last stage (`conv_stages`) if None.

    Source: Liu, Dolan-Gavitt and Garg 2018, section 4. Validation images of their own, and the mean
        absolute activation where the maps have no ReLU behind them, are ours.
    """

    name: ClassVar[str] = "fine-pruning"
    sgd: Sgd = Sgd()
    tolerance: float = 0.1
    prune_step: float = 0.05
    validation_share: float = 0.2
    layer: str | None = None

    def __post_init__(self) -> None:
        if not 0 < self.tolerance < 1 or not 0 < self.validation_share < 1:
            raise ValueError(
                "expected tolerance and validation_share in (0, 1), "
                f"got {self.tolerance}, {self.validation_share}"
            )
        if not 0 < self.prune_step <= 1:
            raise ValueError(f"expected prune_step in (0, 1], got {self.prune_step}")

    @classmethod
    def preset(cls, name: str = "fast", **changes: Any) -> FinePruning:
        """Settings by name, with changes.

        "paper" is BackdoorBench's: one channel in a hundred at a time, then 100 passes over 2,500
        images in batches of 256. "fast" prunes in steps of five in a hundred and takes 200
        batches of 32 at 0.02, for small networks (ours).
        """
        return sgd_preset(cls, PRESETS, name, **changes)

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
        """Prune and fine-tune a copy of ``model``.

        A hook holds the pruned channels at 0. The log holds the layer, the pruned channels in their
        order, the validation accuracies, ``in_weights`` (whether a file of the weights alone keeps
        the pruning: true where a linear layer reads the pruned maps, as in all classifiers of
        `wm_victim`), and the loss of each tenth of the fine-tuning.

        Raises:
            ValueError: A network without spatial maps, or no such layer.
            DivergedError: The loss became NaN or infinite.
        """
        check_repair(model, images, labels)
        pruned = copy.deepcopy(model)
        device = trainable(pruned)[0].device
        images, labels = images.to(device), labels.to(device)
        layer = self.layer or conv_stages(pruned, images)[-1]
        choice = self._prune(pruned, layer, images, labels, seed=seed, progress=progress)
        keep = torch.ones(choice.channels, dtype=torch.bool)
        keep[list(choice.pruned)] = False
        get_layer(pruned, layer).register_forward_hook(ChannelMask(keep))
        losses = fine_tune(pruned, images, labels, sgd=self.sgd, seed=seed, progress=progress)
        log = {
            "steps": self.sgd.steps,
            "layer": layer,
            "channels": choice.channels,
            "pruned": list(choice.pruned),
            "accuracies": list(choice.accuracies),
            "in_weights": fold(pruned, layer, keep, images[:8]),
            "losses": losses,
        }
        return Repaired(pruned, log)

    def _prune(
        self,
        model: nn.Module,
        layer: str,
        images: Tensor,
        labels: Tensor,
        *,
        seed: int,
        progress: bool,
    ) -> _Choice:
        """Choose what to prune. The model is not changed."""
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        held_out = min(len(images) - 1, max(1, round(self.validation_share * len(images))))
        validation, ranking = (
            part.to(images.device)
            for part in order.split_with_sizes([held_out, len(images) - held_out])
        )
        ranked = mean_activations(model, layer, images[ranking]).argsort(stable=True)
        keep = torch.ones(len(ranked), dtype=torch.bool)
        accuracies: list[float] = []
        best = 0
        handle = get_layer(model, layer).register_forward_hook(ChannelMask(keep))
        try:
            bar = show_progress(self._counts(len(ranked)), desc="pruning", enabled=progress)
            for count in bar:
                keep[ranked[:count]] = False
                accuracies.append(_accuracy(model, images[validation], labels[validation]))
                if accuracies[-1] <= (1 - self.tolerance) * accuracies[0] and count:
                    break
                best = count
        finally:
            handle.remove()
        return _Choice(tuple(ranked[:best].tolist()), tuple(accuracies), len(ranked))

    def _counts(self, channels: int) -> list[int]:
        """How many channels are off at each step: none first, and never all of them."""
        steps = int(1 / self.prune_step) + 1
        counts = (round(i * self.prune_step * channels) for i in range(steps + 1))
        return sorted({min(channels - 1, count) for count in counts})


class _Choice(NamedTuple):
    pruned: tuple[int, ...]  # the least active first
    accuracies: tuple[float, ...]  # on the validation images, nothing pruned first
    channels: int


PRESETS: dict[str, dict[str, Any]] = {
    "fast": {},
    "paper": {
        "steps": 1000,
        "batch_size": 256,
        "lr": 0.01,
        "augmentation": "crop-flip",
        "prune_step": 0.01,
    },
}


def _accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    with frozen(model):
        right = predict(model, images).argmax(1) == labels
    return float(right.double().mean())
