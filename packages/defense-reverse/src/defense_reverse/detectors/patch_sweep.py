"""A sweep of patches: does a plain square somewhere in the picture send all images to one label?

Forward passes alone, hardly more for a thousand labels than for ten. It sees patches like those
that it stamps, black, white or chequered squares; nothing that covers the image.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
from defense_reverse.detectors.common import check_settings, resume_file
from defense_reverse.detectors.trials import Trial, scores_of
from wm_inject.core.presets import preset_of
from wm_inject.core.progress import progress as show_progress

_LEAST = 3  # pixels a side of a square
_CELLS = 3  # a side of a chequered one


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
    gaps: Tensor  # float64 (K,): what it leaves of the way to the label, 1 if it does nothing
    rates: Tensor  # float64 (K,): share of the images that it sends there


@dataclass(frozen=True)
class PatchSweep:
    """A sweep of patches as a `defense_nc.Detector`.

    Args:
        places: A side of the grid of places, from edge to edge.
        sides: Of the squares, as shares of the image's side; at least three pixels.
        searched: Images that every patch is tried on.
        tested: Further images, that the best patch of a label is tried on.
        works: Share of the images that a patch must send to its label, or it is no trigger.
        candidates: Labels whose best patch is tested on these: those that it came closest to.
        alpha: As for `defense_nc.NeuralCleanse`, and so is ``max_ratio``.

    Source: ours.
    """

    name: ClassVar[str] = "sweep"
    places: int = 8
    sides: tuple[float, ...] = (0.1, 0.16)
    searched: int = 8
    tested: int = 40
    works: float = 0.75
    candidates: int = 64
    alpha: float = 0.05
    max_ratio: float = 0.5

    def __post_init__(self) -> None:
        object.__setattr__(self, "sides", tuple(self.sides))
        check_settings(self, ("places", "searched", "tested", "candidates"), ())
        if not self.sides or not all(0 < side <= 0.5 for side in self.sides):
            raise ValueError(f"expected sides in (0, 0.5], got {self.sides}")
        if not 0 < self.works <= 1:
            raise ValueError(f"expected works in (0, 1], got {self.works}")
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

        A ``checkpoint`` holds the result, so that the same scan again costs nothing.

        Returns:
            A report whose scores say what the best patch leaves of the way to the label: the gap
            between its logit and the highest, over that without a patch, and half an image's share,
            so that a logarithm is defined. A label without a patch that works has 1 more. Its
            triggers are the patches that work.
        """
        with open_scan(model, images, labels=labels, device=device) as inputs:
            sweep = self.search(inputs, seed=seed, progress=progress, checkpoint=checkpoint)
        return judge_scan(
            self.name,
            self.scores(sweep),
            sweep.rates,
            model=model,
            images=images,
            settings=self.settings,
            floor=0.0,
            works=self.works,
            alpha=self.alpha,
            max_ratio=self.max_ratio,
            triggers={
                label: patch.trigger(images.shape[1:], label, float(sweep.rates[label]))
                for label, patch in enumerate(sweep.patches)
                if sweep.rates[label] >= self.works
            },
            seed=seed,
            notes=inputs.notes,
        )

    def scores(self, sweep: Sweep) -> Tensor:
        """The scores of all labels, float64 ``(K,)``."""
        return scores_of(sweep.gaps, sweep.rates, works=self.works, tested=self.tested)

    def search(
        self,
        inputs: ScanInputs,
        *,
        seed: int,
        progress: bool = False,
        checkpoint: Path | None = None,
    ) -> Sweep:
        """The best patch found for every label; ``checkpoint`` as for `scan`.

        Raises:
            ValueError: A checkpoint that is damaged or belongs to another scan.
        """
        file = resume_file(checkpoint, inputs, kind=self.name, settings=self.settings, seed=seed)
        patches, state = list(self.patches(inputs.images.shape[1:])), file.load()
        if state is None:
            state = self._best(inputs, patches, seed=seed, progress=progress)
            file.save(state)
        best, gaps, rates = state
        return Sweep([patches[index] for index in best], gaps, rates)

    @torch.no_grad()
    def _best(
        self, inputs: ScanInputs, patches: Sequence[Patch], *, seed: int, progress: bool
    ) -> tuple[list[int], Tensor, Tensor]:
        """Every label's best patch by its index, its gap and its rate."""
        order = torch.randperm(len(inputs.images), generator=torch.Generator().manual_seed(seed))
        order = order.to(inputs.images.device)
        rest = order[self.searched :][: self.tested]
        searched = Trial.of(inputs, order[: self.searched])
        tested = Trial.of(inputs, rest if len(rest) else order)
        gaps = torch.full((inputs.num_classes,), torch.inf, dtype=torch.float64)
        rates, best = torch.zeros_like(gaps), [0] * inputs.num_classes
        for index, patch in enumerate(show_progress(patches, desc="patches", enabled=progress)):
            moved = searched.after(patch.on)
            for label in (moved.gaps < gaps).nonzero().flatten().tolist():
                gaps[label], rates[label] = moved.gaps[label], moved.rates[label]
                best[label] = index
        for label in gaps.argsort(stable=True)[: self.candidates].tolist():
            moved = tested.after(patches[best[label]].on)
            gaps[label], rates[label] = moved.gaps[label], moved.rates[label]
        return best, gaps, rates

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
    "paper": {"places": 16, "searched": 20, "tested": 100, "candidates": 200},
}


def _places(last: int, count: int) -> list[int]:
    return [int(place) for place in np.unique(np.linspace(0, last, count).round())]
