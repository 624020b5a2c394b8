"""Channels of a layer: which ones sleep on clean images, and how to switch them off for good."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from wm_victim.activations import get_layer, record_outputs
from wm_victim.inference import frozen


class ChannelMask:
    """A forward hook that holds channels of a layer's output at exactly 0.

    It is part of the module: copies of the model keep it, and so do further steps of training. A
    file of weights does not; see `fold`.

    Args:
        keep: bool ``(C,)``: the channels that stay.
    """

    def __init__(self, keep: Tensor) -> None:
        self.keep = keep

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        """The output with the other channels at 0."""
        keep = self.keep.to(output.device).view(1, -1, *[1] * (output.ndim - 2))
        return torch.where(keep, output, torch.zeros_like(output))


def mean_activations(model: nn.Module, layer: str, images: Tensor) -> Tensor:
    """How active each channel of a layer is on average over images and places.

    Args:
        model: Images in [0, 1] to logits; run in eval mode, given back as it came.
        layer: Name of a layer that gives maps ``(N, C, H, W)`` or features ``(N, C)``.
        images: float32 ``(N, C, H, W)`` in [0, 1], on the model's device.

    Returns:
        float64 ``(C,)``: the mean absolute value, on the CPU. After a ReLU that is the mean.

    Raises:
        ValueError: No such layer, or one whose outputs have no channels.
    """
    total: Tensor | None = None
    with frozen(model), torch.no_grad(), record_outputs(model, [layer]) as found:
        for part in images.split(256):
            model(part)
            if layer not in found:
                raise ValueError(f"expected a layer that runs in the model, {layer!r} does not")
            output = found[layer]
            if output.ndim not in (2, 4):
                raise ValueError(
                    f"expected maps (N, C, H, W) or features (N, C) from layer {layer!r}, "
                    f"got {tuple(output.shape)}"
                )
            over = [place for place in range(2, output.ndim)]
            active = output.double().abs()
            active = (active.mean(over) if over else active).sum(0)
            total = active if total is None else total + active
    assert total is not None
    return (total / len(images)).cpu()


def fold(model: nn.Module, layer: str, keep: Tensor, images: Tensor) -> bool:
    """Make the linear layer that reads the maps deaf to the masked channels, if there is one.

    Then a file of the weights alone gives the same answers as the masked model does.

    Args:
        model: The masked model in eval mode; changed in place, its answers are not.
        layer: Name of the masked layer.
        keep: bool ``(C,)``: the channels that stay.
        images: A few images on the model's device, to see which linear layer reads the channels.

    Returns:
        Whether there is one: the weights then carry the whole pruning.
    """
    reader = _reader(model, layer, len(keep), images)
    if reader is None:
        return False
    with torch.no_grad():
        columns = keep.repeat_interleave(reader.in_features // len(keep))
        reader.weight[:, ~columns.to(reader.weight.device)] = 0
    return True


def _reader(model: nn.Module, layer: str, channels: int, images: Tensor) -> nn.Linear | None:
    """The first linear layer after ``layer`` whose inputs belong to one channel each, if any."""
    inputs: list[tuple[nn.Linear, Tensor]] = []
    passed = False

    def here(module: nn.Module, given: Any, output: Any) -> None:
        nonlocal passed
        passed = True

    def record(module: nn.Module, given: Any) -> None:
        if passed and isinstance(module, nn.Linear):
            inputs.append((module, given[0]))

    def run() -> list[tuple[nn.Linear, Tensor]]:
        nonlocal passed
        passed = False
        inputs.clear()
        with torch.no_grad():
            model(images)
        return inputs[:1]

    chosen = get_layer(model, layer)
    handles = [chosen.register_forward_hook(here)]
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    handles += [m.register_forward_pre_hook(record) for m in linear]
    half = torch.arange(channels) % 2 == 0
    try:
        whole = run()
        handles.append(chosen.register_forward_hook(ChannelMask(half)))
        halved = run()
    finally:
        for handle in handles:
            handle.remove()
    if not whole or whole[0][1].ndim != 2 or whole[0][0].in_features % channels:
        return None
    columns = half.repeat_interleave(whole[0][0].in_features // channels).to(images.device)
    wanted = torch.where(columns, whole[0][1], torch.zeros_like(whole[0][1]))
    return whole[0][0] if torch.equal(wanted, halved[0][1]) else None
