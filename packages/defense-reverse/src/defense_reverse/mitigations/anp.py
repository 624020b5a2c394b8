"""ANP: prune the channels that break first when batch normalisation is disturbed."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from defense_nc.batches import training_batches
from defense_nc.mitigations import check_repair
from defense_nc.protocols import Repaired
from wm_inject.core.plan import Trigger
from wm_inject.core.presets import preset_of
from wm_inject.core.progress import progress as show_progress
from wm_inject.core.randomness import seeded
from wm_victim.inference import predict

Masks = dict[str, Tensor]  # name of a normalisation -> (C,) in [0, 1]
Noise = dict[str, Tensor]  # name of a normalisation -> (2, C): of the weights, of the biases
_THRESHOLDS = tuple(round(0.05 * step, 2) for step in range(20))  # 0, 0.05 .. 0.95


@dataclass(frozen=True, kw_only=True)
class ANP:
    """Adversarial neuron pruning: learn which channels a disturbance breaks, and prune those.

    Source: Wu and Wang, "Adversarial Neuron Pruning Purifies Backdoored Deep Models", 2021, and its
        released code. There the images of a step are drawn with replacement, and the sweep of
        thresholds looks at the test set; here it sees only images that are held out.
    """

    name: ClassVar[str] = "anp"
    steps: int = 100  # for the masks
    batch_size: int = 32
    lr: float = 0.05  # of SGD, for the masks
    momentum: float = 0.9
    noise: float = 0.4  # disturbance relative to weights and biases, in [0, 1]
    noise_steps: int = 1  # steps of sign ascent of the disturbance in each optimiser step
    clean_weight: float = 0.2  # of the undisturbed loss, in [0, 1]; the disturbed one has the rest
    holdout: float = 0.2  # share of the images that only chooses the threshold, in (0, 1)
    tolerance: float = 0.05  # accuracy on them that pruning may cost, in [0, 1)

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 2 or self.noise_steps < 1:
            raise ValueError(
                "expected steps >= 1, batch_size >= 2 and noise_steps >= 1, "
                f"got {self.steps}, {self.batch_size}, {self.noise_steps}"
            )
        if not self.lr > 0 or not 0 <= self.momentum < 1:
            raise ValueError(
                f"expected lr > 0 and momentum in [0, 1), got {self.lr}, {self.momentum}"
            )
        if not 0 <= self.noise <= 1 or not 0 <= self.clean_weight <= 1:
            raise ValueError(
                f"expected noise and clean_weight in [0, 1], got {self.noise}, {self.clean_weight}"
            )
        if not 0 < self.holdout < 1 or not 0 <= self.tolerance < 1:
            raise ValueError(
                "expected holdout in (0, 1) and tolerance in [0, 1), "
                f"got {self.holdout}, {self.tolerance}"
            )

    @classmethod
    def preset(cls, name: str = "fast", **changes: Any) -> ANP:
        """Settings by name, with changes.

        "paper" takes 2,000 steps of 128 images at a rate of 0.2, and tolerates the ten points that
        BackdoorBench does. "fast" takes fewer, smaller and more careful steps, which is ours.
        """
        return preset_of(cls, PRESETS, name, **changes)

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
        """Prune a copy of ``model``, which keeps its running statistics.

        The log has the losses, the accuracy at each threshold, the threshold chosen (None if even
        the lowest cost too much) and the number of channels pruned in each layer.

        Raises:
            ValueError: Fewer than four images, or no batch normalisation with weights.
        """
        check_repair(model, images, labels)
        if len(images) < 4:
            raise ValueError(f"expected at least 4 images, two to hold out, got {len(images)}")
        pruned = copy.deepcopy(model).eval()
        norms = normalisations(pruned)
        device = next(iter(norms.values())).weight.device
        images, labels = images.to(device), labels.to(device)
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(images), generator=generator).to(device)
        held_out = min(len(images) - 2, max(2, round(self.holdout * len(images))))
        fit, check = order[held_out:], order[:held_out]
        with seeded(seed, device):  # dropout draws from the global generators
            masks, losses = self._learn(pruned, images[fit], labels[fit], generator, progress)
        chosen, sweep = self._sweep(pruned, masks, images[check], labels[check])
        counts = {name: int((chosen.masks[name] == 0).sum()) for name in norms}
        log = {
            "losses": losses,
            "sweep": sweep,
            "threshold": chosen.threshold,
            "pruned": sum(counts.values()),
            "channels": sum(len(mask) for mask in masks.values()),
            "pruned_by_layer": counts,
        }
        return Repaired(pruned, log)

    def _learn(
        self,
        net: nn.Module,
        images: Tensor,
        labels: Tensor,
        generator: torch.Generator,
        progress: bool,
    ) -> tuple[Masks, list[float]]:
        """The masks, and the loss of every step. The net is read, not written."""
        norms = normalisations(net)
        masks = {name: torch.ones_like(n.weight).requires_grad_() for name, n in norms.items()}
        optimizer = torch.optim.SGD(masks.values(), lr=self.lr, momentum=self.momentum)
        loss_of = DisturbedLoss(copy.deepcopy(net), norms, images, labels)
        losses: list[float] = []
        rows = training_batches(len(images), self.batch_size, self.steps, generator)
        bar = show_progress(rows, total=self.steps, desc="anp", enabled=progress)
        with torch.enable_grad():
            for index in bar:
                index = index.to(images.device)
                noise = self._worst_noise(loss_of, masks, index, generator)
                clean = loss_of(index, masks, None)
                disturbed = loss_of(index, masks, noise)
                loss = self.clean_weight * clean + (1 - self.clean_weight) * disturbed
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                with torch.no_grad():
                    for mask in masks.values():
                        mask.clamp_(0, 1)
                losses.append(float(loss.detach()))
        return {name: mask.detach() for name, mask in masks.items()}, losses

    def _worst_noise(
        self, loss_of: DisturbedLoss, masks: Masks, index: Tensor, generator: torch.Generator
    ) -> Noise:
        """A disturbance of every channel: drawn evenly, then moved up the loss by its signs."""
        noise = {}
        for name, mask in masks.items():
            drawn = torch.rand((2, len(mask)), generator=generator) * 2 - 1
            noise[name] = (self.noise * drawn).to(mask.device).requires_grad_()
        fixed = {name: mask.detach() for name, mask in masks.items()}
        for _ in range(self.noise_steps):
            loss = loss_of(index, fixed, noise)
            slopes = torch.autograd.grad(loss, list(noise.values()))
            with torch.no_grad():
                # No projection: a channel may end up at twice the size, as in the released code.
                for value, slope in zip(noise.values(), slopes, strict=True):
                    value.add_(slope.sign(), alpha=self.noise / self.noise_steps)
        return {name: value.detach() for name, value in noise.items()}

    def _sweep(
        self, pruned: nn.Module, masks: Masks, images: Tensor, labels: Tensor
    ) -> tuple[_Choice, list[dict[str, float]]]:
        """Prune in place at the highest threshold before the first that costs too much."""
        norms = normalisations(pruned)
        weights = {name: norm.weight.detach().clone() for name, norm in norms.items()}
        unpruned = {name: torch.ones_like(mask) for name, mask in masks.items()}
        start = _accuracy(pruned, images, labels)
        choice = _Choice(None, unpruned)
        sweep: list[dict[str, float]] = []
        for threshold in _THRESHOLDS:
            trial = {name: (mask > threshold).float() for name, mask in masks.items()}
            _set_weights(norms, weights, trial)
            accuracy = _accuracy(pruned, images, labels)
            sweep.append({"threshold": threshold, "accuracy": accuracy})
            if accuracy < start - self.tolerance:
                break
            choice = _Choice(threshold, trial)
        _set_weights(norms, weights, choice.masks)
        return choice, sweep


PRESETS: dict[str, dict[str, Any]] = {
    "fast": {},
    "paper": {"steps": 2000, "batch_size": 128, "lr": 0.2, "tolerance": 0.1},
}


class _Choice(NamedTuple):
    threshold: float | None  # None: nothing is pruned
    masks: Masks  # 0 for pruned channels, 1 for the others


def _set_weights(norms: Mapping[str, _BatchNorm], weights: Masks, masks: Masks) -> None:
    with torch.no_grad():
        for name, norm in norms.items():
            norm.weight.copy_(weights[name] * masks[name])


def _accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return float((predict(model, images).argmax(1) == labels).double().mean())


class DisturbedLoss:
    """The loss of a batch under masks and noise.

    ``net`` is a scratch copy: its running statistics drift, and only its loss is used.
    """

    def __init__(
        self, net: nn.Module, norms: Mapping[str, _BatchNorm], images: Tensor, labels: Tensor
    ) -> None:
        self.net = net.train().requires_grad_(False)
        self.images, self.labels = images, labels
        self.affine = {
            name: (norm.weight.detach(), norm.bias.detach()) for name, norm in norms.items()
        }

    def __call__(self, index: Tensor, masks: Masks, noise: Noise | None) -> Tensor:
        """Cross-entropy of the rows ``index``, undisturbed if ``noise`` is None."""
        parameters = masked_parameters(self.affine, masks, noise)
        logits = functional_call(self.net, parameters, (self.images[index],))
        return F.cross_entropy(logits, self.labels[index])


def masked_parameters(
    affine: Mapping[str, tuple[Tensor, Tensor]], masks: Masks, noise: Noise | None
) -> dict[str, Tensor]:
    """Weights times (mask + noise) and biases times (1 + noise), by parameter name.

    ``affine`` has the weight and bias ``(C,)`` of each normalisation, by its name in the model.
    """
    parameters = {}
    for name, (weight, bias) in affine.items():
        on_weight, on_bias = (0.0, 0.0) if noise is None else noise[name]
        prefix = f"{name}." if name else ""
        parameters[f"{prefix}weight"] = weight * (masks[name] + on_weight)
        parameters[f"{prefix}bias"] = bias * (1 + on_bias)
    return parameters


def normalisations(model: nn.Module) -> dict[str, _BatchNorm]:
    """The batch normalisations with weights and biases, by name; ``ValueError`` without any."""
    norms = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.affine
    }
    if not norms:
        raise ValueError("expected a model with batch normalisation, got none: ANP prunes by it")
    return norms
