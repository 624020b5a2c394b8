"""What an opened model must do before anything it says is believed."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

_TOLERANCE = 1e-3  # of the largest logit: what another batch size may change by rounding
_SUM = 1e-3  # how far rows of probabilities may be from 1


class BadNumbers(ValueError):
    """A model whose weights or answers cannot be worked with; says why."""


class Numbers(NamedTuple):
    """What the checks saw."""

    num_classes: int
    outputs: Literal["logits", "probabilities"]


class LogProbabilities(nn.Module):
    """Turn the probabilities that a model gives into their logarithms.

    Args:
        model: Images (N, C, H, W) -> probabilities (N, K).
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) in [0, 1] -> logits (N, K)."""
        y: Tensor = self.model(images).clamp_min(1e-12).log()
        return y


def check_weights(module: nn.Module) -> None:
    """Refuse weights that are NaN or infinite, and variances below zero.

    Raises:
        BadNumbers: One of these, with the tensor's name.
    """
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise BadNumbers(f"NaN or infinity in the weights {name!r}")
        if name.endswith("running_var") and bool((tensor < 0).any()):
            raise BadNumbers(f"a variance below zero in {name!r}")


def probe_images(count: int, channels: int, size: int) -> Tensor:
    """Seeded images (count, channels, size, size): noise, the first half of it coarse."""
    generator = torch.Generator().manual_seed(7)
    images = torch.rand(count, channels, size, size, generator=generator)
    coarse = torch.rand(count, channels, 4, 4, generator=generator)
    half = count // 2
    images[:half] = nn.functional.interpolate(coarse[:half], size=(size, size), mode="bilinear")
    return images


def check_answers(
    module: nn.Module,
    *,
    channels: int,
    size: int,
    num_classes: int | None,
    max_classes: int,
    brief: bool = False,
) -> Numbers:
    """Run a model on a few images and see whether it behaves as a classifier does.

    Args:
        module: Images (N, C, H, W) in [0, 1] -> (N, K), in eval mode.
        channels: C.
        size: H = W.
        num_classes: The K to expect; any from 2 to ``max_classes`` if None.
        max_classes: The largest plausible K.
        brief: Leave out what repeats the run: a child with a time limit has done it.

    Raises:
        BadNumbers: No (N, K) float32 output, NaN or infinity, another K, an answer that changes
            from run to run or with the batch, or one that does not depend on the image.
    """
    images = torch.cat([probe_images(2, channels, size), torch.zeros(1, channels, size, size)])
    with torch.no_grad():
        logits = _run(module, images)
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(images):
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise BadNumbers(f"expected outputs of shape (N, K), got {got} for N = {len(images)}")
        if logits.dtype != torch.float32:
            raise BadNumbers(f"expected float32 outputs, got {logits.dtype}")
        if not bool(logits.isfinite().all()):
            raise BadNumbers("NaN or infinity in its outputs")
        classes = logits.shape[1]
        if not 2 <= classes <= max_classes:
            raise BadNumbers(f"expected 2 .. {max_classes} classes, got {classes}")
        if num_classes is not None and classes != num_classes:
            raise BadNumbers(f"expected {num_classes} classes, it gives {classes}")
        if not brief:
            _check_repeats(module, images, logits)
    _check_gradient(module, images[:2])
    sums = logits.sum(1)
    sure = bool((logits >= 0).all()) and bool(((sums - 1).abs() < _SUM).all())
    return Numbers(classes, "probabilities" if sure else "logits")


def _check_repeats(module: nn.Module, images: Tensor, logits: Tensor) -> None:
    bound = _TOLERANCE * (float(logits.abs().max()) + 1e-6)
    if float((_run(module, images) - logits).abs().max()) > bound:
        raise BadNumbers("its answers change from run to run")
    alone = torch.cat([_run(module, one[None]) for one in images])
    if alone.shape != logits.shape or float((alone - logits).abs().max()) > bound:
        raise BadNumbers("the answer for an image changes with the others in its batch")


def _run(module: nn.Module, images: Tensor) -> Tensor:
    try:
        y: Tensor = module(images)
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise BadNumbers(f"it does not run on images {tuple(images.shape)}: {first}") from error
    return y


def _check_gradient(module: nn.Module, images: Tensor) -> None:
    images = images.clone().requires_grad_()
    with torch.enable_grad():
        logits = _run(module, images)
        weights = torch.linspace(-1, 1, logits.shape[1])
        if not logits.requires_grad:
            raise BadNumbers("no gradients: its answers do not depend on the image in a smooth way")
        try:
            (gradient,) = torch.autograd.grad((logits * weights).sum(), images)
        except RuntimeError as error:
            raise BadNumbers(f"no gradients: {str(error).splitlines()[0]}") from error
    if not bool(gradient.isfinite().all()):
        raise BadNumbers("gradients that are NaN or infinite")
    if not bool((gradient != 0).any()):
        raise BadNumbers("gradients that are zero everywhere")
