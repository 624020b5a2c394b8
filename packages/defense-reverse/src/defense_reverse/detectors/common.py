"""What the detectors in feature space share: a split classifier, its features, small helpers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from defense_nc.batches import EndlessBatches
from defense_nc.scan_inputs import ScanInputs, open_scan
from defense_nc.verdict import ScanReport, Verdict
from defense_nc.verdict.abstention import starved_search
from defense_reverse.detectors.split import (
    FeatureSplit,
    check_split,
    image_scale,
    split_at_last_map,
)
from defense_reverse.generator import UNetGenerator
from wm_inject.core.progress import progress as show_progress
from wm_inject.core.resume import ResumeFile, fingerprint

Row = TypeVar("Row")


class SplitInputs(NamedTuple):
    """A frozen classifier in two parts, the defender's images and their features."""

    model: nn.Module
    split: FeatureSplit
    images: Tensor  # (N, C, H, W), channels last
    labels: Tensor  # (N,)
    features: Tensor  # (N, ...), without gradients
    scale: Tensor  # (1, C, 1, 1): the unit of a change of an image
    num_classes: int
    notes: tuple[str, ...] = ()  # what was done to the classifier's outputs

    def others(self, label: int) -> Tensor:
        """The images that are not of this class."""
        return self.images[self.labels != label]


class UNetSettings(Protocol):
    """The settings of a generator among those of a detector; see `UNetGenerator`."""

    @property
    def width(self) -> int: ...  # noqa: D102
    @property
    def depth(self) -> int: ...  # noqa: D102
    @property
    def convs(self) -> int: ...  # noqa: D102
    @property
    def residual(self) -> bool: ...  # noqa: D102


@contextmanager
def open_split(
    model: nn.Module,
    images: Tensor,
    *,
    labels: Tensor | None,
    device: torch.device | str | None = None,
) -> Iterator[SplitInputs]:
    """As `open_scan`, with the classifier cut in two and the features of the images.

    Raises:
        ValueError: As `open_scan`, or a model that cannot be split.
    """
    with open_scan(model, images, labels=labels, device=device) as inputs:
        images = inputs.images.contiguous(memory_format=torch.channels_last)
        split = split_at_last_map(inputs.model)
        check_split(split, inputs.model, images[:2])
        with torch.no_grad():
            features = torch.cat([split.features(part) for part in images.split(256)])
        scale = image_scale(inputs.model, images)
        yield SplitInputs(
            inputs.model,
            split,
            images,
            inputs.labels,
            features,
            scale,
            inputs.num_classes,
            inputs.notes,
        )


def resume_file(
    checkpoint: Path | None,
    inputs: ScanInputs,
    *,
    kind: str,
    settings: Mapping[str, Any],
    seed: int,
) -> ResumeFile:
    """The file of one scan of one model with these images; without a path it does nothing."""
    identity: dict[str, Any] = {}
    if checkpoint is not None:
        data = fingerprint(*inputs.model.state_dict().values(), inputs.images, inputs.labels)
        identity = {"seed": seed, "data": data, "settings": dict(settings)}
    return ResumeFile(checkpoint, kind=kind, run=identity)


def rows_by_label(
    inputs: ScanInputs,
    row: Callable[[int, torch.Generator], Row],
    *,
    kind: str,
    settings: Mapping[str, Any],
    seed: int,
    checkpoint: Path | None,
    progress: bool,
) -> list[Row]:
    """A row for every label, in their order; those that a ``checkpoint`` has are not made again.

    Args:
        row: Makes that of a label, of what a checkpoint can hold; draws from the generator alone.
        kind: The detector's name, and so are ``settings`` its own.

    Raises:
        ValueError: A checkpoint that is damaged or belongs to another scan.
    """
    random = torch.Generator().manual_seed(seed)
    file = resume_file(checkpoint, inputs, kind=kind, settings=settings, seed=seed)
    state = file.load()
    rows: list[Row] = [] if state is None else state[0]
    if state is not None:
        random.set_state(state[1])
    labels = range(len(rows), inputs.num_classes)
    for label in show_progress(labels, desc=kind, enabled=progress):
        rows.append(row(label, random))
        file.save_sometimes(lambda: (rows, random.get_state()))
    if labels:
        file.save((rows, random.get_state()))
    return rows


def check_settings(config: object, counts: Sequence[str], positive: Sequence[str]) -> None:
    """Raise ``ValueError`` for one of ``counts`` below 1, or one of ``positive`` not above 0."""
    for name in counts:
        if getattr(config, name) < 1:
            raise ValueError(f"expected {name} >= 1, got {getattr(config, name)}")
    for name in positive:
        if not 0 < getattr(config, name) < float("inf"):
            raise ValueError(f"expected {name} > 0, got {getattr(config, name)}")


def new_generator(inputs: SplitInputs, config: UNetSettings, *, seed: int) -> UNetGenerator:
    """A fresh generator for the images of a classifier, on their device."""
    generator = UNetGenerator(
        channels=inputs.images.shape[1],
        width=config.width,
        depth=config.depth,
        convs=config.convs,
        residual=config.residual,
        seed=seed,
    )
    return generator.to(inputs.images.device).to(memory_format=torch.channels_last)


def batches_of(values: Tensor, size: int, random: torch.Generator) -> EndlessBatches:
    """Endless batches of the rows of ``values``, at most ``size`` each."""
    return EndlessBatches(len(values), min(size, len(values)), random)


def squash(theta: Tensor) -> Tensor:
    """A mask between 0 and 1 from free numbers: ``tanh(theta) / 2 + 1/2``."""
    return torch.tanh(theta) / 2 + 0.5


def with_own_verdict(
    report: ScanReport,
    suspected: Sequence[int],
    reason: str,
    *,
    log: Mapping[str, Any],
) -> ScanReport:
    """The report, with the verdict of a method's own rule in place of `judge`'s."""
    hungry = starved_search(report.starved, suspected)
    verdict = Verdict.BACKDOORED if suspected else Verdict.CLEAN
    return replace(
        report,
        verdict=Verdict.NOT_SCANNED if hungry else verdict,
        suspected=() if hungry else tuple(suspected),
        reason=hungry or reason,
        log=log,
    )
