"""Neural attention distillation: look where a fine-tuned teacher looks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defense_nc.mitigator import Repaired, check_repair, trainable
from defense_reverse.mitigations.attention import attention_loss, attention_map
from defense_reverse.mitigations.training import (
    Augmentation,
    Schedule,
    Sgd,
    preset_of,
    sgd_of,
    train,
)
from wm_inject.core.plan import Trigger
from wm_victim.activations import conv_stages, record_outputs
from wm_victim.inference import frozen


@dataclass(frozen=True, kw_only=True)
class NAD:
    """Fine-tune a teacher, then a student that keeps to the teacher's attention maps.

    The defaults are the preset "small".

    Args:
        steps: Optimiser steps of teacher and student together.
        teacher_share: Share of them that the teacher takes, in (0, 1).
        batch_size: Images per step.
        lr: Learning rate of SGD.
        momentum: Momentum of SGD.
        weight_decay: Weight decay of SGD.
        nesterov: Nesterov's form of the momentum.
        schedule: "constant", "cosine" or "drop"; see `Sgd`. The teacher's starts anew.
        augmentation: "none", "crop" or "crop-flip".
        label_smoothing: Share of the wanted answer that is spread over all classes.
        power: p of the attention map, above 0.
        betas: Weight of each layer's distance, the last layer's last.
        layers: Names of the layers to compare, as many as betas; the ends of the last stages of the
            network (`conv_stages`) if None, and then a network with fewer stages
            leaves out the first betas.

    Raises:
        ValueError: A value outside its range.

    Source: Li et al. 2021.
    """

    steps: int = 200
    teacher_share: float = 1 / 3
    batch_size: int = 32
    lr: float = 0.02
    momentum: float = 0.9
    weight_decay: float = 1e-4
    nesterov: bool = True
    schedule: Schedule = "cosine"
    augmentation: Augmentation = "none"
    label_smoothing: float = 0.0
    power: float = 2.0
    betas: tuple[float, ...] = (500.0, 1000.0, 1000.0)
    layers: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        sgd_of(self)
        if not 0 < self.teacher_share < 1 or self.steps < 2:
            raise ValueError(
                "expected teacher_share in (0, 1) and steps >= 2, "
                f"got {self.teacher_share}, {self.steps}"
            )
        if not self.power > 0:
            raise ValueError(f"expected a power above 0, got {self.power}")
        if not self.betas or not all(beta >= 0 for beta in self.betas):
            raise ValueError(f"expected betas >= 0, got {self.betas}")
        if self.layers is not None and len(self.layers) != len(self.betas):
            raise ValueError(f"expected {len(self.betas)} layers, as betas, got {self.layers}")

    @property
    def name(self) -> str:
        """What it is called in records and tables."""
        return "nad"

    @classmethod
    def preset(cls, name: str = "small", **changes: Any) -> NAD:
        """The settings of this name, small or paper, with some of them changed.

        "paper" is the released code's: ten passes over 2,500 images in batches of 64 for the
        teacher, twenty for the student, at 0.1 and soon a tenth of it. "small" has as many steps as
        the other baselines' presets, batches of 32, and rates for small networks (ours).

        Raises:
            ValueError: No such preset, or a value outside its range.
        """
        return preset_of(cls, PRESETS, name, changes)

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
        """Distil a copy of ``model``; ``triggers`` are ignored.

        Args:
            model: Images in [0, 1] to logits ``(N, K)``; not changed.
            images: Clean float32 ``(N, C, H, W)`` in [0, 1], N >= 2.
            labels: int64 ``(N,)``, the true classes.
            triggers: Ignored.
            seed: Seeds the order of the images, augmentation and dropout.
            progress: Show how far it is.

        Returns:
            The student; the log holds the layers, and the loss of each tenth of the teacher's and
            of the student's steps.

        Raises:
            ValueError: Bad images or labels, fewer than two images, no trainable parameter, or a
                network without spatial maps, or layers that give none.
            RuntimeError: The loss became NaN or infinite.

        Source: Li et al. 2021, section 3. The released code ends the maps' loss after 20 passes;
            here the student stops there.
        """
        check_repair(model, images, labels)
        # A copy: even finding the layers runs the model.
        teacher, student = copy.deepcopy(model), copy.deepcopy(model)
        layers = self.layers or conv_stages(student, images)[-len(self.betas) :]
        device = trainable(student)[0].device
        _check_layers(student, layers, images[:2].to(device))
        first = min(self.steps - 1, max(1, round(self.teacher_share * self.steps)))
        sgd = sgd_of(self, steps=first)
        taught = train(
            teacher, images, labels, sgd=sgd, seed=seed, desc="teacher", progress=progress
        )
        sgd = sgd_of(self, steps=self.steps - first)
        with frozen(teacher):
            loss = self._loss(student, teacher, layers, sgd)
            learnt = train(
                *(student, images, labels),
                sgd=sgd,
                seed=seed,
                loss=loss,
                desc="student",
                progress=progress,
            )
        log = {
            "steps": self.steps,
            "layers": list(layers),
            "teacher_losses": taught,
            "losses": learnt,
        }
        return Repaired(student, log)

    def _loss(
        self, student: nn.Module, teacher: nn.Module, layers: Sequence[str], sgd: Sgd
    ) -> Callable[[Tensor, Tensor], Tensor]:
        betas = self.betas[-len(layers) :]

        def loss(images: Tensor, labels: Tensor) -> Tensor:
            with torch.no_grad(), record_outputs(teacher, layers) as theirs:
                teacher(images)
            with record_outputs(student, layers) as ours:
                logits = student(images)
            total = F.cross_entropy(logits, labels, label_smoothing=sgd.label_smoothing)
            for layer, beta in zip(layers, betas, strict=True):
                total = total + beta * attention_loss(ours[layer], theirs[layer], power=self.power)
            return total

        return loss


PRESETS: dict[str, dict[str, Any]] = {
    "small": {},
    "paper": {
        "steps": 1200,
        "batch_size": 64,
        "lr": 0.1,
        "schedule": "drop",
        "augmentation": "crop-flip",
    },
}


def _check_layers(model: nn.Module, layers: Sequence[str], images: Tensor) -> None:
    """Refuse layers without spatial maps before any training."""
    with frozen(model), torch.no_grad(), record_outputs(model, layers) as found:
        model(images)
    for layer in layers:
        if layer not in found:
            raise ValueError(f"expected layers that run in the model, {layer!r} does not")
        attention_map(found[layer])
