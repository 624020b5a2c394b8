"""Masks and noise on the channels of batch normalisation, without touching the model."""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

Masks = dict[str, Tensor]  # name of a normalisation -> (C,) in [0, 1]
Noise = dict[str, Tensor]  # name of a normalisation -> (2, C): of the weights, of the biases


class DisturbedLoss:
    """The loss of a batch under masks and noise.

    ``net`` is a scratch copy: in train mode its running statistics drift, and no result of it is
    used but the loss.
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

    Args:
        affine: Weight and bias ``(C,)`` of each normalisation, by its name in the model.
        masks: ``(C,)`` in [0, 1] each.
        noise: ``(2, C)`` each, or None for none.
    """
    found = {}
    for name, (weight, bias) in affine.items():
        on_weight, on_bias = (0.0, 0.0) if noise is None else noise[name]
        prefix = f"{name}." if name else ""
        found[f"{prefix}weight"] = weight * (masks[name] + on_weight)
        found[f"{prefix}bias"] = bias * (1 + on_bias)
    return found


def normalisations(model: nn.Module) -> dict[str, _BatchNorm]:
    """The batch normalisations with weights and biases, by name.

    Raises:
        ValueError: There is none.
    """
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.affine
    }
    if not found:
        raise ValueError("expected a model with batch normalisation, found none: ANP prunes by it")
    return found
