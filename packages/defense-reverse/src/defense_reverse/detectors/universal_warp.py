"""Universal warps: how small are the shifts that, made in any image, send it to a label?

A trigger that moves pixels, as WaNet's, is no picture that could be added. The same search finds
it as a coarse field of shifts, one for all images.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from defense_nc.verdict.report import at_least
from defense_reverse.detectors.change_search import SearchSettings
from defense_reverse.detectors.universal_change import Universal, UniversalChange
from wm_inject.core.images import check_images, check_side
from wm_inject.core.presets import preset_of
from wm_inject.core.warps import sample, to_every_pixel, unmoved

_GROWTH = 1.15  # of the size in a step, until a field works for the first time


class Warp:
    """Fields ``(2, k, k)`` of shifts (x, y) warp images; the unit is the way from edge to edge."""

    def __init__(self, grid: int) -> None:
        self.grid = grid

    def none(self, image: Tensor) -> Tensor:  # noqa: D102
        return image.new_zeros(2, self.grid, self.grid)

    def on(self, images: Tensor, change: Tensor) -> Tensor:  # noqa: D102
        size = images.shape[2], images.shape[3]
        # Edges are two apart, and nothing is read from beyond them.
        places = unmoved(size).to(images.device) + 2 * to_every_pixel(change[None], size)
        return sample(images, places.clamp(-1, 1).expand(len(images), -1, -1, -1))

    def gradient(self, images: Tensor, change: Tensor, gradients: Tensor) -> Tensor:  # noqa: D102
        with torch.enable_grad():
            change = change.detach().requires_grad_()
            (own,) = torch.autograd.grad(self.on(images, change), change, gradients)
        return own


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
        return Warp(self.field.shape[1]).on(images, self.field)


@dataclass(frozen=True)
class UniversalWarp(UniversalChange):
    """Universal warps of least size as a `defense_nc.Detector`.

    A report's scores are the sizes of the fields, the largest for a label that none reaches, and
    its triggers are `WarpField`.

    Args:
        steps: Of the search, each on a batch of other classes' images.
        batch_size: Images a step.
        tested: Images that success is measured on; at most half of those at hand.
        start: Size that the search begins at, a small one: root mean square of the shifts of the
            control grid, where 1 is the image's side.
        floor: Success rate that sizes are compared at, in (0, 1].
        grid: Side of the control grid, at least 2.
        most: The largest size that is tried.
        alpha: As for `defense_nc.NeuralCleanse`, and so is ``max_ratio``.

    Source: ours; the search is that of `UniversalPerturbation`.
    """

    name: ClassVar[str] = "warp"
    compares_all: ClassVar[bool] = True
    steps: int = 40
    batch_size: int = 32
    grid: int = 8
    most: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_side(self.grid, at_least=2)
        if not self.start < self.most <= 1:
            raise ValueError(f"expected most above {self.start:.3g} and at most 1, got {self.most}")

    @property
    def search_settings(self) -> SearchSettings:
        """Those of the search for a field that warps."""
        settings = super().search_settings
        return settings._replace(growth=_GROWTH, most=self.most, effect=Warp(self.grid))

    def scores(self, found: Universal) -> Tensor:
        """The sizes, and the largest where no field sends enough images to the label."""
        reached = at_least(found.rates, self.floor)
        return torch.where(reached, found.sizes, self.most)

    def trigger(self, change: Tensor) -> WarpField:
        """A field as a Trigger."""
        return WarpField(change)

    @classmethod
    def preset(cls, name: str = "fast", **changes: Any) -> UniversalWarp:
        """Settings by name, with changes. There is no paper: "paper" searches longer."""
        return preset_of(cls, PRESETS, name, **changes)


PRESETS: dict[str, dict[str, Any]] = {
    "fast": {},
    "paper": {"steps": 200, "batch_size": 64, "tested": 200},
}
