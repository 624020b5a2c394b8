"""Universal perturbations: how small is the picture that, added to any image, sends it to a label?

The additive trigger of least size, found for every label. It needs no mask, so triggers that cover
the whole image weakly are seen as well as small and strong ones, and it costs a few hundred passes
a label at any size of image.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from defense_nc.config import check_rule
from defense_nc.scan_inputs import ScanInputs, open_scan
from defense_nc.verdict import ScanReport, judge_scan
from defense_reverse.detectors.common import check_settings, rows_by_label
from defense_reverse.detectors.picture_search import (
    SearchSettings,
    SmallPicture,
    smallest_pictures,
    split_group,
)
from wm_inject.core.images import check_images
from wm_inject.core.presets import preset_of


class UniversalPicture(nn.Module):
    """A picture that is added to images, and itself a Trigger: ``clamp(images + picture, 0, 1)``.

    Args:
        picture: ``(C, H, W)``, in units of [0, 1], of either sign.
    """

    kind = "universal-picture"
    picture: Tensor

    def __init__(self, picture: Tensor) -> None:
        super().__init__()
        if not isinstance(picture, Tensor) or picture.ndim != 3 or not picture.isfinite().all():
            raise ValueError("expected a finite picture (C, H, W)")
        self.register_buffer("picture", picture)

    @property
    def config(self) -> dict[str, Any]:
        """The settings, ready for JSON."""
        return {"shape": list(self.picture.shape)}

    def forward(
        self, images: Tensor, *, ids: Tensor | None = None, target: Tensor | None = None
    ) -> Tensor:
        """Triggered images, in [0, 1]; ``ids`` and ``target`` change nothing."""
        channels, height, width = self.picture.shape
        check_images(images, channels=channels, size=(height, width))
        return (images + self.picture).clamp(0, 1)


class Universal(NamedTuple):
    """The pictures of all labels."""

    pictures: Tensor  # float32 (K, C, H, W)
    sizes: Tensor  # float64 (K,): root mean square of each picture, in units of [0, 1]
    rates: Tensor  # float64 (K,): success on images that were not searched with
    starved: tuple[float, ...]  # by label: as `ScanReport.starved`


@dataclass(frozen=True)
class UniversalPerturbation:
    """Universal perturbations of least size as a `defense_nc.Detector`.

    Args:
        steps: Of the search, each on a batch of other classes' images.
        batch_size: Images a step.
        tested: Images that success is measured on; at most half of those at hand.
        start: Size that the search begins at, a small one: root mean square in units of [0, 1].
        floor: Success rate that sizes are compared at, in (0, 1].
        alpha: As for `defense_nc.NeuralCleanse`, and so is ``max_ratio``.

    Source: Xiang, Miller and Kesidis, "Detection of Backdoors in Trained Classifiers Without Access
        to the Training Set" (IEEE TNNLS 2022): the additive perturbation of least norm, there of
        each pair of classes, and a test of the norms. The search is that of Rony et al.,
        "Decoupling Direction and Norm" (CVPR 2019), with one direction for all images.
    """

    name: ClassVar[str] = "uap"
    steps: int = 25
    batch_size: int = 24
    tested: int = 50
    start: float = 2 / 255
    floor: float = 0.8
    alpha: float = 0.05
    max_ratio: float = 0.5

    def __post_init__(self) -> None:
        check_settings(self, ("steps", "batch_size", "tested"), ("start",))
        if not 0 < self.floor <= 1:
            raise ValueError(f"expected a floor in (0, 1], got {self.floor}")
        check_rule(self.alpha, self.max_ratio)

    @classmethod
    def preset(cls, name: str = "fast", **changes: Any) -> UniversalPerturbation:
        """Settings by name, with changes.

        "paper" has its success rate, and enough steps to converge; "fast" is ours.
        """
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
        """Find every label's picture, and decide whether one is unusually small.

        A ``checkpoint`` holds the labels that are done. It stays after the last one, so that the
        same scan again costs nothing.

        Returns:
            A report whose scores are the sizes, and whose triggers are `UniversalPicture`.
        """
        with open_scan(model, images, labels=labels, device=device) as inputs:
            found = self.search(inputs, seed=seed, progress=progress, checkpoint=checkpoint)
        return judge_scan(
            self.name,
            found.sizes,
            found.rates,
            model=model,
            images=images,
            settings=self.settings,
            floor=self.floor,
            alpha=self.alpha,
            max_ratio=self.max_ratio,
            triggers={k: UniversalPicture(picture) for k, picture in enumerate(found.pictures)},
            seed=seed,
            starved=found.starved,
            notes=inputs.notes,
        )

    def search(
        self,
        inputs: ScanInputs,
        *,
        seed: int,
        progress: bool = False,
        checkpoint: Path | None = None,
    ) -> Universal:
        """The smallest picture found for every label; ``checkpoint`` as for `scan`.

        Raises:
            ValueError: A checkpoint that is damaged or belongs to another scan.
        """
        rows = rows_by_label(
            inputs,
            lambda label, random: self._picture(inputs, label, random).stored(),
            kind=self.name,
            settings=self.settings,
            seed=seed,
            checkpoint=checkpoint,
            progress=progress,
        )
        pictures, sizes, rates, starved_shares = zip(*rows, strict=True)
        return Universal(
            torch.stack(pictures).to(inputs.images.device),
            torch.tensor(sizes, dtype=torch.float64),
            torch.tensor(rates, dtype=torch.float64),
            starved_shares,
        )

    def _picture(self, inputs: ScanInputs, label: int, random: torch.Generator) -> SmallPicture:
        """A label's picture."""
        others = inputs.images[inputs.labels != label]
        goals = torch.full((len(others),), label, device=others.device)
        group = split_group(others, goals, self.tested, random)
        settings = SearchSettings(self.steps, self.batch_size, self.start, self.floor)
        return smallest_pictures(inputs.model, [group], settings, random)[0]


PRESETS: dict[str, dict[str, Any]] = {
    "fast": {},
    "paper": {"steps": 200, "batch_size": 64, "tested": 200, "floor": 0.9},
}
