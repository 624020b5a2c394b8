"""Train encoder and decoder: on clean images, without labels and without a victim."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wm_inject.attacks.ssba.networks import SsbaDecoder, SsbaTrigger
from wm_inject.core.images import check_images, quantize
from wm_inject.core.presets import preset_of
from wm_inject.core.progress import Progress
from wm_inject.core.progress import progress as show_progress
from wm_inject.core.randomness import seeded
from wm_inject.core.resume import fingerprint, like_parameters, load_state, save_state
from wm_inject.stealth import psnr

CHECKPOINT_EVERY = 250
HISTORY_EVERY = 50
_CHUNK = 256
_BENCHMARK_STEPS = 15_640  # 20 epochs of CIFAR-10 in batches of 64


@dataclass(frozen=True)
class SsbaConfig:
    """How encoder and decoder are trained.

    Args:
        recipe: The preset this came from; it goes into every record.
        width: Channels of the first convolution of encoder and decoder.
        output: What the encoder gives, see `wm_inject.attacks.ssba.SsbaEncoder`.
        weights: Where weights start: "default" (torch's own, as in the benchmark) or "he" (He's
            normal rule and zero biases, as in StegaStamp; the bits are learned much sooner).
        secret_seed: Seeds the trigger's fixed secret; the seed of the fit if None.
        steps: Optimiser steps; None counts ``epochs``.
        epochs: Passes over the images, each in a new order, where ``steps`` is None.
        image_weight: Weight of the image's mean squared error at the end of its ramp; that of the
            bits' cross entropy is 1.
        learned: Bit accuracy on a batch in (0.5, 1) that, once passed, starts the hold.
        hold: Share of all steps after it that look at the bits alone.
        ramp: Share of all steps over which the image's weight then rises.

    Source: "paper" is BackdoorBench's training of its SSBA encoder; its hold of 1000 and ramp of
    3000 steps are shares of its 15 640 steps here, so that shorter runs have both. "small" and
    "tiny" are ours.
    """

    recipe: Literal["tiny", "small", "paper"] = "paper"
    bits: int = 100
    width: int = 32
    output: Literal["residual", "image"] = "image"
    weights: Literal["default", "he"] = "default"
    secret_seed: int | None = None
    steps: int | None = None
    epochs: int = 20
    batch_size: int = 64
    lr: float = 1e-4
    image_weight: float = 10.0
    learned: float = 0.9
    hold: float = 1000 / _BENCHMARK_STEPS
    ramp: float = 3000 / _BENCHMARK_STEPS

    def __post_init__(self) -> None:
        for name in ("steps", "epochs", "batch_size"):
            value = getattr(self, name)
            counted = name == "steps" and value is None
            if not counted and not (isinstance(value, int) and value >= 1):
                raise ValueError(f"expected {name} >= 1, got {value!r}")
        if self.weights not in ("default", "he"):
            raise ValueError(f"expected weights 'default' or 'he', got {self.weights!r}")
        endless = float("inf")
        limits = {"lr": (0, endless), "image_weight": (0, endless), "learned": (0.5, 1)}
        for name, (low, high) in {**limits, "ramp": (0, 1)}.items():
            if not low < getattr(self, name) < high:
                raise ValueError(f"expected {name} in ({low}, {high}), got {getattr(self, name)}")
        if not 0 <= self.hold < 1:
            raise ValueError(f"expected hold in [0, 1), got {self.hold}")

    @classmethod
    def preset(cls, recipe: str = "small", **changes: Any) -> SsbaConfig:
        """Named settings, with changes.

        "paper" is BackdoorBench's, "small" takes minutes on one CPU core at 32 pixels, "tiny" is
        for tests.
        """
        return preset_of(cls, _PRESETS, recipe, **{"recipe": recipe, **changes})

    def total_steps(self, count: int) -> int:
        """Optimiser steps on ``count`` images."""
        return self.steps or self.epochs * -(-count // self.batch_size)


_PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "bits": 8,
        "width": 8,
        "output": "residual",
        "weights": "he",
        "batch_size": 32,
        "steps": 400,
        "lr": 2e-3,
    },
    "small": {
        "bits": 32,
        "width": 16,
        "weights": "he",
        "batch_size": 32,
        "steps": 3000,
        "lr": 1e-3,
    },
    "paper": {},
}


class SsbaStep(NamedTuple):
    """Losses and accuracy of one step, on its batch."""

    step: int
    bits: float  # cross entropy per bit, in nats
    image: float  # mean squared error of the image
    accuracy: float  # share of bits read back right
    image_weight: float  # 0 as long as the bits are not learned


class SsbaFit(NamedTuple):
    """A trained trigger and its decoder, both in eval mode, and the history of their training."""

    trigger: SsbaTrigger
    decoder: SsbaDecoder
    history: tuple[SsbaStep, ...]


class SsbaQuality(NamedTuple):
    """How well the bits survive in stored 8-bit images, and how alike the changes are."""

    fixed_accuracy: float  # share of the trigger's own bits read back right
    random_accuracy: float  # the same with a random secret for each image
    psnr: float  # dB, mean over images
    correlation: float  # mean Pearson correlation of two images' changes
    swapped_accuracy: float  # bits read right when each image gets its neighbour's change


def fit_ssba(
    images: Tensor,
    *,
    config: SsbaConfig,
    seed: int = 0,
    checkpoint: Path | None = None,
    progress: bool = True,
) -> SsbaFit:
    """Train an encoder to hide random secrets and a decoder to read them.

    Args:
        images: Square, on the device to train on.

    Raises:
        ValueError: Images that are not square, or the checkpoint of another run.
        RuntimeError: The loss is no longer finite.

    Source: see `SsbaConfig`. StegaStamp also has distortions between the two networks, LPIPS, a
    critic and colour weights; BackdoorBench has none of them.
    """
    check_images(images)
    if images.shape[2] != images.shape[3]:
        raise ValueError(f"expected square images, got {tuple(images.shape[2:])}")
    run = _Run(images, config, seed)
    identity = _identity(config, images, seed)
    if checkpoint is not None:
        run.load(load_state(checkpoint, kind="ssba-training", run=identity))
    steps = config.total_steps(len(images))
    bar: Progress[None]
    with show_progress(total=steps, desc="train ssba", enabled=progress) as bar:
        bar.update(run.step)
        while run.step < steps:
            now = run.advance(steps)
            last = run.step == steps
            if run.step % HISTORY_EVERY == 0 or last:
                run.history.append(now)
                bar.set_postfix(accuracy=now.accuracy, image=now.image)
            if checkpoint is not None and (run.step % CHECKPOINT_EVERY == 0 or last):
                save_state(checkpoint, run.state(), kind="ssba-training", run=identity)
            bar.update()
    return SsbaFit(run.trigger.eval(), run.decoder.eval(), tuple(run.history))


@torch.no_grad()
def measure_ssba(
    trigger: SsbaTrigger, decoder: SsbaDecoder, images: Tensor, *, seed: int = 0
) -> SsbaQuality:
    """Measure a trained pair on new images, stored with 8 bits, at least 2 of them.

    The last two figures tell how sample-specific the trigger is: were all changes the same
    pattern, their correlation would be 1 and swapping them would cost no bit.

    Raises:
        ValueError: A single image, or a decoder of other bits.
    """
    check_images(images)
    if len(images) < 2:
        raise ValueError(f"expected at least two images to compare, got {len(images)}")
    if decoder.last.out_features != trigger.secret.shape[1]:
        bits = trigger.secret.shape[1]
        raise ValueError(f"expected a decoder of {bits} bits, got {decoder.last.out_features}")
    generator = torch.Generator().manual_seed(seed)
    secrets = _draw(len(images), trigger.secret.shape[1], generator).to(images.device)
    fixed, other, swapped, marked, changes = [], [], [], [], []
    for x, bits in zip(images.split(_CHUNK), secrets.split(_CHUNK), strict=True):
        stored = quantize(trigger(x))
        moved = quantize(x + (stored - x).roll(1, dims=0))  # of the neighbour in the chunk
        fixed.append(_right(decoder(stored), trigger.secret))
        other.append(_right(decoder(quantize(trigger.encoder(x, bits))), bits))
        swapped.append(_right(decoder(moved), trigger.secret))
        marked.append(stored)
        changes.append((stored - x).flatten(1))
    correlation = _mean_correlation(torch.cat(changes))
    energy = float(psnr(torch.cat(marked), images).mean())
    rates = [float(torch.cat(right).mean()) for right in (fixed, other, swapped)]
    return SsbaQuality(rates[0], rates[1], energy, correlation, rates[2])


class _Run:
    """All that changes during training."""

    def __init__(self, images: Tensor, config: SsbaConfig, seed: int) -> None:
        self.images, self.config = images, config
        self.step, self.since = 0, -1  # steps done in all, and since the bits were learned
        self.history: list[SsbaStep] = []
        self.generator = torch.Generator().manual_seed(seed)
        self.order = torch.arange(len(images))
        shape = {"image_size": images.shape[3], "channels": images.shape[1]}
        size = {"bits": config.bits, "width": config.width}
        secret_seed = seed if config.secret_seed is None else config.secret_seed
        with seeded(seed):  # layer initialisers take no generator
            self.trigger = SsbaTrigger(
                **shape, **size, secret_seed=secret_seed, output=config.output
            )
            self.decoder = SsbaDecoder(**shape, **size)
            if config.weights == "he":
                self.trigger.encoder.apply(_start_as_he)
                self.decoder.apply(_start_as_he)
        self.modules = nn.ModuleList([self.trigger.encoder, self.decoder]).to(images.device)
        self.trigger.to(images.device)
        self.optimizer = torch.optim.Adam(self.modules.parameters(), lr=config.lr)

    def advance(self, total: int) -> SsbaStep:
        """Train on the next batch of a run of ``total`` steps."""
        config = self.config
        x = self.images[self._rows().to(self.images.device)]
        secrets = _draw(len(x), config.bits, self.generator).to(x.device)
        ramped = (self.since - config.hold * total) / (config.ramp * total)
        weight = config.image_weight * min(max(ramped, 0.0), 1.0)
        marked = self.trigger.encoder(x, secrets)
        image = self._finite((marked - x).square().mean())
        logits = self.decoder(marked.clamp(0, 1))
        bits = self._finite(F.binary_cross_entropy_with_logits(logits, secrets))
        self.optimizer.zero_grad(set_to_none=True)
        (bits + weight * image).backward()
        self.optimizer.step()
        self.step += 1
        accuracy = float(_right(logits, secrets).mean())
        if self.since >= 0 or accuracy > config.learned:
            self.since += 1
        return SsbaStep(self.step, float(bits.detach()), float(image.detach()), accuracy, weight)

    def state(self) -> dict[str, Any]:
        """What the next step depends on."""
        return {
            "step": self.step,
            "since": self.since,
            "history": self.history,
            "order": self.order,
            "generator": self.generator.get_state(),
            "modules": self.modules.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load(self, state: dict[str, Any] | None) -> None:
        """Take back what `state` gave."""
        if state is None:
            return
        self.step, self.since = state["step"], state["since"]
        self.history = [SsbaStep(*row) for row in state["history"]]
        self.order = state["order"]
        self.generator.set_state(state["generator"])
        self.modules.load_state_dict(state["modules"])
        self.optimizer.load_state_dict(state["optimizer"])
        like_parameters(self.optimizer)

    def _finite(self, loss: Tensor) -> Tensor:
        if not loss.isfinite():
            raise RuntimeError(f"the loss is not finite at step {self.step + 1}: lower the lr")
        return loss

    def _rows(self) -> Tensor:
        """The next batch of this pass over the images; each pass has a new order."""
        size = self.config.batch_size
        place = self.step % -(-len(self.images) // size)
        if place == 0:
            self.order = torch.randperm(len(self.images), generator=self.generator)
        return self.order[place * size : (place + 1) * size]


def _start_as_he(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _draw(count: int, bits: int, generator: torch.Generator) -> Tensor:
    return torch.randint(2, (count, bits), generator=generator).float()


def _right(logits: Tensor, secrets: Tensor) -> Tensor:
    """Share of bits read right, for each image: ``(N,)``."""
    return ((logits > 0) == (secrets > 0.5)).float().mean(1)


def _mean_correlation(changes: Tensor) -> float:
    """Mean Pearson correlation over all pairs of rows ``(N, D)``; a constant row counts as 0."""
    rows = F.normalize(changes - changes.mean(1, keepdim=True), dim=1)
    # The sum over all pairs is the square of the summed rows, less each row with itself.
    itself = rows.square().sum()
    pairs = len(rows) * (len(rows) - 1)
    return float((rows.sum(0).square().sum() - itself) / pairs)


def _identity(config: SsbaConfig, images: Tensor, seed: int) -> dict[str, Any]:
    settings = json.loads(json.dumps(asdict(config)))
    return {"settings": settings, "seed": seed, "data": fingerprint(images)}
