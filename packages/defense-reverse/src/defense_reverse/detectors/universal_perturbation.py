"""Universal perturbations: how small is the picture that, added to any image, sends it to a label?

The additive trigger of least size, found for every label. It needs no mask, so triggers that cover
the whole image weakly are seen as well as small and strong ones, and it costs a few hundred passes
a label at any size of image.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defense_nc.config import check_rule
from defense_nc.gradients import GradientCount, reached, vanished
from defense_nc.scan_inputs import ScanInputs, open_scan
from defense_nc.verdict import ScanReport, judge_scan
from defense_reverse.detectors.common import batches_of, check_settings, resume_file
from wm_inject.core.images import check_images
from wm_inject.core.presets import preset_of
from wm_inject.core.progress import progress as show_progress
from wm_victim.inference import images_a_pass

_GROWTH = 1.25  # of the size in a step, until a picture works for the first time
# Times the size of the search: as far as a picture is enlarged until it works on other images.
_FACTORS = (0.25, 0.35, 0.5, 0.71, 1.0, 1.41, 2.0, 2.83, 4.0)
_HALVINGS = 3  # of the range between two of them, which ends 5 % wide


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
        random = torch.Generator().manual_seed(seed)
        file = resume_file(checkpoint, inputs, kind=self.name, settings=self.settings, seed=seed)
        state = file.load()
        rows: list[list[Any]] = [] if state is None else state[0]
        if state is not None:
            random.set_state(state[1])
        labels = range(len(rows), inputs.num_classes)
        for label in show_progress(labels, desc="perturbations", enabled=progress):
            picture, size, rate, starved = self._picture(inputs, label, random)
            rows.append([picture.cpu(), size, rate, starved])
            file.save_sometimes(lambda: (rows, random.get_state()))
        if labels:
            file.save((rows, random.get_state()))
        pictures, sizes, rates, starved_shares = zip(*rows, strict=True)
        return Universal(
            torch.stack(pictures).to(inputs.images.device),
            torch.tensor(sizes, dtype=torch.float64),
            torch.tensor(rates, dtype=torch.float64),
            starved_shares,
        )

    def _picture(
        self, inputs: ScanInputs, label: int, random: torch.Generator
    ) -> tuple[Tensor, float, float, float]:
        """A label's picture, its size and rate, and the share of gradients that had vanished."""
        others = inputs.images[inputs.labels != label]
        order = torch.randperm(len(others), generator=random).to(others.device)
        kept = min(self.tested, (len(others) + 1) // 2)
        tested, searched = others[order[:kept]], others[order[kept:]]
        searched = searched if len(searched) else tested
        direction, size, gradients = self._direction(inputs.model, searched, label, random)
        size, rate = self._size(inputs.model, tested, label, direction, size)
        return size * direction, size, rate, gradients.share

    def _direction(
        self, model: nn.Module, images: Tensor, label: int, random: torch.Generator
    ) -> tuple[Tensor, float, GradientCount]:
        """The direction of the smallest picture that worked on its batch, or the last one."""
        batches, gradients = batches_of(images, self.batch_size, random), GradientCount()
        picture, size = torch.zeros_like(images[0]), self.start
        best: tuple[Tensor, float] | None = None
        for step in range(self.steps):
            batch = images[next(batches).to(images.device)]
            total, hits = torch.zeros_like(picture), 0
            for part in batch.split(images_a_pass(batch, batch.device, most=len(batch))):
                goals = torch.full((len(part),), label, device=part.device)
                moved = (part + picture).clamp(0, 1).requires_grad_()
                with torch.enable_grad():
                    logits = model(moved)
                    # The second sum is there for models of thresholds, which depend on no pixel.
                    loss = F.cross_entropy(logits, goals, reduction="sum") + 0 * moved.sum()
                    (gradient,) = torch.autograd.grad(loss, moved)
                there = reached(logits, goals)
                gradients.add(int((~there).sum()), int(vanished(gradient, logits, goals).sum()))
                total, hits = total + gradient.sum(0), hits + int(there.sum())
            works = step > 0 and hits / len(batch) >= self.floor
            if works and (best is None or size < best[1]):
                best = picture, size
            left = 1 - step / self.steps  # both lengths fall with the steps
            if best is None:
                size = min(1.0, size * _GROWTH) if step > 0 else size
            else:
                size *= 1 - 0.1 * left if works else 1 + 0.1 * left
            move = unit(total)
            picture = size * unit(picture - (0.1 + 0.4 * left) * size * move)
        picture, size = best or (picture, size)
        return unit(picture), size, gradients

    @torch.no_grad()
    def _size(
        self, model: nn.Module, images: Tensor, label: int, direction: Tensor, size: float
    ) -> tuple[float, float]:
        """The least size that succeeds on these images, between a fourth and four times, its rate.

        The widest, and its rate below the floor, if none does. Success need not grow with the size:
        a picture that is too large may lead to a third label.
        """
        parts = images.split(images_a_pass(images, images.device, most=self.batch_size))

        def rate(size: float, *, enough: float) -> float:
            """Success at a size; of the first batches alone, where it cannot be enough any more."""
            hits, left = 0, len(images)
            for part in parts:
                answers = model((part + size * direction).clamp(0, 1)).argmax(1)
                hits, left = hits + int((answers == label).sum()), left - len(part)
                if (hits + left) / len(images) < enough:
                    break
            return hits / (len(images) - left)

        low, high, found = 0.0, 0.0, 0.0
        for factor in _FACTORS:
            low, high = high, min(1.0, factor * size)
            last = factor == _FACTORS[-1]  # its rate is reported, whatever it is
            found = rate(high, enough=0.0 if last else self.floor)
            if found >= self.floor:
                break
        else:
            return high, found
        low = max(low, high / 2)
        for _ in range(_HALVINGS):
            middle = math.sqrt(low * high)
            tried = rate(middle, enough=self.floor)
            if tried >= self.floor:
                high, found = middle, tried
            else:
                low = middle
        return high, found


PRESETS: dict[str, dict[str, Any]] = {
    "fast": {},
    "paper": {"steps": 200, "batch_size": 64, "tested": 200, "floor": 0.9},
}


def unit(picture: Tensor) -> Tensor:
    """A picture whose root mean square is 1; zeros stay zeros."""
    return picture / picture.square().mean().sqrt().clamp(min=1e-12)
