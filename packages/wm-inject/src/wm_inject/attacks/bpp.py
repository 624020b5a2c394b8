"""BppAttack: colours squeezed to a few levels per channel, with dithering."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from wm_inject.attacks.common import check_batch, show_config
from wm_inject.attacks.cotraining import CrossTriggerHook
from wm_inject.attacks.definition import Attack, Length
from wm_inject.core.images import check_side
from wm_inject.core.plan import PoisonPlan


class BppTrigger(nn.Module):
    """Round every channel to ``levels`` values; dithering passes each error on to its neighbours.

    Floyd and Steinberg's errors go 7/16 to the right, and 3/16, 5/16 and 1/16 to the row below. A
    pixel at (row, column) depends on none of its own front ``column + 2 row``, so that the image is
    worked on front by front, ``3 H - 2`` of them.

    Args:
        levels: Values per channel, 2 .. 256; 8 are 3 bits.
        dithering: Diffuse the errors. BackdoorBench's own default is False.

    Source: Wang et al., "BppAttack" (CVPR 2022), with BackdoorBench's ``squeeze_num`` of 8. Floyd &
    Steinberg, "An Adaptive Algorithm for Spatial Greyscale" (1976).
    """

    kind = "bpp"
    extra_repr = show_config
    skew: Tensor
    back: Tensor
    inside: Tensor

    def __init__(self, *, image_size: int, levels: int = 8, dithering: bool = True) -> None:
        super().__init__()
        check_side(image_size)
        if not isinstance(levels, int) or not 2 <= levels <= 256:
            raise ValueError(f"expected levels in 2 .. 256, got {levels}")
        self.config: dict[str, Any] = {
            "image_size": image_size,
            "levels": levels,
            "dithering": bool(dithering),
        }
        row, column = torch.arange(image_size)[:, None], torch.arange(image_size)
        front = torch.arange(3 * image_size - 2)[:, None]
        of_front = front - 2 * row.T  # (T, H): the column that each row has at each front
        inside = (of_front >= 0) & (of_front < image_size)
        skew = row.T * image_size + of_front.clamp(0, image_size - 1)
        back = (column + 2 * row) * image_size + row  # (H, W): where a pixel is in (T, H)
        self.register_buffer("skew", skew.flatten(), persistent=False)
        self.register_buffer("back", back.flatten(), persistent=False)
        self.register_buffer("inside", inside.double(), persistent=False)

    def forward(
        self, images: Tensor, *, ids: Tensor | None = None, target: Tensor | None = None
    ) -> Tensor:
        """Squeeze the colours."""
        check_batch(images, self.config)
        values = images.double()
        # In double precision: rounding errors must not choose between two levels.
        squeezed = self._dither(values) if self.config["dithering"] else self._round(values)
        return squeezed.clamp(0, 1).float()

    def cross(self, images: Tensor, rows: Tensor, generator: torch.Generator) -> Tensor:
        """The images at ``rows``, each with the change of another image of the batch."""
        shift = torch.randint(1, max(2, len(images)), (len(rows),), generator=generator)
        donors = images[(rows + shift.to(rows.device)) % len(images)]
        return (images[rows] + self(donors) - donors).clamp(0, 1)

    def _round(self, values: Tensor) -> Tensor:
        steps = self.config["levels"] - 1
        return (values * steps).round() / steps

    def _dither(self, values: Tensor) -> Tensor:
        side = self.config["image_size"]
        fronts = values.flatten(2)[..., self.skew].unflatten(2, (-1, side)).movedim(2, 0)
        errors = tuple(torch.zeros_like(fronts[0]) for _ in range(3))  # of the last three fronts
        if torch.compiler.is_compiling():  # one Scan node in ONNX, not 3 H - 2 copies of a front
            from torch._higher_order_ops.scan import scan  # which has no public name yet

            _, squeezed = scan(self._front, errors, (fronts, self.inside))
        else:
            rows = []
            for front in zip(fronts.unbind(), self.inside.unbind(), strict=True):
                errors, row = self._front(errors, front)
                rows.append(row)
            squeezed = torch.stack(rows)  # (T, N, C, H)
        return squeezed.movedim(0, 2).flatten(2)[..., self.back].unflatten(2, (side, side))

    def _front(
        self, errors: tuple[Tensor, ...], front: tuple[Tensor, ...]
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Squeeze one front ``(N, C, H)``: the errors of the last three fronts, and its values."""
        first, second, third = errors
        values, inside = front
        above = (3 * first + 5 * second + third)[..., :-1] / 16
        values = values + 7 / 16 * first + nn.functional.pad(above, (1, 0))
        squeezed = self._round(values)
        return ((values - squeezed) * inside, first.clone(), second.clone()), squeezed


def _hook(
    attack: Attack, trigger: BppTrigger, plan: PoisonPlan, num_classes: int, length: Length | None
) -> CrossTriggerHook:
    """As many cross triggers as attack images, as in BackdoorBench (pratio = neg_ratio = 0.1)."""
    return CrossTriggerHook(trigger, plan, num_classes, cross_ratio=1.0)


ATTACK = Attack("bpp", "BppAttack", BppTrigger, mode="per_batch", co_training=_hook)
