"""FT-SAM: fine-tuning for flat minima, which moves the weights that carry a backdoor further."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from defense_nc.mitigations import Closure, Sgd, check_repair, fine_tune, sgd_preset, trainable
from defense_nc.protocols import Repaired
from wm_inject.core.plan import Trigger

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass(frozen=True, kw_only=True)
class FTSAM:
    """Fine-tune with sharpness-aware minimisation.

    Each step climbs to the worst weights within ``rho``, takes the gradient there, and steps from
    where it was: two passes a step, so it costs twice as much as plain fine-tuning.

    Args:
        sgd: How it is trained.
        rho: Length of the climb, at least 0; 0 is plain fine-tuning.
        adaptive: Measure the climb relative to the size of each weight.

    Source: Zhu et al. 2023; Kwon et al. 2021 for the adaptive form.
    """

    name: ClassVar[str] = "ft-sam"
    sgd: Sgd = Sgd(lr=0.03, label_smoothing=0.1)
    rho: float = 2.0
    adaptive: bool = True

    def __post_init__(self) -> None:
        _check_rho(self.rho)

    @classmethod
    def preset(cls, name: str = "fast", **changes: Any) -> FTSAM:
        """Settings by name, with changes.

        "paper" is the published setting for CIFAR-10: 100 passes over 2,500 images in batches of
        256, rho 2, smoothed labels. "paper-gtsrb" is the one for GTSRB: 50 passes over 1,960
        images, rho 8, no smoothing. "fast" takes 200 batches of 32 at 0.03, for small networks, and
        "batch-128" as many of 128 at 0.01, for accurate ones (both ours).
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
        """Fine-tune a copy for flatness; the log holds the loss of each tenth, before the climb.

        Raises:
            DivergedError: The loss became NaN or infinite.
        """
        check_repair(model, images, labels)
        tuned = copy.deepcopy(model)
        steps = self.sgd.steps
        losses = fine_tune(
            *(tuned, images, labels),
            sgd=self.sgd,
            seed=seed,
            update=sam_update(tuned, rho=self.rho, adaptive=self.adaptive),
            desc="ft-sam",
            progress=progress,
        )
        return Repaired(tuned, {"steps": steps, "passes": 2 * steps, "losses": losses})


PRESETS: dict[str, dict[str, Any]] = {
    "fast": {},
    "batch-128": {"batch_size": 128, "lr": 0.01},
    "paper": {"steps": 1000, "batch_size": 256, "lr": 0.01, "augmentation": "crop-flip"},
    "paper-gtsrb": {
        "steps": 400,
        "batch_size": 256,
        "lr": 0.01,
        "augmentation": "crop",
        "rho": 8.0,
        "label_smoothing": 0.0,
    },
}


def climb(
    weights: Sequence[Tensor], gradients: Sequence[Tensor], *, rho: float, adaptive: bool = True
) -> list[Tensor]:
    """How far SAM moves each of the parameters ``w`` before it takes the gradient ``g``.

    Adaptive: ``rho * w^2 g / |w g|``, whose length relative to ``|w|`` is rho; otherwise
    ``rho * g / |g|``, of length rho. Lengths are taken over all parameters together; without any
    slope all are zero.

    Raises:
        ValueError: Nothing to climb on, shapes that differ, or rho below 0.
    """
    if not weights or [w.shape for w in weights] != [g.shape for g in gradients]:
        raise ValueError(
            f"expected gradients of the weights' shapes, got {len(weights)} weights "
            f"and {len(gradients)} gradients"
        )
    _check_rho(rho)
    scales = [w.detach().abs() if adaptive else torch.ones_like(w) for w in weights]
    scaled = [scale * g for scale, g in zip(scales, gradients, strict=True)]
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(s) for s in scaled]))
    factor = torch.where(norm > 0, rho / norm, torch.zeros_like(norm))
    return [factor * scale * s for scale, s in zip(scales, scaled, strict=True)]


def sam_update(
    model: nn.Module, *, rho: float, adaptive: bool
) -> Callable[[torch.optim.Optimizer, Closure], Tensor]:
    """The update of sharpness-aware minimisation, for `fine_tune`.

    The second pass draws the same dropout as the first, and leaves the running statistics of batch
    normalisation alone.
    """
    parameters = trainable(model)
    device = parameters[0].device

    def update(optimizer: torch.optim.Optimizer, closure: Closure) -> Tensor:
        cpu_state = torch.get_rng_state()
        gpu_state = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        loss = closure()
        moved = [p for p in parameters if p.grad is not None]
        start = [p.detach().clone() for p in moved]
        gradients = [p.grad for p in moved if p.grad is not None]
        steps = climb(moved, gradients, rho=rho, adaptive=adaptive)
        with torch.no_grad():
            for p, step in zip(moved, steps, strict=True):
                p.add_(step)
        torch.set_rng_state(cpu_state)
        if gpu_state is not None:
            torch.cuda.set_rng_state(gpu_state, device)
        with _statistics_kept(model):
            closure()
        with torch.no_grad():
            for p, weight in zip(moved, start, strict=True):
                p.copy_(weight)
        optimizer.step()
        return loss

    return update


@contextmanager
def _statistics_kept(model: nn.Module) -> Iterator[None]:
    """Batch normalisation by the batch, as in train mode, without moving the running statistics."""
    norms = [
        module
        for module in model.modules()
        if isinstance(module, _BATCH_NORMS) and module.track_running_stats
    ]
    try:
        for norm in norms:
            norm.track_running_stats = False
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def _check_rho(rho: float) -> None:
    if not 0 <= rho < math.inf:
        raise ValueError(f"expected rho >= 0, got {rho}")
