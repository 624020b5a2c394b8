"""Neural attention distillation: a student imitates the attention maps of a fine-tuned teacher."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defense_nc.mitigations import (
    Sgd,
    check_repair,
    cross_entropy,
    fine_tune,
    sgd_preset,
    trainable,
)
from defense_nc.protocols import Repaired
from wm_inject.core.plan import Trigger
from wm_victim.activations import conv_stages, record_outputs
from wm_victim.inference import frozen

_EPSILON = 1e-6  # the released code's, against maps of zeros


@dataclass(frozen=True, kw_only=True)
class NAD:
    """Fine-tune a teacher, then a student that keeps to the teacher's attention maps.

    Args:
        sgd: How both are trained; its steps are those of both together, and the student's schedule
            starts anew.
        teacher_share: Share of the steps that the teacher takes, in (0, 1).
        power: p of the attention map, above 0.
        betas: Weight of each layer's distance, the last layer's last.
        layers: Names of the layers to compare, as many as betas; the ends of the last stages of the
            network (`conv_stages`) if None, and then a network with fewer stages leaves out the
            first betas.

    Source: Li et al. 2021, section 3. The released code ends the maps' loss after 20 passes; here
        the student stops there.
    """

    name: ClassVar[str] = "nad"
    sgd: Sgd = Sgd(weight_decay=1e-4, nesterov=True)
    teacher_share: float = 1 / 3
    power: float = 2.0
    betas: tuple[float, ...] = (500.0, 1000.0, 1000.0)
    layers: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not 0 < self.teacher_share < 1 or self.sgd.steps < 2:
            raise ValueError(
                "expected teacher_share in (0, 1) and steps >= 2, "
                f"got {self.teacher_share}, {self.sgd.steps}"
            )
        if not self.power > 0:
            raise ValueError(f"expected a power above 0, got {self.power}")
        if not self.betas or not all(beta >= 0 for beta in self.betas):
            raise ValueError(f"expected betas >= 0, got {self.betas}")
        if self.layers is not None and len(self.layers) != len(self.betas):
            raise ValueError(f"expected {len(self.betas)} layers, as betas, got {self.layers}")

    @classmethod
    def preset(cls, name: str = "fast", **changes: Any) -> NAD:
        """Settings by name, with changes.

        "paper" is the released code's: ten passes over 2,500 images in batches of 64 for the
        teacher, twenty for the student, at 0.1 and soon a tenth of it. "fast" has as many steps as
        the other mitigations' presets, batches of 32, and rates for small networks (ours).
        """
        return sgd_preset(cls, PRESETS, name, **changes)

    def repair(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        *,
        triggers: Mapping[int, Trigger] | None = None,
        seed: int = 0,
        progress: bool = False,
    ) -> Repaired:
        """Distil a copy; the log holds the layers and the losses of teacher and student.

        Raises:
            ValueError: A network without spatial maps, or layers that give none.
            DivergedError: The loss became NaN or infinite.
        """
        check_repair(model, images, labels)
        # A copy: even finding the layers runs the model.
        teacher, student = copy.deepcopy(model), copy.deepcopy(model)
        layers = self.layers or conv_stages(student, images)[-len(self.betas) :]
        device = trainable(student)[0].device
        _check_layers(student, layers, images[:2].to(device))
        steps = self.sgd.steps
        first = min(steps - 1, max(1, round(self.teacher_share * steps)))
        shared: dict[str, Any] = {"seed": seed, "progress": progress}
        teacher_losses = fine_tune(
            teacher, images, labels, sgd=replace(self.sgd, steps=first), desc="teacher", **shared
        )
        sgd = replace(self.sgd, steps=steps - first)
        with frozen(teacher):
            loss = self._loss(student, teacher, layers, sgd)
            losses = fine_tune(
                student, images, labels, sgd=sgd, loss=loss, desc="student", **shared
            )
        log = {"steps": steps, "layers": list(layers)}
        return Repaired(student, {**log, "teacher_losses": teacher_losses, "losses": losses})

    def _loss(
        self, student: nn.Module, teacher: nn.Module, layers: Sequence[str], sgd: Sgd
    ) -> Callable[[Tensor, Tensor], Tensor]:
        betas, prediction = self.betas[-len(layers) :], cross_entropy(student, sgd)

        def loss(images: Tensor, labels: Tensor) -> Tensor:
            with torch.no_grad(), record_outputs(teacher, layers) as teacher_maps:
                teacher(images)
            with record_outputs(student, layers) as maps:
                total = prediction(images, labels)
            for layer, beta in zip(layers, betas, strict=True):
                distance = attention_loss(maps[layer], teacher_maps[layer], power=self.power)
                total = total + beta * distance
            return total

        return loss


PRESETS: dict[str, dict[str, Any]] = {
    "fast": {},
    "paper": {
        "steps": 1200,
        "batch_size": 64,
        "lr": 0.1,
        "schedule": "drop",
        "augmentation": "crop-flip",
    },
}


def attention_map(maps: Tensor, *, power: float = 2.0) -> Tensor:
    """Where a layer is active: ``sum over c of |maps|^power``, with an L2 norm of 1 per image.

    From ``(N, C, H, W)`` to ``(N, H, W)``, zeros where the maps are. At a single pixel the
    attention would be 1 whatever happens, so more are needed.
    """
    if not isinstance(maps, Tensor) or not maps.is_floating_point() or maps.ndim != 4:
        got = tuple(maps.shape) if isinstance(maps, Tensor) else type(maps).__name__
        raise ValueError(f"expected float maps of shape (N, C, H, W), got {got}")
    if maps.shape[2] * maps.shape[3] < 2:
        raise ValueError(
            f"expected maps of more than one pixel for attention, got {tuple(maps.shape)}"
        )
    if not power > 0:
        raise ValueError(f"expected a power above 0, got {power}")
    attention = maps.abs().pow(power).sum(1)
    norm = torch.linalg.vector_norm(attention, dim=(1, 2), keepdim=True)
    return attention / (norm + _EPSILON)


def attention_loss(student: Tensor, teacher: Tensor, *, power: float = 2.0) -> Tensor:
    """The mean squared difference of two layers' attention maps, from ``(N, C, H, W)`` each."""
    first, second = (attention_map(maps, power=power) for maps in (student, teacher))
    if first.shape != second.shape:
        raise ValueError(
            f"expected two attention maps of one shape, got {tuple(first.shape)} "
            f"and {tuple(second.shape)}"
        )
    return F.mse_loss(first, second)


def _check_layers(model: nn.Module, layers: Sequence[str], images: Tensor) -> None:
    """Refuse layers without spatial maps before any training."""
    with frozen(model), torch.no_grad(), record_outputs(model, layers) as maps:
        model(images)
    for layer in layers:
        if layer not in maps:
            raise ValueError(f"expected layers that run in the model, {layer!r} does not")
        attention_map(maps[layer])
