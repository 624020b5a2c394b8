"""Channels of a layer: which are least active on clean images, and how to switch them off."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from wm_victim.activations import get_layer, record_outputs
from wm_victim.inference import frozen


class ChannelMask:
    """A forward hook that holds channels of a layer's output at 0, except ``keep`` (bool ``(C,)``).

    Copies of the model keep it, and so do further steps of training; a file of weights does not,
    see `fold`.
    """

    def __init__(self, keep: Tensor) -> None:
        self.keep = keep

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        """The output with the other channels at 0."""
        keep = self.keep.to(output.device).view(1, -1, *[1] * (output.ndim - 2))
        return torch.where(keep, output, torch.zeros_like(output))


def mean_activations(model: nn.Module, layer: str, images: Tensor) -> Tensor:
    """The mean absolute output of each channel of a layer, float64 ``(C,)`` on the CPU.

    The layer gives maps ``(N, C, H, W)`` or features ``(N, C)``; the images are on the model's
    device.
    """
    total: Tensor | None = None
    with frozen(model), torch.no_grad(), record_outputs(model, [layer]) as outputs:
        for part in images.split(256):
            model(part)
            if layer not in outputs:
                raise ValueError(f"expected a layer that runs in the model, {layer!r} does not")
            output = outputs[layer]
            if output.ndim not in (2, 4):
                raise ValueError(
                    f"expected maps (N, C, H, W) or features (N, C) from layer {layer!r}, "
                    f"got {tuple(output.shape)}"
                )
            over = list(range(2, output.ndim))
            active = output.double().abs()
            active = (active.mean(over) if over else active).sum(0)
            total = active if total is None else total + active
    assert total is not None
    return (total / len(images)).cpu()


def fold(model: nn.Module, layer: str, keep: Tensor, images: Tensor) -> bool:
    """Zero the weights of the masked channels in the linear layer that reads them, if there is one.

    Returns whether there is one: a file of the weights then carries the whole pruning. The model is
    in eval mode and changed in place; a few images show which linear layer reads ``layer``.
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

    def passed_layer(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal passed
        passed = True

    def record(module: nn.Module, args: Any) -> None:
        if passed and isinstance(module, nn.Linear):
            inputs.append((module, args[0]))

    def run() -> list[tuple[nn.Linear, Tensor]]:
        nonlocal passed
        passed = False
        inputs.clear()
        with torch.no_grad():
            model(images)
        return inputs[:1]

    chosen = get_layer(model, layer)
    handles = [chosen.register_forward_hook(passed_layer)]
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    handles += [m.register_forward_pre_hook(record) for m in linear]
    even = torch.arange(channels) % 2 == 0
    try:
        whole = run()
        handles.append(chosen.register_forward_hook(ChannelMask(even)))
        halved = run()
    finally:
        for handle in handles:
            handle.remove()
    if not whole or whole[0][1].ndim != 2 or whole[0][0].in_features % channels:
        return None
    columns = even.repeat_interleave(whole[0][0].in_features // channels).to(images.device)
    expected = torch.where(columns, whole[0][1], torch.zeros_like(whole[0][1]))
    return whole[0][0] if torch.equal(expected, halved[0][1]) else None
