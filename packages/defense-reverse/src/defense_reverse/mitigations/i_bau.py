"""I-BAU: unlearn the one addition that fools the classifier most, by implicit hypergradients."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defense_nc.batches import training_batches
from defense_nc.mitigations import check_repair, trainable
from defense_nc.protocols import Repaired
from defense_reverse.mitigations.hypergradient import hypergradient
from wm_inject.core.plan import Trigger
from wm_inject.core.presets import preset_of
from wm_inject.core.progress import Progress
from wm_inject.core.progress import progress as show_progress
from wm_victim.inference import frozen, predict


@dataclass(frozen=True, kw_only=True)
class IBAU:
    """Implicit backdoor adversarial unlearning: train against the worst universal addition.

    Source: Zeng et al., "Adversarial Unlearning of Backdoors via Implicit Hypergradient", 2022, and
        its released code, which takes no image for the addition where one in a hundred of the batch
        rounds down to none; here it is always at least one.
    """

    name: ClassVar[str] = "i-bau"
    steps: int = 60  # on the weights, over all rounds
    rounds: int = 6  # how often the addition is searched anew; at most ``steps``
    batch_size: int = 32  # of the search and of the weights
    lr: float = 3e-4  # of Adam on the weights
    search_steps: int | None = 15  # of each search; one pass over the images if None
    search_lr: float = 1.0  # of SGD on the addition
    radius: float | None = 3.0  # largest L2 norm of the addition in [0, 1]; no bound if None
    penalty: float = 1e-3  # weight of the addition's squared L2 norm
    inner_lr: float = 2e-3  # step of the map whose fixed point the addition is taken for
    inner_batch: int = 32  # images that this map looks at
    iterations: int = 2  # fixed-point iterations of a hypergradient
    share: float = 0.25  # of each batch that carries the addition, in (0, 1]; at least one image

    def __post_init__(self) -> None:
        if self.steps < 1 or not 1 <= self.rounds <= self.steps or self.batch_size < 2:
            raise ValueError(
                "expected steps >= rounds >= 1 and batch_size >= 2, "
                f"got {self.steps}, {self.rounds}, {self.batch_size}"
            )
        least = min(self.search_steps or 1, self.inner_batch, self.iterations)
        if least < 1 or self.search_steps == 0:
            raise ValueError(
                "expected search_steps, inner_batch and iterations >= 1, "
                f"got {self.search_steps}, {self.inner_batch}, {self.iterations}"
            )
        if not self.lr > 0 or not self.search_lr > 0 or not self.inner_lr > 0:
            raise ValueError(
                "expected lr, search_lr and inner_lr > 0, "
                f"got {self.lr}, {self.search_lr}, {self.inner_lr}"
            )
        if self.radius is not None and not self.radius > 0:
            raise ValueError(f"expected radius > 0 or None, got {self.radius}")
        if not self.penalty >= 0 or not 0 < self.share <= 1:
            raise ValueError(
                f"expected penalty >= 0 and share in (0, 1], got {self.penalty}, {self.share}"
            )

    @classmethod
    def preset(cls, name: str = "fast", **changes: Any) -> IBAU:
        """Settings by name, with changes.

        "paper" is the released code on 5,000 images: five rounds of 50 steps of 100 images, of
        which one carries the addition, and five fixed-point iterations; the addition is not
        bounded. "fast" is ours: it bounds the addition, puts it on a quarter of smaller batches,
        and takes a shorter inner step. The published one of 0.1 is too long where the inner loss
        bends sharply: the fixed-point iterations then grow instead of settling.
        """
        return preset_of(cls, PRESETS, name, **changes)

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
        """Search the worst addition and train a copy against it, in turns.

        The model must be twice differentiable. It stays in eval mode, so batch normalisation keeps
        its running statistics. The log has the losses, and for each round the addition's L2 norm
        and the share of the first images whose answer it changes.
        """
        check_repair(model, images, labels)
        repaired = copy.deepcopy(model).eval()
        parameters = trainable(repaired)
        device = parameters[0].device
        images, labels = images.to(device), labels.to(device)
        optimizer = torch.optim.Adam(parameters, lr=self.lr)
        generator = torch.Generator().manual_seed(seed)
        log: dict[str, list[float]] = {"losses": [], "norms": [], "fooled": []}
        bar: Progress[None] = show_progress(total=self.steps, desc="i-bau", enabled=progress)
        with bar, torch.enable_grad():
            for turn in range(self.rounds):
                delta = self._search(repaired, images, generator)
                log["norms"].append(float(delta.norm()))
                log["fooled"].append(_fooled(repaired, images[:_WATCHED], delta))
                count = self.steps // self.rounds + (turn < self.steps % self.rounds)
                for index in training_batches(len(images), self.batch_size, count, generator):
                    loss = self._step(repaired, images, labels, index, delta, optimizer, generator)
                    log["losses"].append(loss)
                    bar.update()
        for parameter in parameters:
            parameter.grad = None
        return Repaired(repaired, log)

    def _search(self, net: nn.Module, images: Tensor, generator: torch.Generator) -> Tensor:
        """The addition ``(1, C, H, W)`` that moves most images away from the net's own answers."""
        delta = torch.zeros_like(images[:1]).requires_grad_()
        steps = self.search_steps or -(-len(images) // self.batch_size)
        optimizer = torch.optim.SGD([delta], lr=self.search_lr)
        with frozen(net):
            for index in training_batches(len(images), self.batch_size, steps, generator):
                part = images[index.to(images.device)]
                answers = predict(net, part).argmax(1)
                loss = self._inner_loss(net, part, answers, delta)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if self.radius is not None:
                    with torch.no_grad():
                        delta.mul_((self.radius / delta.norm().clamp(min=1e-12)).clamp(max=1))
        return delta.detach()

    def _inner_loss(self, net: nn.Module, images: Tensor, labels: Tensor, delta: Tensor) -> Tensor:
        # Pixels may leave [0, 1] here: clamping would stop the gradient where it matters.
        return self.penalty * delta.square().sum() - F.cross_entropy(net(images + delta), labels)

    def _step(
        self,
        net: nn.Module,
        images: Tensor,
        labels: Tensor,
        index: Tensor,
        delta: Tensor,
        optimizer: torch.optim.Optimizer,
        generator: torch.Generator,
    ) -> float:
        """One step of the weights along the hypergradient; the loss before it."""
        carriers = carrier_rows(len(index), self.share, generator).to(images.device)
        index = index.to(images.device)
        mask = torch.zeros(len(index), 1, 1, 1, device=images.device)
        mask[carriers] = 1
        first = slice(0, self.inner_batch)

        def inner(free: Tensor) -> Tensor:
            return self._inner_loss(net, images[first], labels[first], free)

        def outer(free: Tensor) -> Tensor:
            return F.cross_entropy(net(images[index] + mask * free), labels[index])

        parameters = trainable(net)
        loss, slopes = hypergradient(
            inner, outer, delta, parameters, lr=self.inner_lr, iterations=self.iterations
        )
        for parameter, slope in zip(parameters, slopes, strict=True):
            parameter.grad = slope
        optimizer.step()
        return loss


_WATCHED = 256  # images on which the log says how many answers the addition changes
PRESETS: dict[str, dict[str, Any]] = {
    "fast": {},
    "paper": {
        "steps": 250,
        "rounds": 5,
        "batch_size": 100,
        "lr": 1e-3,
        "search_steps": None,
        "search_lr": 10.0,
        "radius": None,
        "inner_lr": 0.1,
        "inner_batch": 100,
        "iterations": 5,
        "share": 0.01,
    },
}


def carrier_rows(count: int, share: float, generator: torch.Generator) -> Tensor:
    """Which rows of a batch carry the addition: a share of them, and never none."""
    chosen = max(1, round(share * count))
    return torch.randperm(count, generator=generator)[:chosen]


def _fooled(net: nn.Module, images: Tensor, delta: Tensor) -> float:
    """Share of the images whose answer the addition changes; they may leave [0, 1]."""
    with torch.no_grad():
        before, after = net(images).argmax(1), net(images + delta).argmax(1)
    return float((before != after).double().mean())
