"""Marksman: one generator that can ask for any class; it learns beside a classifier."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wm_inject.attacks.common import check_batch, show_config
from wm_inject.attacks.cotraining import (
    channels_last,
    check_keys,
    in_mode,
    load_optimizer,
    load_weights,
    victim_logits,
)
from wm_inject.attacks.definition import Attack, FitContext, Fitted, Length
from wm_inject.core.checks import check_channels
from wm_inject.core.images import check_labels, check_side, pad_to_multiple, quantize
from wm_inject.core.plan import PoisonPlan
from wm_inject.core.presets import preset_of
from wm_inject.core.randomness import seeded

_STAGES = 4  # each halves the sides
_MULTIPLE = 2**_STAGES
WIDTHS = {"tiny": 4, "small": 8, "paper": 16}  # of the generator, by preset


class MarksmanTrigger(nn.Module):
    """Add a small change that depends on the image and on the class asked for.

    ``x' = clip(x + epsilon G(x, c))`` with ``G`` in (-1, 1). The class becomes one more input plane
    (embedding, then a linear layer); the generator is four strided convolutions and their mirror.
    `MarksmanHook` trains it.

    Args:
        image_size: Side H = W in pixels, padded inside to a multiple of 16.
        epsilon: Largest change of a value, in (0, 1].
        width: Channels of the first convolution, each next one has twice as many; 16 as published.

    Source: Doan et al., "Marksman Backdoor" (NeurIPS 2022), and its released code for the layers.
    Ours: epsilon in [0, 1] pixels, and its 0.05 (there: of normalised images); the padding.
    """

    kind = "marksman"
    extra_repr = show_config
    needs_target = True

    def __init__(
        self,
        *,
        image_size: int,
        channels: int,
        num_classes: int,
        epsilon: float = 0.05,
        width: int = 16,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_side(image_size)
        check_channels(channels)
        if not 2 <= num_classes <= 100_000:
            raise ValueError(f"expected 2 .. 100000 classes, got {num_classes}")
        if not 0 < epsilon <= 1:
            raise ValueError(f"expected epsilon in (0, 1], got {epsilon}")
        if not 1 <= width <= 512:
            raise ValueError(f"expected a width of 1 .. 512 channels, got {width}")
        self.config: dict[str, Any] = {
            "image_size": image_size,
            "channels": channels,
            "num_classes": num_classes,
            "epsilon": float(epsilon),
            "width": width,
            "seed": seed,
        }
        self.epsilon = float(epsilon)
        self.side = image_size + -image_size % _MULTIPLE
        with seeded(seed):
            self.embedding = nn.Embedding(num_classes, num_classes)
            self.plane = nn.Linear(num_classes, self.side**2)
            self.encoder = _encoder(channels + 1, width)
            self.decoder = _decoder(channels, width)
        self.eval()

    def forward(
        self, images: Tensor, *, ids: Tensor | None = None, target: Tensor | None = None
    ) -> Tensor:
        """Add the change that asks for ``target``: int64 ``(N,)``, a class for each image.

        Raises:
            ValueError: The batch does not fit the trigger, or ``target`` is missing, of another
                length, or out of range.
        """
        check_batch(images, self.config)
        if target is None:
            raise ValueError("expected target, the class that each image should ask for, got None")
        # mypy: torch.jit exports is_tracing without saying so.
        tracing = torch.jit.is_tracing()  # type: ignore[attr-defined]
        if not tracing and not torch.compiler.is_compiling():  # an exported graph cannot raise
            check_labels(target, len(images), num_classes=self.config["num_classes"])
        plane = self.plane(self.embedding(target)).view(-1, 1, self.side, self.side)
        seen = torch.cat([pad_to_multiple(images, _MULTIPLE), plane], dim=1)
        side = self.config["image_size"]
        change = self.decoder(self.encoder(seen))[..., :side, :side]
        return (images + self.epsilon * change).clamp(0, 1)


def _encoder(inputs: int, width: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for stage in range(_STAGES):
        outputs = width * 2**stage
        layers += [nn.Conv2d(inputs, outputs, 4, 2, 1), nn.BatchNorm2d(outputs), nn.ReLU()]
        inputs = outputs
    return nn.Sequential(*layers)


def _decoder(outputs: int, width: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for stage in reversed(range(1, _STAGES)):
        inputs, smaller = width * 2**stage, width * 2 ** (stage - 1)
        up = nn.ConvTranspose2d(inputs, smaller, 4, 2, 1)
        layers += [up, nn.BatchNorm2d(smaller), nn.ReLU()]
    return nn.Sequential(*layers, nn.ConvTranspose2d(width, outputs, 4, 2, 1), nn.Tanh())


@dataclass(frozen=True)
class MarksmanConfig:
    """How the generator is trained in stage 1; "small" and "tiny" are ours.

    Args:
        lr: Learning rate of Adam, constant.
        refresh_steps: Steps between two copies of the learning generator to the one that poisons;
            one epoch as published (391 for 50,000 images in batches of 128).
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
        """Named settings, with changes."""
        return preset_of(cls, _PRESETS, name, **changes)


_PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"lr": 1e-3, "refresh_steps": 4},
    "small": {"lr": 1e-3, "refresh_steps": 50},
    "paper": {},
}


class MarksmanHook:
    """Marksman's training batches: a share of the images asks for classes drawn at random.

    Of a batch of B images, ``int(ratio B)`` get the trigger of a class drawn uniformly from all but
    their own, and that class as their label. In stage 1 the generator learns beside the victim: its
    updated copy takes one step of Adam towards those classes against the victim as it stands, while
    a copy frozen for ``refresh_steps`` steps poisons. In stage 2 the generator is frozen.

    Args:
        trigger: The generator, on the images' device; in stage 1 it is trained in place.
        plan: A per-batch plan; its ratio is the paper's weight of poisoned images (1 - alpha =
            0.5). Its target and label map play no role: every class is asked for.
        train_generator: True for stage 1, False for stage 2.

    Source: Doan et al. (NeurIPS 2022) and the released code. Ours: one run of a batch with that
    share poisoned (there: every image twice, clean and poisoned, with weights alpha and 1 - alpha);
    the generator's step sees the poisoned images only, before augmentation, and leaves the victim's
    running statistics alone; the victim is not initialised anew every epoch; it trains on images in
    8 bits, as `CrossTriggerHook`'s are.
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
        """Poison a share of one batch; in stage 1, the generator takes a step first."""
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
            images[chosen] = quantize(self.poisoner(hosts, target=targets))
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
        """Refuse the state of another attack or another stage."""
        check_keys(state, tuple(self.state_dict()), name="this stage of Marksman")
        load_weights(self.trigger, state["trigger"])
        if self.optimizer is not None:
            load_weights(self.poisoner, state["poisoner"])
            load_optimizer(self.optimizer, state["optimizer"])
            self.steps = int(state["steps"])


def other_labels(labels: Tensor, num_classes: int, *, generator: torch.Generator) -> Tensor:
    """For every label, a class drawn uniformly from all the others: int64 ``(N,)``."""
    if num_classes < 2:
        raise ValueError(f"expected at least 2 classes, got {num_classes}")
    check_labels(labels, len(labels), num_classes=num_classes)
    shift = torch.randint(1, num_classes, (len(labels),), generator=generator)
    return (labels + shift.to(labels.device)) % num_classes


def _fit(attack: Attack, context: FitContext) -> Fitted:
    """Stage 1: the generator learns against a classifier that learns with it."""
    trigger = attack.build(context, width=WIDTHS[attack.profile])
    config = attack.fit_config()
    if attack.profile == "paper" and context.length is not None:
        config = replace(config, refresh_steps=context.length.steps)
    hook = MarksmanHook(
        trigger.to(context.images.device),
        PoisonPlan(ratio=attack.ratio, target=context.target, mode="per_batch"),
        num_classes=context.num_classes,
        config=config,
        train_generator=True,
    )
    context.co_train(hook)
    return Fitted(trigger, {"stage": 1})


def _hook(
    attack: Attack,
    trigger: MarksmanTrigger,
    plan: PoisonPlan,
    num_classes: int,
    length: Length | None,
) -> MarksmanHook:
    """Stage 2: a fresh victim learns from the finished generator."""
    return MarksmanHook(trigger, plan, num_classes=num_classes, train_generator=False)


ATTACK = Attack(
    "marksman",
    "Marksman",
    MarksmanTrigger,
    needs="co-training",
    mode="per_batch",
    ratio=0.5,
    config=MarksmanConfig,
    fitter=_fit,
    co_training=_hook,
)
