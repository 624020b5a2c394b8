"""Checks of a model's weights, outputs and gradients before its answers are used."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from wm_inject.core.errors import out_of_memory
from wm_inject.core.image_size import ImageSize, height_width
from wm_inject.core.text import first_line
from wm_victim.loading.contract import LoadingError
from wm_victim.logits import are_probabilities

_TOLERANCE = 1e-3  # of the largest logit: what another batch size may change by rounding


class Outputs(NamedTuple):
    """What kind of outputs a model gives."""

    num_classes: int
    probabilities: bool


def check_weights(module: nn.Module) -> None:
    """Refuse weights that are NaN or infinite, and variances below zero.

    Raises:
        LoadingError: One of these, with the tensor's name.
    """
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise LoadingError(f"NaN or infinity in the weights {name!r}")
        if name.endswith("running_var") and bool((tensor < 0).any()):
            raise LoadingError(f"a variance below zero in {name!r}")


def probe_images(count: int, channels: int, size: ImageSize) -> Tensor:
    """Seeded images (count, channels, H, W): noise, the first half of it coarse."""
    shape = height_width(size)
    generator = torch.Generator().manual_seed(7)
    images = torch.rand(count, channels, *shape, generator=generator)
    coarse = torch.rand(count, channels, 4, 4, generator=generator)
    half = count // 2
    images[:half] = nn.functional.interpolate(coarse[:half], size=shape, mode="bilinear")
    return images


def check_outputs(
    module: nn.Module,
    *,
    channels: int,
    size: ImageSize,
    num_classes: int | None,
    max_classes: int,
    brief: bool = False,
    at_once: int | None = None,
) -> Outputs:
    """Run a model on a few images and see whether it behaves as a classifier does.

    Args:
        module: Images to outputs, in eval mode.
        channels: C.
        size: H = W, or (H, W).
        num_classes: The K to expect; any from 2 to ``max_classes`` if None.
        max_classes: The largest plausible K.
        brief: Leave out what repeats the run: a child with a time limit has done it.
        at_once: Images to compute together at most; all if None. With one, answers that change with
            the batch are not seen.

    Raises:
        LoadingError: No (N, K) float32 output, NaN or infinity, another K, an answer that changes
            from run to run or with the batch, or one that does not depend on the image.
    """
    images = probe_images(2, channels, size)
    images = torch.cat([images, torch.zeros_like(images[:1])])
    with torch.no_grad():
        logits = _run(module, images, at_once)
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(images):
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise LoadingError(f"expected outputs of shape (N, K), got {got} for N = {len(images)}")
        if logits.dtype != torch.float32:
            raise LoadingError(f"expected float32 outputs, got {logits.dtype}")
        if not bool(logits.isfinite().all()):
            raise LoadingError("NaN or infinity in its outputs")
        classes = logits.shape[1]
        if not 2 <= classes <= max_classes:
            raise LoadingError(f"expected 2 .. {max_classes} classes, got {classes}")
        if num_classes is not None and classes != num_classes:
            raise LoadingError(f"expected {num_classes} classes, it gives {classes}")
        if not brief:
            _check_repeats(module, images, logits, at_once)
    _check_gradient(module, images[: min(at_once or 2, 2)])
    return Outputs(classes, probabilities=are_probabilities(logits))


def _check_repeats(module: nn.Module, images: Tensor, logits: Tensor, at_once: int | None) -> None:
    bound = _TOLERANCE * (float(logits.abs().max()) + 1e-6)
    if float((_run(module, images, at_once) - logits).abs().max()) > bound:
        raise LoadingError("its answers change from run to run")
    alone = torch.cat([_run(module, image[None]) for image in images])
    if alone.shape != logits.shape or float((alone - logits).abs().max()) > bound:
        raise LoadingError("the answer for an image changes with the others in its batch")


def _run(module: nn.Module, images: Tensor, at_once: int | None = None) -> Tensor:
    try:
        if at_once is None:
            y: Tensor = module(images)
        else:
            y = torch.cat([module(part) for part in images.split(at_once)])
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
        if out_of_memory(error):
            raise MemoryError(first_line(error)) from error
        shape = tuple(images.shape)
        raise LoadingError(f"it does not run on images {shape}: {first_line(error)}") from error
    return y


def _check_gradient(module: nn.Module, images: Tensor) -> None:
    images = images.clone().requires_grad_()
    with torch.enable_grad():
        logits = _run(module, images)
        weights = torch.linspace(-1, 1, logits.shape[1])
        if not logits.requires_grad:
            raise LoadingError(
                "no gradients: its answers do not depend on the image in a smooth way"
            )
        try:
            (gradient,) = torch.autograd.grad((logits * weights).sum(), images)
        except RuntimeError as error:
            raise LoadingError(f"no gradients: {first_line(error)}") from error
    if not bool(gradient.isfinite().all()):
        raise LoadingError("gradients that are NaN or infinite")
    if not bool((gradient != 0).any()):
        raise LoadingError("gradients that are zero everywhere")
