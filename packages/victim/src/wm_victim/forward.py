"""The forward pass of a training step, in the memory layout and with the compiler that were asked.

"blocked" is oneDNN's own layout, sixteen channels side by side. All layers of a ResNet have
kernels for it, and between them nothing is converted. On a CPU its normalisation, its ReLU and its
convolutions of small maps are faster than those in channels-last memory.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from wm_victim.models import Classifier
from wm_victim.recipe import TrainConfig, resolve_precision
from wm_victim.resnet import ResNetBody

Forward = Callable[[Tensor], Tensor]


def training_forward(model: nn.Module, config: TrainConfig, device: torch.device) -> Forward:
    """Images ``(N, C, H, W)`` in [0, 1] -> float32 logits ``(N, K)``, with gradients.

    Weights stay float32 in every precision.

    Args:
        model: The classifier, on the device already. Its weights are laid out for the layout.
        config: Its ``layout``, ``precision`` and ``compile`` are used.
        device: Where it trains.

    Raises:
        ValueError: ``compile`` on another device than a GPU; layout "blocked" on another than the
            CPU, for another network than a ResNet of this library, or without oneDNN.
    """
    dtype = resolve_precision(config.precision, device)
    if config.compile and device.type != "cuda":
        raise ValueError(f"expected a CUDA device with compile, got {device.type}")
    if config.layout == "blocked":
        return _blocked(model, device, dtype)
    model.to(memory_format=torch.channels_last)
    # "reduce-overhead" records the step as CUDA graphs.
    call = torch.compile(model, mode="reduce-overhead") if config.compile else model

    def forward(images: Tensor) -> Tensor:
        images = images.contiguous(memory_format=torch.channels_last)
        mixed = dtype == torch.bfloat16
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=mixed):
            logits = call(images)
        return logits.float()

    return forward


def _blocked(model: nn.Module, device: torch.device, dtype: torch.dtype) -> Forward:
    if device.type != "cpu":
        raise ValueError(f"expected the CPU with layout blocked, got {device.type}")
    body = model.body if isinstance(model, Classifier) else None
    if not isinstance(model, Classifier) or not isinstance(body, ResNetBody):
        kind = type(model if body is None else body).__name__
        raise ValueError(f"expected a resnet or preactresnet with layout blocked, got {kind}")
    if not torch.backends.mkldnn.is_available():
        raise ValueError("expected a torch with oneDNN for layout blocked, got one without")
    # oneDNN gives the gradients of weights in this layout, and the optimiser wants them alike.
    model.to(memory_format=torch.contiguous_format)
    normalize, head = model.normalize, model.head

    def forward(images: Tensor) -> Tensor:
        opaque = normalize(images).to(dtype).contiguous().to_mkldnn()
        maps = body.blocks(body.stem(opaque)).to_dense().float()
        logits: Tensor = head(maps.mean((2, 3)))
        return logits

    return forward
