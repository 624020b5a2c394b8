"""A sweep of patches: does a plain square somewhere in the picture send all images to one label?

Forward passes alone, as many for a thousand labels as for ten. It sees patches like those that it
stamps, black, white or chequered squares; nothing that covers the image.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from defense_nc import InvertedTrigger
from defense_nc.config import check_rule
from defense_nc.scan_inputs import ScanInputs, open_scan
from defense_nc.verdict import ScanReport, judge_scan
from defense_reverse.detectors.common import check_settings
from wm_inject.core.presets import preset_of
from wm_inject.core.progress import progress as show_progress

_LEAST = 3  # pixels a side of a square
_CELLS = 3  # a side of a chequered one
_WORKS = 0.5  # of a patch that is a trigger: the share of images that it sends to its label
_VALUES = 2**23  # of the images in a pass, which bounds its memory


class Patch(NamedTuple):
    """A square at a place.

    Args:
        top: Pixels above it.
        left: Pixels to the left of it.
        picture: ``(S, S)`` in [0, 1], the same in all channels.
    """

    top: int
    left: int
    picture: Tensor

    def on(self, images: Tensor) -> Tensor:
        """Images ``(N, C, H, W)`` that carry it."""
        side = len(self.picture)
        marked = images.clone()
        marked[..., self.top : self.top + side, self.left : self.left + side] = self.picture
        return marked

    def trigger(self, shape: torch.Size, label: int, rate: float) -> InvertedTrigger:
        """It as a reversed trigger for images ``(C, H, W)``."""
        mask, side = torch.zeros(1, *shape[1:]), len(self.picture)
        mask[..., self.top : self.top + side, self.left : self.left + side] = 1
        pattern = self.on(torch.zeros(1, *shape))[0]
        return InvertedTrigger(mask, pattern, target=label, success_rate=rate)


class Sweep(NamedTuple):
    """The best patch of every label."""

    patches: list[Patch]
    rates: Tensor  # float64 (K,): success on images that it was not chosen on; 0 if it has none


@dataclass(frozen=True)
class PatchSweep:
    """A sweep of patches as a `defense_nc.Detector`.

    Args:
        places: A side of the grid of places, from edge to edge.
        sides: Of the squares, as shares of the image's side; at least three pixels.
        searched: Images that every patch is tried on.
        tested: Further images, that the best patch of a label is tried on.
        candidates: Labels whose best patch is tested: those that most images went to.
        alpha: As for `defense_nc.NeuralCleanse`, and so is ``max_ratio``.

    Source: ours.
    """

    name: ClassVar[str] = "sweep"
    places: int = 8
    sides: tuple[float, ...] = (0.1, 0.16)
    searched: int = 8
    tested: int = 40
    candidates: int = 32
    alpha: float = 0.05
    max_ratio: float = 0.5

    def __post_init__(self) -> None:
        object.__setattr__(self, "sides", tuple(self.sides))
        check_settings(self, ("places", "searched", "tested", "candidates"), ())
        if not self.sides or not all(0 < side <= 0.5 for side in self.sides):
            raise ValueError(f"expected sides in (0, 0.5], got {self.sides}")
        check_rule(self.alpha, self.max_ratio)

    @classmethod
    def preset(cls, name: str = "fast", **changes: Any) -> PatchSweep:
        """Settings by name, with changes. There is no paper: "paper" is a finer grid."""
        return preset_of(cls, PRESETS, name, **changes)

    @property
    def settings(self) -> Mapping[str, Any]:
        """The settings of the sweep, ready for JSON."""
        settings = {k: v for k, v in asdict(self).items() if k not in ("alpha", "max_ratio")}
        return settings | {"sides": list(self.sides)}

    def scan(
        self,
        model: nn.Module,
        images: Tensor,
        *,
        labels: Tensor | None = None,
        seed: int = 0,
        progress: bool = True,
        device: torch.device | str | None = None,
        checkpoint: Path | None = None,
    ) -> ScanReport:
        """Find every label's best patch, and decide whether one works unusually well.

        ``checkpoint`` is ignored.

        Returns:
            A report whose scores are the shares of images that the best patch does *not* send to
            the label (and half an image, so that a logarithm is defined), comparable for all
            labels. Its triggers are the patches that send at least half of the images.
        """
        with open_scan(model, images, labels=labels, device=device) as inputs:
            found = self.search(inputs, seed=seed, progress=progress)
        return judge_scan(
            self.name,
            1 - found.rates + 0.5 / self.tested,
            found.rates,
            model=model,
            images=images,
            settings=self.settings,
            floor=0.0,
            alpha=self.alpha,
            max_ratio=self.max_ratio,
            triggers={
                label: patch.trigger(images.shape[1:], label, float(found.rates[label]))
                for label, patch in enumerate(found.patches)
                if found.rates[label] >= _WORKS
            },
            seed=seed,
            notes=inputs.notes,
        )

    @torch.no_grad()
    def search(self, inputs: ScanInputs, *, seed: int, progress: bool = False) -> Sweep:
        """The best patch found for every label."""
        order = torch.randperm(len(inputs.images), generator=torch.Generator().manual_seed(seed))
        order = order.to(inputs.images.device)
        rest = order[self.searched :][: self.tested]
        searched, free = _with_free(inputs, order[: self.searched])
        tested, others = _with_free(inputs, rest if len(rest) else order)
        patches = list(self.patches(inputs.images.shape[1:]))
        best = torch.zeros(inputs.num_classes, dtype=torch.float64)
        chosen = [patches[0]] * inputs.num_classes
        for patch in show_progress(patches, desc="patches", enabled=progress):
            rates = _rates(inputs.model, patch.on(searched), free)
            for label in (rates > best).nonzero().flatten().tolist():
                best[label], chosen[label] = rates[label], patch
        rates = torch.zeros_like(best)
        for label in best.argsort(descending=True, stable=True)[: self.candidates].tolist():
            if best[label] > 0:
                moved = _rates(inputs.model, chosen[label].on(tested), others)
                rates[label] = moved[label]
        return Sweep(chosen, rates)

    def patches(self, shape: torch.Size) -> Iterator[Patch]:
        """All patches for images ``(C, H, W)``: black, white, and chequered in both ways."""
        height, width = shape[1:]
        sizes = {max(_LEAST, round(share * min(height, width))) for share in self.sides}
        for side in sorted(sizes):
            cells = torch.arange(side) * _CELLS // side
            chequers = ((cells[:, None] + cells) % 2).float()
            flat = torch.ones(side, side)
            for top in _places(height - side, self.places):
                for left in _places(width - side, self.places):
                    for picture in (0 * flat, flat, chequers, 1 - chequers):
                        yield Patch(top, left, picture)


PRESETS: dict[str, dict[str, Any]] = {
    "fast": {},
    "paper": {"places": 16, "searched": 20, "tested": 100, "candidates": 100},
}


def _places(last: int, count: int) -> list[int]:
    return [int(place) for place in np.unique(np.linspace(0, last, count).round())]


def _with_free(inputs: ScanInputs, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Images, and bool ``(N, K)``: the label is neither theirs nor the model's answer to them."""
    images, labels = inputs.images[chosen], inputs.labels[chosen]
    every = torch.arange(inputs.num_classes, device=images.device)
    answers = _answers(inputs.model, images)
    return images, (labels[:, None] != every) & (answers[:, None] != every)


def _rates(model: nn.Module, images: Tensor, free: Tensor) -> Tensor:
    """By label, float64 ``(K,)``: the share that goes there of the images that are free to."""
    every = torch.arange(free.shape[1], device=images.device)
    there = (_answers(model, images)[:, None] == every) & free
    return (there.sum(0).double() / free.sum(0).clamp(min=1)).cpu()


def _answers(model: nn.Module, images: Tensor) -> Tensor:
    at_once = max(1, min(256, _VALUES // images[0].numel()))
    return torch.cat([model(part).argmax(1) for part in images.split(at_once)])
