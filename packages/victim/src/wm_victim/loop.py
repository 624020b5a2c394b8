"""The steps of a training run: batches, augmentation, SGD; all randomness from seed and epoch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wm_inject.core.plan import CoTraining
from wm_inject.core.resume import like_parameters
from wm_victim.augment import augment
from wm_victim.datasets import ImageSet
from wm_victim.forward import training_forward
from wm_victim.recipe import TrainConfig, learning_rate, resolve_precision
from wm_victim.store import Store

_CHECK_EVERY = 50  # steps between two looks at the loss; each look waits for the device


class Corrupt(Protocol):
    """What happens to a training batch last: images ``(N, C, H, W)`` to the same shape."""

    def __call__(self, images: Tensor, *, generator: torch.Generator) -> Tensor:
        """Change the batch; ``generator`` is a CPU generator."""


class Epoch(NamedTuple):
    """What one pass over the data came to."""

    loss: float
    accuracy: float


class Run:
    """One training run: everything that changes from step to step.

    ``limit``: the most bytes of images to keep on the device; see `Store`.
    """

    def __init__(
        self,
        model: nn.Module,
        data: ImageSet,
        config: TrainConfig,
        hook: CoTraining | None,
        device: torch.device,
        corrupt: Corrupt | None = None,
        limit: int | None = None,
    ) -> None:
        smaller = min(data.images.shape[2:])
        if config.cutout > smaller:
            raise ValueError(f"expected a cutout of at most {smaller} pixels, got {config.cutout}")
        self.model, self.config = model, config
        self.hook, self.device, self.corrupt = hook, device, corrupt
        self.precision = resolve_precision(config.precision, device)
        # First, because it may lay out the weights anew: momenta follow them.
        self.forward = training_forward(model, config, device)
        self.data = Store(data, device, limit=limit)
        self.steps = len(self._batches(torch.Generator()))
        self.optimizer = torch.optim.SGD(
            model.parameters(),
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            nesterov=config.nesterov,
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything that a checkpoint must hold."""
        hook = {} if self.hook is None else self.hook.state_dict()
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "hook": hook,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        like_parameters(self.optimizer)
        if self.hook is not None:
            self.hook.load_state_dict(state["hook"])

    def epoch(self, number: int, advance: Callable[[int], None]) -> Epoch:
        """One pass over the data. Its randomness depends on the seed and its number only.

        So a checkpoint between two epochs needs no state of any generator.
        """
        self.model.train()
        seed = _epoch_seed(self.config.seed, number)
        generator = torch.Generator().manual_seed(seed)
        devices = [self.device] if self.device.type == "cuda" else []
        loss_sum = torch.zeros((), device=self.device)
        right = torch.zeros((), device=self.device, dtype=torch.int64)
        seen = 0
        # Dropout draws from the global state: it is seeded here, and put back afterwards.
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            for place, index in enumerate(self._batches(generator)):
                step = number * self.steps + place
                lr = learning_rate(self.config, step, self.config.epochs * self.steps)
                loss, correct = self._step(index, lr, generator)
                loss_sum += loss * len(index)
                right += correct
                seen += len(index)
                if place % _CHECK_EVERY == 0 or place == self.steps - 1:
                    self._check_loss(loss_sum, number)
                advance(len(index))
        return Epoch(float(loss_sum) / seen, int(right) / seen)

    def _step(self, index: Tensor, lr: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        images, labels = self.data.take(index)
        if self.hook is not None:
            images, labels = self.hook.transform(
                images, labels, model=self.model, generator=generator
            )
        images = augment(
            images, mode=self.config.augment, generator=generator, cutout=self.config.cutout
        )
        if self.corrupt is not None:
            images = self.corrupt(images, generator=generator)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        logits = self.forward(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.config.label_smoothing)
        loss.backward()
        self.optimizer.step()
        return loss.detach(), (logits.detach().argmax(1) == labels).sum()

    def _batches(self, generator: torch.Generator) -> list[Tensor]:
        order = torch.randperm(len(self.data), generator=generator)
        batches = list(order.split(self.config.batch_size))
        # Batch normalisation has no variance of a single image: such a remainder is left out.
        return batches[:-1] if len(batches) > 1 and len(batches[-1]) == 1 else batches

    def _check_loss(self, loss_sum: Tensor, epoch: int) -> None:
        if not bool(loss_sum.isfinite()):
            raise RuntimeError(
                f"the loss became {float(loss_sum)} in epoch {epoch + 1}: "
                f"try a lower learning rate than {self.config.lr}"
            )


def _epoch_seed(seed: int, epoch: int) -> int:
    """A seed of its own for every epoch, far from the small ones that a poisoning plan takes.

    The same seed in both would put all poisoned images into the first batches.
    """
    digest = hashlib.sha256(f"train {seed} {epoch}".encode()).digest()
    return int.from_bytes(digest[:6], "big")
