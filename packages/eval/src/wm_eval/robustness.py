"""How accurate a classifier is, how often its backdoor opens, and what corruption does to both.

The order is trigger, 8-bit quantisation, corruption, classifier. Clean images take the same way
without the trigger and meet the same random corruption, so that the columns can be compared.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from wm_eval.intervals import Difference, Interval, paired_difference, wilson
from wm_extract import Corruption, balanced_bit_accuracy
from wm_inject import Trigger, check_labels, quantize
from wm_inject.attacks import source_of
from wm_inject.watermark.picture import check_watermark
from wm_victim import ImageSet

LabelMap = Literal["all-to-one", "all-to-all", "source-specific", "clean-label"]
LABEL_MAPS = get_args(LabelMap)


class Outcomes(NamedTuple):
    """What happened to each test image: bool tensors, one row an image, on the CPU."""

    correct: Tensor  # (N,) the clean image got its own label
    attacked: Tensor  # (N,) the image counts for the attack: its class is not the target
    opened: Tensor  # (N,) with the trigger it got the target label
    false: Tensor  # (N,) without the trigger it got that label


@dataclass(frozen=True)
class Metrics:
    """Three rates under one corruption, with their counts and Wilson's 95 % intervals."""

    cda: float  # clean images classified correctly
    asr: float  # triggered non-target images that got the target label
    ftr: float  # the same images without the trigger that got it all the same
    n_clean: int
    n_attack: int
    cda_interval: Interval
    asr_interval: Interval
    ftr_interval: Interval


def evaluate(
    model: nn.Module,
    trigger: Trigger,
    test: ImageSet,
    *,
    target: int,
    corruptions: Mapping[str, Corruption],
    seed: int = 0,
    label_map: LabelMap = "all-to-one",
    batch_size: int = 256,
) -> dict[str, Metrics]:
    """Measure clean accuracy, attack success and false triggers under each corruption.

    Args:
        model: A classifier, [0, 1] images to logits ``(N, K)``; comes back in its mode.
        trigger: The trigger of the attack.
        test: Images the classifier was not trained on.
        target: The label the attack asks for (not used by "all-to-all").
        corruptions: By name; each name seeds its own stream of randomness.
        label_map: "all-to-all" asks for label + 1 and counts all images; "source-specific" counts
            those of the class after the target (`wm_inject.attacks.source_of`); the others ask for
            ``target`` and leave out images that are of that class anyway.
        batch_size: Images at once. Part of what fixes the draw of a corruption.

    Returns:
        By the name of the corruption.

    Raises:
        ValueError: A label or target that is no class, no corruption, or no image that counts.

    Source: Wang et al., "Spy-Watermark", section 3.1 (CDA, ASR). Leaving out the target class, and
        the false-trigger rate that unmasks a collapsed model, are ours.
    """
    rows = outcomes(
        model,
        trigger,
        test,
        target=target,
        corruptions=corruptions,
        seed=seed,
        label_map=label_map,
        batch_size=batch_size,
    )
    return {name: summarize(row) for name, row in rows.items()}


@torch.no_grad()
def outcomes(
    model: nn.Module,
    trigger: Trigger,
    test: ImageSet,
    *,
    target: int,
    corruptions: Mapping[str, Corruption],
    seed: int = 0,
    label_map: LabelMap = "all-to-one",
    batch_size: int = 256,
) -> dict[str, Outcomes]:
    """What `evaluate` counts, image by image, so that two models can be compared in pairs.

    Raises:
        ValueError: As `evaluate`.
    """
    images, labels = test.images, test.labels
    _check_settings(target, corruptions, seed, label_map, batch_size)
    device = next((p.device for p in model.parameters()), images.device)
    was_training = model.training
    model.eval()
    rows: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in corruptions}
    streams = {name: torch.Generator().manual_seed(stream(seed, name)) for name in corruptions}
    try:
        num_classes = model(images[:1].to(device)).shape[1]
        check_labels(labels, len(labels), num_classes=num_classes)
        if target >= num_classes:
            raise ValueError(f"expected a target label below {num_classes} classes, got {target}")
        for index in torch.arange(len(images), device=images.device).split(batch_size):
            batch, ids = images[index].to(device), test.ids[index].to(device)
            targets = aim_of(labels[index].to(device), target, label_map, num_classes).targets
            plain, marked = quantize(batch), quantize(trigger(batch, ids=ids, target=targets))
            for name, corruption in corruptions.items():
                both = corrupt_alike(corruption, streams[name], plain, marked)
                first = model(both[0]).argmax(1).cpu()
                same = torch.equal(*both)  # of no trigger
                rows[name].append((first, first if same else model(both[1]).argmax(1).cpu()))
    finally:
        model.train(was_training)
    return {
        name: _outcomes(parts, labels.cpu(), target, label_map, num_classes)
        for name, parts in rows.items()
    }


def summarize(rows: Outcomes) -> Metrics:
    """Count the outcomes of one corruption.

    Raises:
        ValueError: Columns of different lengths, or no image that counts for the attack.
    """
    lengths = {len(column) for column in rows}
    if len(lengths) != 1 or any(column.dtype != torch.bool for column in rows):
        raise ValueError(f"expected four bool columns of one length, got lengths {sorted(lengths)}")
    n_clean, n_attack = len(rows.correct), int(rows.attacked.sum())
    if n_attack == 0:
        raise ValueError("expected images of another class than the target, got none")
    correct = int(rows.correct.sum())
    opened, false = (int((c & rows.attacked).sum()) for c in (rows.opened, rows.false))
    return Metrics(
        cda=correct / n_clean,
        asr=opened / n_attack,
        ftr=false / n_attack,
        n_clean=n_clean,
        n_attack=n_attack,
        cda_interval=wilson(correct, n_clean),
        asr_interval=wilson(opened, n_attack),
        ftr_interval=wilson(false, n_attack),
    )


def compare(first: Tensor, second: Tensor) -> Difference:
    """The success rate of ``first`` minus that of ``second``, measured on the same images.

    Args:
        first: bool ``(N,)``, one row an image.
        second: bool ``(N,)``, the same images in the same order.

    Returns:
        The difference and its 95 % interval (Bonett and Price's for paired proportions).

    Raises:
        ValueError: Not two bool columns of one length, at least 1.
    """
    for column in (first, second):
        if not isinstance(column, Tensor) or column.dtype != torch.bool or column.ndim != 1:
            raise ValueError("expected two bool columns of shape (N,) to compare")
    if len(first) != len(second) or len(first) == 0:
        raise ValueError(f"expected two columns of one length, got {len(first)} and {len(second)}")
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    return paired_difference(only_first, only_second, len(first))


def constant_score(watermark: Tensor) -> float:
    """The better of the two constant pictures' balanced bit accuracy: what knowing nothing earns.

    Raises:
        ValueError: A watermark of another shape than ``(1, H, W)``, or all lit or all dark.
    """
    if not isinstance(watermark, Tensor) or watermark.ndim != 3 or watermark.shape[0] != 1:
        got = tuple(watermark.shape) if isinstance(watermark, Tensor) else type(watermark).__name__
        raise ValueError(f"expected a watermark of shape (1, H, W), got {got}")
    check_watermark(watermark, size=watermark.shape[1])
    both = torch.stack([torch.zeros_like(watermark), torch.ones_like(watermark)])
    return float(balanced_bit_accuracy(both, watermark).max())


def _check_settings(
    target: int, corruptions: Mapping[str, Corruption], seed: int, label_map: str, batch_size: int
) -> None:
    if target < 0:
        raise ValueError(f"expected a target label >= 0, got {target}")
    if not corruptions:
        raise ValueError("expected at least one corruption (the identity counts), got none")
    if seed < 0:
        raise ValueError(f"expected a seed >= 0, got {seed}")
    if label_map not in LABEL_MAPS:
        raise ValueError(f"expected label_map in {', '.join(LABEL_MAPS)}, got {label_map!r}")
    if batch_size < 1:
        raise ValueError(f"expected batch_size >= 1, got {batch_size}")


def stream(seed: int, name: str) -> int:
    """A seed per corruption, so that adding one leaves the draws of the others alone."""
    return (seed * 1_000_003 + zlib.crc32(name.encode())) % 2**63


def corrupt_alike(
    corruption: Corruption, generator: torch.Generator, plain: Tensor, marked: Tensor
) -> tuple[Tensor, Tensor]:
    """Both batches under the same draw: the generator is wound back in between."""
    state = generator.get_state()
    first = corruption(plain, generator=generator)
    generator.set_state(state)
    return first, corruption(marked, generator=generator)


class Aim(NamedTuple):
    """What an attack asks of images."""

    targets: Tensor  # int64 (N,): the label of each
    counted: Tensor  # bool (N,): it works on this class, whose own label is another


def aim_of(labels: Tensor, target: int, label_map: str, num_classes: int) -> Aim:
    """What an attack asks of images of these classes ``(N,)``; the settings are `evaluate`'s."""
    if label_map == "all-to-all":
        return Aim((labels + 1) % num_classes, torch.ones_like(labels, dtype=torch.bool))
    targets = torch.full_like(labels, target)
    if label_map == "source-specific":
        return Aim(targets, labels == source_of(target, num_classes))
    return Aim(targets, labels != target)


def _outcomes(
    parts: list[tuple[Tensor, Tensor]],
    labels: Tensor,
    target: int,
    label_map: str,
    num_classes: int,
) -> Outcomes:
    clean, triggered = (torch.cat(column) for column in zip(*parts, strict=True))
    targets, counted = aim_of(labels, target, label_map, num_classes)
    return Outcomes(clean == labels, counted, triggered == targets, clean == targets)
