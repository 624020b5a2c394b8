"""A linear score of penultimate activations, and a network that computes it."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from wm_victim.activations import last_linear, penultimate


class FeatureScore:
    """A weighted sum ``(F,)`` of a classifier's penultimate activations, plus a bias.

    It refers to the classifier itself.

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
        features = penultimate(self.model, images.to(last_linear(self.model).weight.device))
        return features.double().cpu() @ self.weight + self.bias

    def network(self) -> nn.Module:
        """A copy of the classifier whose last layer gives the score ``(N,)``.

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
        scores: Tensor = self.model(images)
        if scores.ndim != 2 or scores.shape[1] != 1:
            got = tuple(scores.shape)
            raise ValueError(f"expected a model that ends in its last linear layer, got {got}")
        return scores[:, 0]
