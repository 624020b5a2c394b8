"""Fast forward and backward passes of a frozen classifier: folded norms, bfloat16, layout."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from wm_inject.core.precision import resolve_precision


def fused_forward(
    model: nn.Module, precision: str, device: torch.device
) -> Callable[[Tensor], Tensor]:
    """Images to float32 logits of a frozen model, in precision "auto", "float32" or "bfloat16".

    bfloat16 runs on a copy: batch normalisations folded into the convolutions before them, in
    channels-last memory. The model itself is not changed.
    """
    if resolve_precision(precision, device) == torch.float32:
        return model
    fast = channels_last(fold(model))
    for layer in fast.modules():
        # Autocast would cast frozen weights again in every pass.
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.to(torch.bfloat16)

    def forward(images: Tensor) -> Tensor:
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            logits: Tensor = fast(images)
        return logits.float()

    return forward


def channels_last(model: nn.Module) -> nn.Module:
    """Put a model's convolutions into channels-last memory, in place.

    Layer by layer: a model as a whole refuses if one of its tensors has five axes, as constants in
    exported graphs may.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            layer.to(memory_format=torch.channels_last)
    return model


def fold(model: nn.Module) -> nn.Module:
    """A copy without the batch normalisations that directly follow a convolution.

    In eval mode such a layer scales and shifts what the convolution gives, so the convolution can
    do it alone. A model that cannot be traced (its forward branches on data) is copied as it is.
    """
    whole = copy.deepcopy(model)
    try:
        traced = fx.symbolic_trace(whole)
    # Tracing runs the model's code on proxies for tensors: it may fail in any way.
    except Exception:
        return whole
    layers = dict(traced.named_modules())
    for node in list(traced.graph.nodes):
        if node.op != "call_module" or type(layers[node.target]) is not nn.BatchNorm2d:
            continue
        before = node.args[0]
        if before.op != "call_module" or type(layers[before.target]) is not nn.Conv2d:
            continue
        uses = sum(other.target == before.target for other in traced.graph.nodes)
        norm = layers[node.target]
        if len(before.users) > 1 or uses > 1 or norm.training or norm.running_mean is None:
            continue
        parent, _, name = before.target.rpartition(".")
        fused = fuse_conv_bn_eval(layers[before.target], norm)
        setattr(traced.get_submodule(parent), name, fused)
        layers[before.target] = fused
        node.replace_all_uses_with(before)
        traced.graph.erase_node(node)
    traced.recompile()
    return traced.requires_grad_(False).eval()
