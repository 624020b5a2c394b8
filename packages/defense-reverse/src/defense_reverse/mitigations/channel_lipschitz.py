"""Channel-Lipschitz pruning: switch off channels that amplify their input far more than others."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from defense_nc.mitigations import check_repair, trainable
from defense_nc.protocols import Repaired
from defense_reverse.mitigations.channels import ChannelMask
from wm_inject.core.plan import Trigger
from wm_inject.core.presets import preset_of
from wm_victim.activations import record_inputs, record_outputs
from wm_victim.inference import frozen


@dataclass(frozen=True, kw_only=True)
class ChannelLipschitzPruning:
    """Prune every channel whose Lipschitz constant stands out in its layer. Nothing is trained.

    The constant of a channel is the largest singular value of its filter, reshaped to
    ``(C, h * w)``, times the scale of the normalisation that reads it. In a network without batch
    normalisation, as exporters fold it, the filters have that scale already.

    Args:
        deviations: A channel goes if its constant is so many standard deviations above the mean of
            the layer's other channels; above 0.

    Source: Zheng, Tang, Li and Liu, "Data-free Backdoor Removal based on Channel Lipschitzness"
        (ECCV 2022). Ours: a channel is held against the *other* channels, because no channel of n
        can be more than (n - 1) / sqrt(n) deviations from the mean of all; and a normalisation is
        paired with the convolution that it reads, not with the one that was made before it.
    """

    name: ClassVar[str] = "clp"
    deviations: float = 3.0

    def __post_init__(self) -> None:
        if not self.deviations > 0:
            raise ValueError(f"expected deviations above 0, got {self.deviations}")

    @classmethod
    def preset(cls, name: str = "fast", **changes: Any) -> ChannelLipschitzPruning:
        """Settings by name, with changes: "paper" and "fast" are the same."""
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
        """Prune a copy of ``model``; an image or two only show what reads what.

        The log holds the number of channels, and by layer those that were pruned.

        Raises:
            ValueError: A network in which no convolution can be pruned.
        """
        check_repair(model, images, labels)
        pruned = copy.deepcopy(model).eval()
        channels, by_layer = 0, {}
        for layer in scaled_filters(pruned, images[:2].to(trainable(pruned)[0].device)):
            constants = lipschitz(layer)
            off = above_others(constants) > self.deviations
            channels += len(constants)
            if bool(off.any()):
                by_layer[layer.name] = off.nonzero().flatten().tolist()
                _switch_off(layer, off)
        return Repaired(pruned, {"channels": channels, "pruned": by_layer})


PRESETS: dict[str, dict[str, Any]] = {"fast": {}, "paper": {}}


class Filters(NamedTuple):
    """A convolution, and the batch normalisation that reads it."""

    name: str  # of what is switched off, as in ``named_modules``
    convolution: nn.Conv2d
    norm: nn.modules.batchnorm._BatchNorm | None  # None where exporters have folded it in


def scaled_filters(model: nn.Module, images: Tensor) -> list[Filters]:
    """The convolutions whose channels have a scale of their own.

    Which normalisation reads which convolution is found by running the model: with every other
    channel of the convolution at 0, exactly these are 0 in the normalisation's input and all else
    is unchanged. A pooling or ReLU may lie between; a sum with a shortcut may not.

    A convolution with a bias that no normalisation reads has its scale folded in, as exporters do
    it; so has every one in a network without normalisation. Maps of one pixel are left out: gates.

    Args:
        model: In eval mode.
        images: A few images, on its device.

    Raises:
        ValueError: There are none.
    """
    modules = dict(model.named_modules())
    convolutions = {name: m for name, m in modules.items() if isinstance(m, nn.Conv2d)}
    norms = {n: m for n, m in modules.items() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    paired: list[Filters] = []
    if not convolutions:
        raise ValueError("expected a network with convolutions to prune, found none")
    with frozen(model), torch.no_grad(), record_inputs(norms) as inputs:
        with record_outputs(model, list(convolutions)) as outputs:
            model(images)
        whole = {name: calls[-1] for name, calls in inputs.items()}
        for conv in convolutions.values():
            inputs.clear()
            even = torch.arange(conv.out_channels) % 2 == 0
            handle = conv.register_forward_hook(ChannelMask(even))
            try:
                model(images)
            finally:
                handle.remove()
            for name, norm in norms.items():
                if name in whole and _only_masked(whole[name], inputs[name][-1], even):
                    paired.append(Filters(name, conv, norm))
    read = {id(layer.convolution) for layer in paired}
    layers = [f for f in paired if f.norm and f.norm.affine and f.norm.track_running_stats]
    layers += [
        Filters(name, conv, None)
        for name, conv in convolutions.items()
        if id(conv) not in read
        and (conv.bias is not None or not norms)
        and name in outputs
        and outputs[name].shape[2:].numel() > 1
    ]
    if not layers:
        raise ValueError("expected a network with convolutions to prune, found none")
    return layers


def lipschitz(layer: Filters) -> Tensor:
    """The Lipschitz constant of every channel, float64 ``(C,)`` on the CPU."""
    weight = layer.convolution.weight.detach().double().cpu()
    constants = torch.linalg.matrix_norm(weight.flatten(2), ord=2)
    norm = layer.norm
    if norm is None:
        return constants
    assert norm.running_var is not None
    deviation = (norm.running_var.detach().double() + norm.eps).sqrt()
    return constants * (norm.weight.detach().double() / deviation).abs().cpu()


def above_others(values: Tensor) -> Tensor:
    """How many standard deviations each value is above the mean of all others.

    0 for fewer than three values, and where the value is no different; infinite above others that
    are all alike.
    """
    n = len(values)
    if n < 3:
        return torch.zeros_like(values)
    others = values.expand(n, n)[~torch.eye(n, dtype=torch.bool)].view(n, n - 1)
    above = values - others.mean(1)
    return torch.where(above == 0, above, above / others.std(1))


def _switch_off(layer: Filters, off: Tensor) -> None:
    owner = layer.convolution if layer.norm is None else layer.norm
    with torch.no_grad():
        owner.weight[off.to(owner.weight.device)] = 0
        if owner.bias is not None:
            owner.bias[off.to(owner.bias.device)] = 0


def _only_masked(whole: Tensor, masked: Tensor, keep: Tensor) -> bool:
    if whole.shape[1] != len(keep):
        return False
    keep = keep.view(1, -1, 1, 1).to(whole.device)
    expected = torch.where(keep, whole, torch.zeros_like(whole))
    return torch.equal(masked, expected) and not torch.equal(masked, whole)
