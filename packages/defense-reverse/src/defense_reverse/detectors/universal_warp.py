"""Universal warps: do tiny shifts of pixels, the same in all images, send them to one label?

A trigger that moves pixels, as WaNet's, is no picture that could be added. A coarse field of shifts
of a given small size is sought for every label: those of clean networks go a part of the way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from defense_nc.config import check_rule
from defense_nc.gradients import GradientCount
from defense_nc.scan_inputs import ScanInputs, open_scan
from defense_nc.verdict import ScanReport, judge_scan
from defense_reverse.detectors.common import batches_of, check_settings, rows_by_label
from defense_reverse.detectors.picture_search import image_gradients, unit
from defense_reverse.detectors.trials import Trial, scores_of
from wm_inject.core.images import check_images, check_side
from wm_inject.core.presets import preset_of
from wm_inject.core.warps import sample, to_every_pixel, unmoved


class WarpField(nn.Module):
    """A field of shifts that warps images, and itself a Trigger.

    Args:
        field: ``(2, k, k)``, the shifts (x, y) of a control grid over the whole image; 1 is the way
            from edge to edge.
    """

    kind = "warp-field"
    field: Tensor

    def __init__(self, field: Tensor) -> None:
        super().__init__()
        if (
            not isinstance(field, Tensor)
            or field.ndim != 3
            or field.shape[0] != 2
            or field.shape[1] != field.shape[2]
            or field.shape[1] < 2
            or not field.isfinite().all()
        ):
            raise ValueError("expected a finite field (2, k, k) of at least two shifts a side")
        self.register_buffer("field", field)

    @property
    def config(self) -> dict[str, Any]:
        """The settings, ready for JSON."""
        return {"shape": list(self.field.shape)}

    def forward(
        self, images: Tensor, *, ids: Tensor | None = None, target: Tensor | None = None
    ) -> Tensor:
        """Warped images, in [0, 1]; ``ids`` and ``target`` change nothing."""
        check_images(images)
        return warp(images, self.field)


def warp(images: Tensor, field: Tensor) -> Tensor:
    """Images ``(N, C, H, W)``, warped by a field as that of `WarpField`."""
    size = images.shape[2], images.shape[3]
    # Edges are two apart, and nothing is read from beyond them.
    places = unmoved(size).to(images.device) + 2 * to_every_pixel(field[None], size)
    return sample(images, places.clamp(-1, 1).expand(len(images), -1, -1, -1))


def field_gradient(images: Tensor, field: Tensor, gradients: Tensor) -> Tensor:
    """The gradient with respect to the field, from those with respect to the warped images."""
    with torch.enable_grad():
        field = field.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(warp(images, field), field, gradients)
    return gradient


class Warps(NamedTuple):
    """The field of every label."""

    fields: Tensor  # float32 (K, 2, k, k)
    gaps: Tensor  # float64 (K,): what it leaves of the way to the label, 1 if it does nothing
    rates: Tensor  # float64 (K,): share of the images that it sends there
    starved: tuple[float, ...]  # by label: as `ScanReport.starved`


@dataclass(frozen=True)
class UniversalWarp:
    """Universal warps of one size as a `defense_nc.Detector`.

    Args:
        steps: Of the search, each on a batch of other classes' images.
        batch_size: Images a step.
        tested: Images that a field is tried on; at most half of those at hand.
        size: Root mean square of the shifts of the control grid, where 1 is the image's side.
        grid: Side of the control grid, at least 2.
        works: Share of the images that a field must send to its label, or it is no trigger.
        alpha: As for `defense_nc.NeuralCleanse`, and so is ``max_ratio``.

    Source: ours.
    """

    name: ClassVar[str] = "warp"
    steps: int = 25
    batch_size: int = 24
    tested: int = 50
    size: float = 0.0125
    grid: int = 8
    works: float = 0.75
    alpha: float = 0.05
    max_ratio: float = 0.5

    def __post_init__(self) -> None:
        check_settings(self, ("steps", "batch_size", "tested"), ("size",))
        check_side(self.grid, at_least=2)
        if not 0 < self.works <= 1:
            raise ValueError(f"expected works in (0, 1], got {self.works}")
        check_rule(self.alpha, self.max_ratio)

    @classmethod
    def preset(cls, name: str = "fast", **changes: Any) -> UniversalWarp:
        """Settings by name, with changes. There is no paper: "paper" searches longer."""
        return preset_of(cls, PRESETS, name, **changes)

    @property
    def settings(self) -> Mapping[str, Any]:
        """The settings of the search, ready for JSON."""
        return {k: v for k, v in asdict(self).items() if k not in ("alpha", "max_ratio")}

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
        """Find every label's field, and decide whether one works unusually well.

        A ``checkpoint`` holds the labels that are done. It stays after the last one, so that the
        same scan again costs nothing.

        Returns:
            A report whose scores are those of `PatchSweep.scan`, of fields in place of patches. Its
            triggers are the fields that work, each a `WarpField`.
        """
        with open_scan(model, images, labels=labels, device=device) as inputs:
            warps = self.search(inputs, seed=seed, progress=progress, checkpoint=checkpoint)
        return judge_scan(
            self.name,
            scores_of(warps.gaps, warps.rates, works=self.works, tested=self.tested),
            warps.rates,
            model=model,
            images=images,
            settings=self.settings,
            floor=0.0,
            works=self.works,
            alpha=self.alpha,
            max_ratio=self.max_ratio,
            triggers={
                label: WarpField(field)
                for label, field in enumerate(warps.fields)
                if warps.rates[label] >= self.works
            },
            seed=seed,
            starved=warps.starved,
            notes=inputs.notes,
        )

    def search(
        self,
        inputs: ScanInputs,
        *,
        seed: int,
        progress: bool = False,
        checkpoint: Path | None = None,
    ) -> Warps:
        """The field found for every label; ``checkpoint`` as for `scan`.

        Raises:
            ValueError: A checkpoint that is damaged or belongs to another scan.
        """
        random = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(inputs.images), generator=random).to(inputs.images.device)
        count = min(self.tested, (len(order) + 1) // 2)
        trial, searched = Trial.of(inputs, order[:count]), order[count:]

        def row(label: int, random: torch.Generator) -> list[Any]:
            field, starved = self._field(inputs, searched, label, random)
            with torch.no_grad():
                moved = trial.after(lambda images: warp(images, field))
            return [field.cpu(), float(moved.gaps[label]), float(moved.rates[label]), starved]

        rows = rows_by_label(
            inputs,
            row,
            kind=self.name,
            settings=self.settings,
            seed=seed,
            checkpoint=checkpoint,
            progress=progress,
        )
        fields, gaps, rates, starved_shares = zip(*rows, strict=True)
        return Warps(
            torch.stack(fields).to(inputs.images.device),
            torch.tensor(gaps, dtype=torch.float64),
            torch.tensor(rates, dtype=torch.float64),
            starved_shares,
        )

    def _field(
        self, inputs: ScanInputs, searched: Tensor, label: int, random: torch.Generator
    ) -> tuple[Tensor, float]:
        """A label's field, and the share of images that had no gradient to follow."""
        own = searched[inputs.labels[searched] != label]
        own = own if len(own) else searched
        batches = batches_of(own, self.batch_size, random)
        field, count = inputs.images.new_zeros(2, self.grid, self.grid), GradientCount()
        for step in range(self.steps):
            images = inputs.images[own[next(batches).to(own.device)]]
            goals = torch.full((len(images),), label, device=images.device)
            gradients, there, lost = image_gradients(inputs.model, warp(images, field), goals)
            count.add(int((~there).sum()), int(lost.sum()))
            gradient = field_gradient(images, field, gradients)
            length = 0.1 + 0.4 * (1 - step / self.steps)
            field = self.size * unit(field - length * self.size * unit(gradient))
        return field, count.share


PRESETS: dict[str, dict[str, Any]] = {
    "fast": {},
    "paper": {"steps": 200, "batch_size": 64, "tested": 200},
}
