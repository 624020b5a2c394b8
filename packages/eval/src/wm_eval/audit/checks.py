"""Does the model behave like a classifier that can be scanned? Asked before a scan is believed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wm_eval.audit.images import CleanImages

BATCH = 64
# What classifiers expect images to be, by name: mean and standard deviation in units of [0, 1].
SCALES: dict[str, tuple[float, float]] = {
    "[-1, 1]": (0.5, 0.5),
    "0 .. 255": (0.0, 1 / 255),
    "ImageNet's mean and deviation": (0.449, 0.226),
}
_GAIN = 0.1  # of accuracy, before another scale is believed


class NotScanned(ValueError):
    """The model cannot be scanned; no verdict may be read into that."""


@dataclass(frozen=True)
class Check:
    """One check and what it found."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True, eq=False)
class Checked:
    """A model that can be scanned, and what the checks found."""

    module: nn.Module
    labels: Tensor | None  # int64 (N,), believed to be the classes as the model numbers them
    accuracy: float | None
    checks: tuple[Check, ...]

    @property
    def notes(self) -> tuple[str, ...]:
        """What did not pass, one line each."""
        return tuple(f"{check.name}: {check.detail}" for check in self.checks if not check.passed)


class Rescaled(nn.Module):
    """A model behind another scale of its images."""

    def __init__(self, module: nn.Module, mean: float, std: float) -> None:
        super().__init__()
        self.module, self.mean, self.std = module, mean, std

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images in [0, 1]."""
        found: Tensor = self.module((images - self.mean) / self.std)
        return found


def check_model(
    module: nn.Module, clean: CleanImages, *, num_classes: int, guess_scale: bool = True
) -> Checked:
    """Check a classifier on clean images.

    Args:
        module: Images in [0, 1] to logits ``(N, K)``.
        clean: The defender's images.
        guess_scale: Try other scales of the images where the labels say that this one is wrong.

    Raises:
        NotScanned: It gives no finite logits of K classes, other ones the second time, no gradient,
            or one answer to all images.
    """
    module.eval()
    images = clean.images
    logits = _logits(module, images)
    if logits.shape != (len(images), num_classes) or not bool(logits.isfinite().all()):
        got = f"{tuple(logits.shape)}" + (
            "" if logits.isfinite().all() else " with NaN or infinity"
        )
        raise NotScanned(f"expected finite logits ({len(images)}, {num_classes}), got {got}")
    checks = [Check("finite logits", True, f"{num_classes} classes")]
    again, alone = _logits(module, images[:BATCH]), _logits(module, images[:3], batch=1)
    spread = float(logits.abs().max().clamp_min(1e-6))
    if float((again - logits[:BATCH]).abs().max()) > 1e-5 * spread:
        raise NotScanned("expected the same logits for the same images, got others")
    checks.append(Check("deterministic", True, "the same images get the same logits"))
    apart = float((alone - logits[:3]).abs().max()) / spread
    told = f"alone and in a batch, logits differ by {apart:.1g} of the largest"
    checks.append(Check("batch-independent", apart < 1e-3, told))
    checks.append(_gradient(module, images))
    labels, accuracy = None, None
    if clean.labels is not None:
        labels = clean.labels
        module, accuracy, told = _scaled(module, clean, logits, guess_scale)
        chance = float((labels.bincount() / len(labels)).max())
        good = int(labels.max()) < num_classes and accuracy > 1.5 * chance
        checks.append(Check("accuracy", good, told))
        if not good:
            labels = None
        logits = _logits(module, images)
    answers = logits.argmax(1)
    classes = len(answers.unique())
    if classes < 2:
        raise NotScanned(
            f"expected answers of several classes, got label {int(answers[0])} for all"
        )
    told = f"{classes} of {num_classes} labels are answered"
    checks.append(Check("answers", classes >= min(num_classes, 3), told))
    return Checked(module, labels, accuracy, tuple(checks))


def _logits(module: nn.Module, images: Tensor, *, batch: int = BATCH) -> Tensor:
    with torch.no_grad():
        return torch.cat([module(part) for part in images.split(batch)])


def _gradient(module: nn.Module, images: Tensor) -> Check:
    pixels = images[:8].clone().requires_grad_()
    try:
        logits = module(pixels)
        # Not their logsumexp: that of logarithms of probabilities is 0 whatever the image is.
        weights = torch.linspace(-1, 1, logits.shape[1], device=logits.device)
        (grad,) = torch.autograd.grad((logits * weights).sum(), pixels)
    except RuntimeError as error:
        line = str(error).splitlines()[0]
        raise NotScanned(
            f"expected gradients with respect to the images, got none: {line}"
        ) from error
    if not bool(grad.isfinite().all()) or not bool(grad.flatten(1).abs().amax(1).gt(0).all()):
        raise NotScanned("expected finite gradients that are not zero, got others")
    return Check("gradients", True, "finite and not zero")


def _scaled(
    module: nn.Module, clean: CleanImages, logits: Tensor, guess: bool
) -> tuple[nn.Module, float, str]:
    """The model at the scale of images that fits the labels, its accuracy, and a remark."""
    assert clean.labels is not None
    accuracy = _share(logits.argmax(1), clean.labels)
    told = f"{accuracy:.1%} of {len(clean.labels)} images"
    best = max(_candidates(module, clean), default=None, key=lambda one: one[0]) if guess else None
    if best is None or best[0] < accuracy + _GAIN:
        return module, accuracy, told
    return (
        best[2],
        best[0],
        f"{best[0]:.1%}, with images in {best[1]} (as they are: {accuracy:.1%})",
    )


def _candidates(module: nn.Module, clean: CleanImages) -> Iterator[tuple[float, str, nn.Module]]:
    for name, (mean, std) in SCALES.items():
        other = Rescaled(module, mean, std).eval()
        answers = _logits(other, clean.images).argmax(1)
        assert clean.labels is not None
        yield _share(answers, clean.labels), name, other


def _share(answers: Tensor, labels: Tensor) -> float:
    return float(torch.eq(answers, labels).double().mean())
