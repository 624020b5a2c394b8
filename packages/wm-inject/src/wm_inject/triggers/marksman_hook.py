"""Training with Marksman: the generator learns beside a victim, then poisons for a fresh one."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wm_inject.core.images import check_labels
from wm_inject.core.plan import PoisonPlan
from wm_inject.triggers.common import check_batch
from wm_inject.triggers.cotrain import (
    channels_last,
    check_keys,
    in_mode,
    load_optimizer,
    load_weights,
    victim_logits,
)
from wm_inject.triggers.marksman import MarksmanTrigger


@dataclass(frozen=True)
class MarksmanConfig:
    """How the generator is trained in stage 1.

    Args:
        lr: Learning rate of Adam, constant.
        refresh_steps: Steps between two copies of the learning generator to the one that poisons.
            As published it is the number of steps of one epoch, which only the caller knows: 391
            are those of 50,000 images in batches of 128.

    Raises:
        ValueError: A value out of range.
    """

    lr: float = 1e-4
    refresh_steps: int = 391

    def __post_init__(self) -> None:
        if not 0 < self.lr < float("inf"):
            raise ValueError(f"expected a positive learning rate, got {self.lr}")
        if self.refresh_steps < 1:
            raise ValueError(f"expected at least 1 step between copies, got {self.refresh_steps}")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> MarksmanConfig:
        """A named recipe, with changes.

        Args:
            name: "paper" (the released code's), "small" (a faster generator for a few hundred steps
                on a CPU; ours) or "tiny" (for tests; ours).
            changes: Fields to set otherwise.

        Raises:
            ValueError: No such preset, or a field out of range.
        """
        if name not in _PRESETS:
            raise ValueError(f"expected a preset in {', '.join(_PRESETS)}, got {name!r}")
        return replace(_PRESETS[name], **changes)


_PRESETS = {
    "tiny": MarksmanConfig(lr=1e-3, refresh_steps=4),
    "small": MarksmanConfig(lr=1e-3, refresh_steps=50),
    "paper": MarksmanConfig(),
}


class MarksmanHook:
    """Marksman's training batches: a share of the images asks for classes drawn at random.

    Of a batch of B images, ``int(ratio B)`` get the trigger of a class drawn uniformly from all but
    their own, and that class as their label. In stage 1 the generator learns beside the victim: its
    updated copy takes one step of Adam towards those classes against the victim as it stands, while
    a copy frozen for ``refresh_steps`` steps poisons. In stage 2 the generator is frozen.

    Args:
        trigger: The generator. In stage 1 it is trained in place, it is the updated copy; it lies
            on the device of the images.
        plan: A per-batch plan; its ratio is the weight that the paper gives to poisoned images (1 -
            alpha = 0.5). Its target and label map play no role: every class is asked for.
        num_classes: K, the trigger's own.
        config: How it learns; the preset "paper" if None.
        train_generator: True for stage 1, False for stage 2.

    Raises:
        ValueError: A static plan, or another number of classes than the trigger's.

    Source: Doan et al. (NeurIPS 2022) and the released code. There, every image runs twice, clean
    and poisoned, with weights alpha and 1 - alpha; one run of a batch with that share poisoned is
    ours and costs half. So is that the generator's step sees the poisoned images only, before
    augmentation (there: all images, augmented), that it leaves no trace in the victim's running
    statistics (there it does), and that the victim is not initialised anew every epoch.
    """

    def __init__(
        self,
        trigger: MarksmanTrigger,
        plan: PoisonPlan,
        *,
        num_classes: int,
        config: MarksmanConfig | None = None,
        train_generator: bool,
    ) -> None:
        if plan.mode != "per_batch":
            raise ValueError(f"expected a per-batch plan, got mode {plan.mode!r}")
        if trigger.config["num_classes"] != num_classes:
            raise ValueError(
                f"expected a trigger for {num_classes} classes, "
                f"got one for {trigger.config['num_classes']}"
            )
        self.trigger, self.plan, self.num_classes = trigger.eval(), plan, num_classes
        self.config = config or MarksmanConfig()
        self.steps = 0
        self.poisoner, self.optimizer = trigger, None
        if train_generator:
            self.poisoner = copy.deepcopy(trigger).requires_grad_(False)
            trigger.requires_grad_(True)
            self.optimizer = torch.optim.Adam(trigger.parameters(), lr=self.config.lr)

    def __repr__(self) -> str:
        stage = 2 if self.optimizer is None else 1
        return f"MarksmanHook(stage {stage}, {self.plan}, {self.config})"

    def transform(
        self, images: Tensor, labels: Tensor, *, model: nn.Module, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Poison a share of one batch; in stage 1, let the generator take a step first.

        Args:
            images: float32 ``(N, C, H, W)`` in [0, 1]; not changed.
            labels: int64 ``(N,)``; not changed.
            model: The classifier in training; nothing of it changes.
            generator: Source of every draw, on the CPU.

        Returns:
            Images and labels to train on, in the order of the batch, without a gradient. As
            published, the images are not rounded to 8 bits.

        Raises:
            ValueError: Images or labels that do not fit the trigger.
        """
        check_batch(images, self.trigger.config)
        check_labels(labels, len(images), num_classes=self.num_classes)
        chosen = self.plan.choose(labels, generator=generator)
        asked = other_labels(labels, self.num_classes, generator=generator)
        images = channels_last(images)
        labels = torch.where(chosen, asked, labels)
        hosts, targets = images[chosen], labels[chosen]
        if len(hosts) == 0:
            return images, labels
        with torch.no_grad():
            images[chosen] = self.poisoner(hosts, target=targets)
        # The generator's batch normalisation has no variance of a single image.
        if self.optimizer is not None and len(hosts) > 1:
            self._learn(self.optimizer, hosts, targets, model)
        return images, labels

    def _learn(
        self, optimizer: torch.optim.Adam, hosts: Tensor, targets: Tensor, model: nn.Module
    ) -> None:
        """One step of the updated copy; every ``refresh_steps`` the frozen one follows it."""
        optimizer.zero_grad(set_to_none=True)
        with (
            torch.enable_grad(),
            torch.autocast(hosts.device.type, enabled=False),
            in_mode(self.trigger, training=True),
        ):
            logits = victim_logits(model, self.trigger(hosts, target=targets))
            F.cross_entropy(logits, targets).backward()
        optimizer.step()
        self.steps += 1
        if self.steps % self.config.refresh_steps == 0:
            self.poisoner.load_state_dict(self.trigger.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """The generator; in stage 1 its frozen copy, optimiser and count of steps as well."""
        state: dict[str, Any] = {"trigger": self.trigger.state_dict()}
        if self.optimizer is not None:
            state["poisoner"] = self.poisoner.state_dict()
            state["optimizer"] = self.optimizer.state_dict()
            state["steps"] = self.steps
        return state

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Take back what `state_dict` gave; training then goes on to the same bits.

        Raises:
            ValueError: The state is another attack's or another stage's.
        """
        check_keys(state, tuple(self.state_dict()), name="this stage of Marksman")
        load_weights(self.trigger, state["trigger"])
        if self.optimizer is not None:
            load_weights(self.poisoner, state["poisoner"])
            load_optimizer(self.optimizer, state["optimizer"])
            self.steps = int(state["steps"])


def other_labels(labels: Tensor, num_classes: int, *, generator: torch.Generator) -> Tensor:
    """For every label, a class drawn uniformly from all the others.

    Args:
        labels: int64 ``(N,)`` in ``0 .. K - 1``.
        num_classes: K, at least 2.
        generator: Source of the draw, on the CPU.

    Returns:
        int64 ``(N,)`` on the labels' device, nowhere equal to ``labels``.

    Raises:
        ValueError: Labels out of range, or fewer than two classes.
    """
    if num_classes < 2:
        raise ValueError(f"expected at least 2 classes, got {num_classes}")
    check_labels(labels, len(labels), num_classes=num_classes)
    shift = torch.randint(1, num_classes, (len(labels),), generator=generator)
    return (labels + shift.to(labels.device)) % num_classes


__all__ = ["MarksmanConfig", "MarksmanHook", "other_labels"]
