"""Universal perturbations: how small is the picture that, added to any image, sends it to a label?

The additive trigger of least size, found for every label. It needs no mask, so triggers that cover
the whole image weakly are seen as well as small and strong ones, and it costs a few hundred passes
a label at any size of image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from defense_reverse.detectors.change_search import Addition
from defense_reverse.detectors.universal_change import UniversalChange
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
        return Addition().on(images, self.picture)


@dataclass(frozen=True)
class UniversalPerturbation(UniversalChange):
    """Universal perturbations of least size as a `defense_nc.Detector`.

    A report's scores are the sizes of the pictures, and its triggers are `UniversalPicture`.

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

    def trigger(self, change: Tensor) -> UniversalPicture:
        """A picture as a Trigger."""
        return UniversalPicture(change)

    @classmethod
    def preset(cls, name: str = "fast", **changes: Any) -> UniversalPerturbation:
        """Settings by name, with changes.

        "paper" has its success rate, and enough steps to converge; "fast" is ours.
        """
        return preset_of(cls, PRESETS, name, **changes)


PRESETS: dict[str, dict[str, Any]] = {
    "fast": {},
    "paper": {"steps": 200, "batch_size": 64, "tested": 200, "floor": 0.9},
}
