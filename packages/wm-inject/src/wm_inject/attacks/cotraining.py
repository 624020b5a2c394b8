"""What co-trained attacks share: cross triggers, and generators that learn beside a victim."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from wm_inject.attacks.common import check_batch
from wm_inject.core.images import check_labels, quantize
from wm_inject.core.plan import PoisonPlan
from wm_inject.core.resume import like_parameters


@contextmanager
def in_mode(module: nn.Module, *, training: bool) -> Iterator[None]:
    """Put a module in training or evaluation mode, and every part of it back afterwards."""
    before = [(part, part.training) for part in module.modules()]
    try:
        module.train(training)
        yield
    finally:
        for part, mode in before:
            part.training = mode


def victim_logits(model: nn.Module, images: Tensor) -> Tensor:
    """Float32 logits of a classifier in training, with a gradient to the images only.

    It runs in the mode that it is in, on copies of its buffers: its weights, their gradients and
    its running statistics stay as they are.
    """
    state = {name: weight.detach() for name, weight in model.named_parameters()}
    state |= {name: buffer.clone() for name, buffer in model.named_buffers()}
    with torch.autocast(images.device.type, enabled=False):
        logits: Tensor = functional_call(model, state, (images,))
    return logits.float()


def channels_last(images: Tensor) -> Tensor:
    """A copy without history in channels-last memory, where convolutions run faster on a CPU."""
    return images.detach().clone(memory_format=torch.channels_last)


def load_weights(module: nn.Module, state: Any) -> None:
    """Take back a module's weights.

    Raises:
        ValueError: They are those of another module.
    """
    try:
        module.load_state_dict(state)
    except (RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())  # torch writes a line for each tensor
        raise ValueError(f"these weights do not fit the trigger: {reason}") from error


def load_optimizer(optimizer: torch.optim.Optimizer, state: Any) -> None:
    """Take back an optimiser's state so that it goes on to the same bits."""
    optimizer.load_state_dict(state)
    like_parameters(optimizer)


def check_keys(state: Mapping[str, Any], wanted: tuple[str, ...], *, name: str) -> None:
    """Check that a hook's state holds what it should.

    Raises:
        ValueError: Other keys.
    """
    if not isinstance(state, Mapping) or set(state) != set(wanted):
        got = ", ".join(sorted(state)) if isinstance(state, Mapping) else type(state).__name__
        raise ValueError(f"expected the state of {name} ({', '.join(wanted)}), got {got or '{}'}")


class CrossTrigger(Protocol):
    """A fixed trigger that can also put a wrong one into images."""

    config: dict[str, Any]

    def __call__(self, images: Tensor) -> Tensor:
        """Put the trigger into ``images``."""

    def cross(self, images: Tensor, rows: Tensor, generator: torch.Generator) -> Tensor:
        """The images of a batch at ``rows``, each with a wrong trigger."""


@dataclass(frozen=True)
class CrossTriggerHook:
    """Batches of a few attack images, some with a wrong trigger, the rest clean.

    Of a batch of B images, ``int(ratio B)`` get the trigger and its label, and
    ``int(cross_ratio times that)`` get `CrossTrigger.cross` and keep their label, which teaches the
    classifier this trigger and no other.

    Raises:
        ValueError: A static plan, or a cross ratio that is negative or asks for more images than
            there are.

    Source: the released codes of WaNet and BppAttack. Ours: what was changed is rounded to 8 bits.
        Without that a victim can learn that values lie between the 256, which no file keeps.
    """

    trigger: CrossTrigger
    plan: PoisonPlan
    num_classes: int
    cross_ratio: float

    def __post_init__(self) -> None:
        if self.plan.mode != "per_batch":
            raise ValueError(f"expected a per-batch plan, got mode {self.plan.mode!r}")
        if self.cross_ratio < 0 or (self.plan.ratio or 1) * (1 + self.cross_ratio) > 1:
            raise ValueError(
                f"expected ratio * (1 + cross_ratio) in (0, 1], got a ratio of {self.plan.ratio} "
                f"and a cross_ratio of {self.cross_ratio}"
            )

    def transform(
        self, images: Tensor, labels: Tensor, *, model: nn.Module, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """The batch to train on."""
        check_batch(images, self.trigger.config)
        check_labels(labels, len(images), num_classes=self.num_classes)
        attacked = self.plan.choose(labels, generator=generator)
        rest = (~attacked).nonzero().flatten().cpu()
        count = int(self.cross_ratio * int(attacked.sum()))
        crossed = rest[torch.randperm(len(rest), generator=generator)[:count]].to(images.device)
        mixed, new_labels = images.clone(), self.plan.relabel(labels, self.num_classes)
        if attacked.any():
            mixed[attacked] = quantize(self.trigger(images[attacked]))
        if count:
            mixed[crossed] = quantize(self.trigger.cross(images, crossed, generator))
        return mixed, torch.where(attacked, new_labels, labels)

    def state_dict(self) -> dict[str, Any]:
        """Empty: the trigger is fixed, and every draw comes from the trainer's generator."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Refuse the state of another attack."""
        if state:
            raise ValueError(f"expected an empty state, got {', '.join(sorted(state))}")
