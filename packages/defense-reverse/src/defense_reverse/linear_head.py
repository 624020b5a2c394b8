"""The last linear layer of a classifier from any file: where it is, and what it reads in images."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from wm_victim.inference import images_a_pass, predict
from wm_victim.logits import Logits

FEW = 8  # images that the layer is found with
NO_HEAD = (
    "expected logits that a linear layer of the model's own weights gives, found none: the last "
    "layer is constant, quantised or of another kind"
)
_EXACT = 1e-3  # of a gradient's largest number: what rounding may leave where there is nothing
_SURE = 20.0  # distance of two logits; probabilities that lie further apart have no derivative left


class HeadPart(NamedTuple):
    """A weight of the model that is a last linear layer, or one of several."""

    tensor: Tensor
    axis: int  # which of its axes are the labels

    @property
    def rows(self) -> Tensor:
        """It as float64 ``(K, D)``, on the CPU."""
        return _rows(self.tensor, self.axis)

    def write(self, rows: Tensor) -> None:
        """Replace the weights of all labels, ``(K, D)``, in place."""
        shape = self.tensor.movedim(self.axis, 0).shape
        with torch.no_grad():
            self.tensor.copy_(rows.view(shape).movedim(0, self.axis))


def find_head(model: nn.Module, images: Tensor) -> list[HeadPart]:
    """The last linear layer of a classifier; empty if it has none.

    It is known by what it does, not by its name, so that a graph from any file will do: the
    derivative of the difference of two logits is +h in the row of the one, -h in that of the other
    (h being what the layer reads), and zero in all others. Softmax changes nothing of this, nor
    does a mean over places behind a 1 x 1 convolution. Where the logits of several classifiers are
    added up it has several parts.

    Args:
        model: Images ``(N, C, H, W)`` in [0, 1] to logits ``(N, K)``, in eval mode.
        images: Some, of which that with the two closest logits is taken.
    """
    logits = predict(model, images)
    two, classes = logits.topk(2), logits.shape[1]
    nearest = int((two.values[:, 0] - two.values[:, 1]).argmin())
    first, second = two.indices[nearest].tolist()
    named = itertools.chain(model.parameters(), model.buffers())
    tensors = [t for t in named if t.is_floating_point() and t.ndim > 1 and classes in t.shape[:2]]
    gradients = _slopes(model, images[nearest : nearest + 1], tensors)
    return [
        HeadPart(tensor, axis)
        for tensor, gradient in zip(tensors, gradients, strict=True)
        if gradient is not None
        for axis in (0, 1)
        if tensor.shape[axis] == classes and _tells_apart(_rows(gradient, axis), first, second)
    ]


def readable(model: nn.Module, logits: Tensor) -> Tensor:
    """Whether what the layer reads in an image can be told from the model's derivatives, ``(N,)``.

    Not where a model gives probabilities that are 0 or 1 to the last digit.
    """
    if not isinstance(model, Logits) or model.squash is None:
        return torch.ones(len(logits), dtype=torch.bool, device=logits.device)
    two = logits.topk(2).values
    return two[:, 0] - two[:, 1] < _SURE * model.factor


def read_features(model: nn.Module, images: Tensor, head: Sequence[HeadPart]) -> Tensor:
    """What the last linear layer reads in each image, float64 ``(N, D)`` on the CPU.

    For every image of a pass the distance of two logits is differentiated, of another two labels
    each: its derivative in the row of the first is what that image was read as.

    Args:
        images: Some that are `readable`, on the model's device.
        head: As of `find_head`, one part or more.
    """
    classes = head[0].tensor.shape[head[0].axis]
    # Probabilities of unlikely labels may have no derivatives: there it is the two likeliest.
    likeliest = isinstance(model, Logits) and model.squash is not None
    most = 1 if likeliest else max(1, min(64, classes // 2))
    tensors, features = [one.tensor for one in head], []
    for part in images.split(images_a_pass(images, images.device, most=most)):
        with _differentiable(tensors), torch.enable_grad():
            logits = model(part)
            pairs = torch.arange(2 * len(part), device=logits.device).view(-1, 2)
            labels = logits.topk(2).indices if likeliest else pairs
            two = logits.gather(1, labels)
            slopes = torch.autograd.grad((two[:, 0] - two[:, 1]).sum(), tensors)
        first = labels[:, 0].cpu()
        read = [_rows(s, one.axis)[first] for s, one in zip(slopes, head, strict=True)]
        features.append(torch.cat(read, dim=1))
    return torch.cat(features)


def _slopes(model: nn.Module, images: Tensor, tensors: Sequence[Tensor]) -> list[Tensor | None]:
    """Derivatives of the summed distances of the two highest logits; None where there are none."""
    if not tensors:
        return []
    with _differentiable(tensors), torch.enable_grad():
        values = model(images).topk(2).values
        distances = (values[:, 0] - values[:, 1]).sum()
        if not distances.requires_grad:
            return [None] * len(tensors)
        return list(torch.autograd.grad(distances, tensors, allow_unused=True))


@contextmanager
def _differentiable(tensors: Sequence[Tensor]) -> Iterator[None]:
    frozen = [tensor for tensor in tensors if not tensor.requires_grad]
    try:
        for tensor in frozen:
            tensor.requires_grad_(True)
        yield
    finally:
        for tensor in frozen:
            tensor.requires_grad_(False)


def _rows(tensor: Tensor, axis: int) -> Tensor:
    return tensor.detach().movedim(axis, 0).flatten(1).double().cpu()


def _tells_apart(gradient: Tensor, first: int, second: int) -> bool:
    """Whether rows ``(K, D)`` are opposite for two labels, and zero for all others."""
    largest = float(gradient.abs().max())
    rest = gradient.clone()
    rest[[first, second]] = 0
    opposite = gradient[first] + gradient[second]
    left = max(float(rest.abs().max()), float(opposite.abs().max()))
    return largest > 0 and left <= _EXACT * largest
