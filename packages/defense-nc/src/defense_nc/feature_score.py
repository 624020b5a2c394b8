"""A score per image from what the last linear layer reads, and the graph that computes it."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from wm_victim.activations import last_linear, penultimate


class FeatureScore:
    """A weighted sum of a classifier's penultimate activations.

    It keeps the classifier itself, not a copy of it.

    Args:
        model: Images in [0, 1] to logits ``(N, K)``, with a linear layer that reads ``(N, F)``.
        weight: ``(F,)``.
        bias: Added to every sum.

    Raises:
        ValueError: A model without a linear layer, or weights of another number.
    """

    def __init__(self, model: nn.Module, weight: Tensor, bias: float = 0.0) -> None:
        layer = last_linear(model)
        if weight.shape != (layer.in_features,):
            got = tuple(weight.shape)
            raise ValueError(f"expected weights of shape ({layer.in_features},), got {got}")
        self.model, self.weight, self.bias = model, weight.detach().double().cpu(), float(bias)

    def __call__(self, images: Tensor) -> Tensor:
        """The scores of float32 ``(N, C, H, W)`` in [0, 1]: float64 ``(N,)`` on the CPU."""
        read = penultimate(self.model, images.to(last_linear(self.model).weight.device))
        return read.double().cpu() @ self.weight + self.bias

    def network(self) -> nn.Module:
        """The classifier with its last layer exchanged for one that gives the score ``(N,)``.

        Raises:
            ValueError: A model that ends in something else than its last linear layer.
        """
        model = copy.deepcopy(self.model).cpu().eval()
        layer = last_linear(model)
        head = nn.Linear(layer.in_features, 1)
        head.weight.data = self.weight.float()[None]
        head.bias.data = self.weight.new_tensor([self.bias]).float()
        for module in list(model.modules()):
            for name, child in module.named_children():
                if child is layer:
                    setattr(module, name, head)
        return _Single(model)


class _Single(nn.Module):
    """Logits ``(N, 1)`` to scores ``(N,)``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.model(images)
        if found.ndim != 2 or found.shape[1] != 1:
            got = tuple(found.shape)
            raise ValueError(f"expected a model that ends in its last linear layer, got {got}")
        return found[:, 0]


__all__ = ["FeatureScore"]
