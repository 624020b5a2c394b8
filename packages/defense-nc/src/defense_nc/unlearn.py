"""Unlearning: teach a copy of the classifier that the trigger means nothing."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wm_inject.core.images import check_images, check_labels, quantize
from wm_inject.core.plan import Trigger
from wm_inject.core.progress import progress as show_progress


@dataclass(frozen=True)
class UnlearnConfig:
    """Settings of unlearning. The defaults are the preset "nc".

    Args:
        epochs: Passes over the set.
        batch_size: Images per step.
        lr: Learning rate of SGD.
        momentum: Momentum of SGD.
        weight_decay: Weight decay of SGD.
        trigger_share: Share of the clean images that carry the trigger, in (0, 1]; drawn anew each
            epoch.
        append: Add the triggered images to the clean ones; in their place if False.
        round_to_pixels: Round triggered images to the 8-bit grid, as a stored attack would be.

    Raises:
        ValueError: A value outside its range.
    """

    epochs: int = 10
    batch_size: int = 32
    lr: float = 1e-2
    momentum: float = 0.9
    weight_decay: float = 0.0
    trigger_share: float = 0.2
    append: bool = False
    round_to_pixels: bool = True

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 2:
            raise ValueError(
                f"expected epochs >= 1 and batch_size >= 2, got {self.epochs}, {self.batch_size}"
            )
        if not self.lr > 0 or not 0 <= self.momentum < 1 or not self.weight_decay >= 0:
            raise ValueError(
                "expected lr > 0, momentum in [0, 1) and weight_decay >= 0, "
                f"got {self.lr}, {self.momentum}, {self.weight_decay}"
            )
        if not 0 < self.trigger_share <= 1:
            raise ValueError(f"expected trigger_share in (0, 1], got {self.trigger_share}")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> UnlearnConfig:
        """The settings of this name, nc, paper or reverse, with some of them changed.

        "nc" puts the trigger on a fifth of the images for ten epochs, since a defender's few
        hundred images make short ones. "paper" is Neural Cleanse's one epoch. "reverse" is section
        3.5 of the reverse-generator paper: the clean images and a triggered copy of each.

        Raises:
            ValueError: No such preset, or a value outside its range.
        """
        if name not in PRESETS:
            raise ValueError(f"expected a preset in {', '.join(PRESETS)}, got {name!r}")
        return cls(**{**PRESETS[name], **changes})


PRESETS: dict[str, dict[str, Any]] = {
    "nc": {},
    "paper": {"epochs": 1},
    "reverse": {"lr": 1e-3, "trigger_share": 1.0, "append": True},
}


def unlearn(
    model: nn.Module,
    trigger: Trigger,
    images: Tensor,
    labels: Tensor,
    *,
    config: UnlearnConfig | None = None,
    seed: int = 0,
    progress: bool = False,
) -> nn.Module:
    """Fine-tune a copy of the classifier on clean images, some of which carry the trigger.

    Every image keeps its true label, so the copy learns to answer as if the trigger were not there.

    Args:
        model: Images in [0, 1] to logits ``(N, K)``; not changed.
        trigger: What to unlearn: a reversed trigger of either defence, or any other.
        images: Clean float32 ``(N, C, H, W)`` in [0, 1], N >= 2.
        labels: int64 ``(N,)``, the true classes.
        config: Settings; the preset "nc" if None.
        seed: Seeds the order, the choice of triggered images, and dropout.
        progress: Show how far it is.

    Returns:
        The new model, in eval mode, on the same device. Parameters that were frozen stay as they
        are; batch normalisation adapts to the images.

    Raises:
        ValueError: Bad images or labels, fewer than two images, a trigger that breaks the image
            contract, or a model without trainable parameters.

    Source: Neural Cleanse, section VI; reverse-generator paper, section 3.5. The papers leave
        learning rate (the first) and batch size (both) open.
    """
    config = UnlearnConfig() if config is None else config
    if not isinstance(model, nn.Module):
        raise ValueError(f"expected a torch module as the model, got {type(model).__name__}")
    check_images(images)
    check_labels(labels, len(images))
    if len(images) < 2:
        raise ValueError(f"expected at least 2 images to train on, got {len(images)}")
    cleaned = copy.deepcopy(model)
    parameters = [p for p in cleaned.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("expected a model with trainable parameters, found none")
    device = parameters[0].device
    images, labels = images.to(device), labels.to(device)
    num_classes = _count_classes(cleaned, images[:1])
    check_labels(labels, len(images), num_classes=num_classes)
    stamped = triggered_copies(trigger, images, rounded=config.round_to_pixels)
    images, labels = torch.cat([images, stamped]), labels.repeat(2)
    optimizer = torch.optim.SGD(
        parameters, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
    )
    generator = torch.Generator().manual_seed(seed)
    # Dropout draws from the global generators: seeded here, and given back as they were.
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        cleaned.train()
        for _ in show_progress(range(config.epochs), desc="unlearning", enabled=progress):
            rows = pass_batches(
                len(stamped),
                batch_size=config.batch_size,
                trigger_share=config.trigger_share,
                append=config.append,
                generator=generator,
            )
            for batch in rows:
                optimizer.zero_grad()
                F.cross_entropy(cleaned(images[batch]), labels[batch]).backward()
                optimizer.step()
    return cleaned.eval()


def pass_batches(
    count: int,
    *,
    batch_size: int,
    trigger_share: float,
    append: bool,
    generator: torch.Generator,
    kinds: int = 1,
) -> Iterator[Tensor]:
    """The batches of one pass over images and triggered copies of them, as row numbers.

    Rows 0 .. count - 1 are the clean images; one block of ``count`` rows follows for each kind of
    trigger. In a batch the clean rows come first. `UnlearnConfig` says what the settings mean.

    Args:
        count: Clean images, at least 2.
        batch_size: Rows per batch, at least 2.
        trigger_share: Share of the images that carry a trigger, in (0, 1]; at least one does.
        append: Add the triggered images to the clean ones; in their place if False.
        generator: Draws which images carry a trigger, which trigger that is, and the order.
        kinds: Triggers to choose from, at least 1; each triggered image carries one of them.
    """
    chosen = torch.randperm(count, generator=generator)[: max(1, round(trigger_share * count))]
    clean = torch.arange(count)
    if not append:
        clean = clean[~torch.isin(clean, chosen)]
    block = torch.ones_like(chosen)
    if kinds > 1:
        block += torch.randint(kinds, chosen.shape, generator=generator)
    rows = torch.cat([clean, block * count + chosen])
    parts = list(rows[torch.randperm(len(rows), generator=generator)].split(batch_size))
    if len(parts) > 1 and len(parts[-1]) == 1:
        # Batch normalisation cannot train on a single image.
        parts[-2:] = [torch.cat(parts[-2:])]
    for part in parts:
        yield torch.cat([part[part < count], part[part >= count]])


def triggered_copies(trigger: Trigger, images: Tensor, *, rounded: bool) -> Tensor:
    """A triggered copy of every image; the caller's trigger stays as and where it is.

    Args:
        trigger: Any trigger.
        images: Clean float32 ``(N, C, H, W)`` in [0, 1].
        rounded: Round the copies to the 8-bit grid.

    Raises:
        ValueError: A trigger that breaks the image contract.
    """
    if isinstance(trigger, nn.Module):
        trigger = copy.deepcopy(trigger).to(images.device).eval()
    with torch.no_grad():
        ids = torch.arange(len(images), device=images.device)
        stamped = torch.cat([trigger(images[i], ids=i) for i in ids.split(256)])
    check_images(stamped, name="triggered images")
    if stamped.shape != images.shape:
        raise ValueError(
            f"expected triggered images of shape {tuple(images.shape)}, got {tuple(stamped.shape)}"
        )
    return quantize(stamped) if rounded else stamped


def _count_classes(model: nn.Module, image: Tensor) -> int:
    with torch.no_grad():
        logits = model.eval()(image)
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(f"expected logits of shape (N, K), K >= 2, got {tuple(logits.shape)}")
    return int(logits.shape[1])
