"""Give a network that was exported for use its batch normalisation back, so that it can be trained.

Exporters fold batch normalisation into the convolutions before it. What is left computes the same,
and trains far worse: at rates that are right for the network as it was, it diverges; at rates that
it stands, little is unlearned. Normalisation that changes nothing is put behind every convolution,
with the statistics of the defender's images, and is folded in again afterwards.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.hooks import RemovableHandle

_BATCH = 64


def unfold(module: nn.Module, images: Tensor) -> tuple[nn.Module, tuple[str, ...]]:
    """A copy with batch normalisation behind every convolution; in eval mode it computes the same.

    Args:
        module: Images to logits, in eval mode; not changed.
        images: The defender's, float32 ``(N, C, H, W)`` in [0, 1]; their statistics are taken.

    Returns:
        The copy, and the names of the layers that `fold` has to fold again. A network that still
        has normalisation layers of any kind, one without convolutions, and one that computes one
        image at a time, are copied as they are, without names.
    """
    opened = copy.deepcopy(module).eval()
    layers = {name: one for name, one in opened.named_modules() if isinstance(one, nn.Conv2d)}
    if not layers or any(_normalises(one) for one in opened.modules()):
        return opened, ()
    found = _statistics(opened, layers, images)
    if len(found) < len(layers):
        return opened, ()
    for name, layer in layers.items():
        norm = nn.BatchNorm2d(layer.out_channels).to(layer.weight)
        mean, variance = found[name]
        with torch.no_grad():
            for part, value in (("running_mean", mean), ("running_var", variance), ("bias", mean)):
                getattr(norm, part).copy_(value)
            norm.weight.copy_((variance + norm.eps).sqrt())
        _put(opened, name, nn.Sequential(layer, norm))
    return opened.eval(), tuple(layers)


def fold(module: nn.Module, names: Sequence[str]) -> nn.Module:
    """The same network in eval mode, with the named normalisations folded in; changed in place.

    Args:
        module: What `unfold` gave, or a trained copy of it.
        names: What it gave with it.
    """
    module.eval()
    for name in names:
        pair = module.get_submodule(name)
        layer, norm = pair.get_submodule("0"), pair.get_submodule("1")
        assert isinstance(layer, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
        _put(module, name, fuse_conv_bn_eval(layer, norm))
    return module


def _normalises(module: nn.Module) -> bool:
    """Batch, layer, group and other norms by their names, which importers and zoos keep."""
    name = type(module).__name__
    return "Norm" in name and not name.startswith("Normalize")


def _statistics(
    module: nn.Module, layers: dict[str, nn.Conv2d], images: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and variance of each layer's channels; nothing of layers that see single images."""
    sums: dict[str, Tensor] = {}

    def listen(name: str) -> RemovableHandle:
        def hear(_layer: nn.Module, _given: object, y: Tensor) -> None:
            if len(y) > 1:
                flat = y.double().transpose(0, 1).flatten(1)
                count = torch.full_like(flat[:, 0], flat.shape[1])
                seen = torch.stack([count, flat.sum(1), (flat**2).sum(1)])
                sums[name] = sums[name] + seen if name in sums else seen

        return layers[name].register_forward_hook(hear)

    hooks = [listen(name) for name in layers]
    try:
        with torch.no_grad():
            for part in images.split(_BATCH):
                module(part)
    finally:
        for one in hooks:
            one.remove()
    found = {}
    for name, (count, total, squares) in sums.items():
        mean = total / count
        found[name] = mean, (squares / count - mean**2).clamp_min(0)
    return found


def _put(module: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(module.get_submodule(parent), last, layer)
