"""Does the model behave like a classifier that can be scanned? Asked before a scan is believed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from wm_eval.audit.gradients import LEAST, margin_rise
from wm_eval.audit.images import CleanImages
from wm_inject.core.image_size import ImageSize, describe_size
from wm_victim.inference import images_a_pass
from wm_victim.label_map import match_labels
from wm_victim.reading import (
    BATCH,
    MisreadError,
    Reading,
    Trial,
    Way,
    all_ways,
    best_trial,
    read_model,
    try_ways,
    unexplained,
)

if TYPE_CHECKING:
    from wm_victim.loading import OpenedModel

_TRIED = 128  # images that sizes are tried on

_OPTIONS = (
    "say what it takes (--preprocessing, --channel-order, --mean and --std, --image-size) and how "
    "the labels are meant (--class-names, --label-offset), or --unlabelled for its own answers"
)


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
    reading: Reading

    @property
    def notes(self) -> tuple[str, ...]:
        """What did not pass, one line each."""
        return tuple(f"{check.name}: {check.detail}" for check in self.checks if not check.passed)


@dataclass(frozen=True)
class Stated:
    """What is known of a model beforehand.

    Args:
        class_names: Of its outputs, in their order.
        by_user: The user says these names; otherwise the file does.
        label_offset: The number that the labels count the first output as.
        ways: Ways to feed the model that are tried; all usual ones if None.
    """

    class_names: tuple[str, ...] | None = None
    by_user: bool = False
    label_offset: int | None = None
    ways: tuple[Way, ...] | None = None


def check_model(
    module: nn.Module, clean: CleanImages, *, num_classes: int, stated: Stated | None = None
) -> Checked:
    """Check a classifier on clean images, and find out how it reads them and their labels.

    Args:
        module: Images in [0, 1] to logits ``(N, K)``.
        clean: The defender's images.
        stated: What is known beforehand.

    Raises:
        NotScanned: It gives no finite logits of K classes, other ones the second time, no gradient
            or one that is not of its answers, one answer to all images, or answers that the labels
            do not fit in any usual reading.
    """
    module.eval()
    images, stated = clean.images, stated or Stated()
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
    detail = f"alone and in a batch, logits differ by {apart:.1g} of the largest"
    checks.append(Check("batch-independent", apart < 1e-3, detail))
    checks.append(_gradient(module, images))
    try:
        reading = read_model(
            module,
            images,
            clean.labels,
            num_classes=num_classes,
            classes=clean.classes,
            output_names=stated.class_names,
            names_stated=stated.by_user,
            label_offset=stated.label_offset,
            ways=stated.ways,
        )
    except ValueError as error:
        raise NotScanned(f"{error}; {_OPTIONS}") from error
    checks += _remarks(reading, clean, stated)
    answers = _logits(reading.module, images).argmax(1)
    answered = len(answers.unique())
    if answered < 2:
        raise NotScanned(
            f"expected answers of several classes, got label {int(answers[0])} for all; {_OPTIONS}"
        )
    detail = f"{answered} of {num_classes} labels are answered"
    checks.append(Check("answers", answered >= min(num_classes, 3), detail))
    checks.append(_follows(reading.module, images))
    return Checked(reading.module, reading.labels, reading.accuracy, tuple(checks), reading)


def _follows(module: nn.Module, images: Tensor) -> Check:
    share = margin_rise(module, images)
    if not share >= LEAST:
        raise NotScanned(
            "expected gradients that are those of its answers, got others: a step along them "
            f"raises the margin by {share:.0%} of what they promise"
        )
    return Check("margins", True, f"rise by {share:.0%} of what the gradients promise")


def choose_size(
    opened: OpenedModel,
    read: Callable[[ImageSize, int | None], CleanImages],
    stated: Stated,
    *,
    own_size: ImageSize | None = None,
) -> tuple[OpenedModel, CleanImages]:
    """The model and its images at the size that explains most labels, where it takes several.

    Args:
        opened: As its file says.
        read: Images of a size; so many of them, or all.
        stated: What is known beforehand.
        own_size: The size that the pictures have, if all have one; tried as well.

    Raises:
        NotScanned: Several sizes, and no labels that could tell.
    """
    if len(opened.image_sizes) < 2:
        return opened, read(opened.image_size, None)
    trials: dict[Trial, ImageSize] = {}
    sizes = opened.image_sizes if own_size is None else (*opened.image_sizes, own_size)
    for size in dict.fromkeys(sizes):
        clean = read(size, _TRIED)
        if clean.labels is None:
            raise NotScanned(
                f"expected --image-size: the model runs on {opened.image_sizes}, and without "
                "labels none is better"
            )
        match = partial(
            match_labels,
            num_classes=opened.num_classes,
            classes=clean.classes,
            output_names=stated.class_names,
            offset=stated.label_offset,
        )
        ways = stated.ways or all_ways(opened.module, opened.channels)
        with suppress(MisreadError):  # it does not run on images of this size
            ways_tried = try_ways(opened.module, clean.images, clean.labels, ways, match)
            trials[best_trial(ways_tried)] = size
    if not trials:
        raise NotScanned(f"expected --image-size: the model runs on none of {opened.image_sizes}")
    best = best_trial(tuple(trials), prefer_first=False)
    size, accuracy = trials[best], best.label_map.accuracy
    said = f"image size {describe_size(size)}"
    note = f"{said}, of those that it takes, explains most labels: {accuracy:.1%}"
    return replace(opened, image_size=size, notes=(*opened.notes, note)), read(size, None)


def _remarks(reading: Reading, clean: CleanImages, stated: Stated) -> list[Check]:
    """What was found out of images and labels, each with the option that says so."""
    checks, way, label_map = [], reading.way, reading.label_map
    if way != Way():
        options = "" if way.preprocessing is None else f" --preprocessing {way.preprocessing}"
        options += "" if way.channel_order == "rgb" else f" --channel-order {way.channel_order}"
        plain = "" if reading.plain is None else f"; as they are, {reading.plain:.1%} fit"
        checks.append(Check("images", reading.plain is None, f"as{options} says{plain}"))
    if label_map is None:
        return checks
    if label_map.kind not in ("names", "same order"):
        detail = label_map.describe(clean.classes)
        option = "--label-offset" if label_map.kind == "offset" else "--class-names"
        checks.append(Check("labels", stated.label_offset is not None, f"{detail} ({option})"))
    assert clean.labels is not None
    if weak := unexplained(label_map, clean.labels):
        names = ", ".join(str(label) for label in weak[:5])
        checks.append(Check("classes", False, f"images of label {names} get other answers"))
    accuracy = f"{reading.accuracy:.1%} of {len(clean.files)} images"
    return [*checks, Check("accuracy", True, accuracy)]


def _logits(module: nn.Module, images: Tensor, *, batch: int = BATCH) -> Tensor:
    at_once = images_a_pass(images, images.device, most=batch)
    with torch.no_grad():
        return torch.cat([module(part) for part in images.split(at_once)])


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
