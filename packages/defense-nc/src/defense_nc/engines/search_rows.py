"""Many searches for a mask and a pattern as rows of one batch: one victim pass serves all."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from defense_nc.batches import EndlessBatches
from defense_nc.config import NCConfig
from defense_nc.engines.candidates import Candidate, draw, squash
from defense_nc.engines.cost_schedule import CostSchedule
from defense_nc.gradients import GradientCount, reached, vanished
from wm_inject.core.precision import resolve_precision

Forward = Callable[[Tensor], Tensor]
_EPS = 1e-8  # Adam's, as torch has it
_MOST_IMAGES = {"cpu": 256, "cuda": 8192}  # of one pass: more is not faster


class Search:
    """One label and one start (an index into ``config.starts``), and its current state.

    It holds its tensors while it is not part of a batch.

    Args:
        pool: int64 ``(M,)`` on the CPU: the images of other classes.
        shape: ``(C, H, W)`` of an image.
    """

    def __init__(
        self,
        label: int,
        start: int,
        *,
        pool: Tensor,
        shape: Sequence[int],
        device: torch.device,
        config: NCConfig,
        seed: int,
    ) -> None:
        self.label, self.start, self.pool = label, start, pool
        self._config = config
        generator = torch.Generator().manual_seed(seed)
        free = draw(config.starts[start], shape, generator)
        # The mask is channel 0, the pattern the rest: one tensor for the optimiser.
        self.theta = torch.cat(free).to(device)  # (1 + C, H, W)
        self.first, self.second = torch.zeros_like(self.theta), torch.zeros_like(self.theta)
        self.steps = 0
        self.stopped = False  # at a milestone
        self.norm = float("inf")  # the best one of a step that succeeded
        self.success = 0.0  # of the last step
        self.best: deque[Candidate] = deque(maxlen=config.fallbacks)
        self.schedule = CostSchedule(config)
        self.gradients = GradientCount()
        self._batches = EndlessBatches(len(pool), config.batch_size, generator)

    def done(self, until: int) -> bool:
        """Whether it takes no more steps before step ``until``."""
        return self.stopped or self.schedule.stop or self.steps >= until

    def next_batch(self) -> Tensor:
        """Image numbers of its next mini-batch, int64 ``(B,)``."""
        return self.pool[next(self._batches)]

    def take(self, success: float, norm: float) -> None:
        """Record one step: its success, and the norm of the resulting mask."""
        self.steps, self.success = self.steps + 1, success
        if success >= self._config.threshold and norm < self.norm:
            self.best.appendleft(_candidate(norm, squash(self.theta).clamp(0, 1)))
            self.norm = norm
        self.schedule.update(success, self.norm)

    def settle(self) -> None:
        """Leave the batch with tensors of its own, so that the batch's can be freed."""
        self.theta, self.first, self.second = (
            part.clone() for part in (self.theta, self.first, self.second)
        )

    def candidates(self) -> list[Candidate]:
        """The best so far, the smallest first; the current one if no step has succeeded."""
        if self.best:
            return list(self.best)
        values = squash(self.theta).clamp(0, 1)
        return [_candidate(float(values[:1].sum()), values, succeeded=False)]

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs to continue to the same bits."""
        best = [torch.cat([one.mask, one.pattern]) for one in self.best]
        return {
            # One tensor: with thousands of searches, a name each would fill a file's header.
            "tensors": torch.stack([self.theta, self.first, self.second, *best]),
            "norms": [one.norm for one in self.best],
            **{name: getattr(self, name) for name in ("steps", "stopped", "success")},
            "schedule": self.schedule.state_dict(),
            "gradients": self.gradients.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from another search's state; the batches are drawn anew up to its step."""
        self.theta, self.first, self.second, *best = state["tensors"].to(self.theta.device)
        self.steps, self.stopped, self.success = state["steps"], state["stopped"], state["success"]
        self.schedule.load_state_dict(state["schedule"])
        self.gradients = GradientCount(*state["gradients"])
        self.best.extend(
            _candidate(norm, one) for norm, one in zip(state["norms"], best, strict=True)
        )
        self.norm = self.best[0].norm if self.best else float("inf")
        for _ in range(self.steps * self._config.batches):
            next(self._batches)


def _candidate(norm: float, values: Tensor, *, succeeded: bool = True) -> Candidate:
    """A candidate from a mask and a pattern in one tensor ``(1 + C, H, W)``."""
    return Candidate(norm, values[:1], values[1:], succeeded)


class _Rows(NamedTuple):
    """The tensors of the searches in the batch, one row each."""

    theta: Tensor  # (S, 1 + C, H, W)
    first: Tensor
    second: Tensor


def advance(
    forward: Forward, images: Tensor, searches: Sequence[Search], until: int, *, config: NCConfig
) -> Iterator[list[Search]]:
    """Take every search to step ``until`` or its own early stop, as many at a time as fit.

    Searches enter in their order, those that have begun first; ``config.stack`` bounds the images
    of one pass. After each step, yields the searches that took it, in the order of their rows.
    """
    most = config.stack or _MOST_IMAGES.get(images.device.type, _MOST_IMAGES["cpu"])
    room = max(1, most // config.batch_size)
    waiting = deque(search for search in searches if not search.done(until))
    live: list[Search] = []
    rows: _Rows | None = None
    while True:
        stay = [search for search in live if not search.done(until)]
        while waiting and len(stay) < room:
            stay.append(waiting.popleft())
        if rows is None or stay != live:
            for search in set(live).difference(stay):
                search.settle()
            rows, live = _gather(stay) if stay else None, stay
        if rows is None:
            return
        _step(forward, images, rows, live, config)
        yield live


def _gather(searches: Sequence[Search]) -> _Rows:
    """Stack the searches' tensors; each search's own become views of its row."""
    rows = _Rows(
        *(
            torch.stack([getattr(search, name) for search in searches])
            for name in ("theta", "first", "second")
        )
    )
    for row, search in enumerate(searches):
        search.theta, search.first, search.second = (part[row] for part in rows)
    return rows


def _step(
    forward: Forward, images: Tensor, rows: _Rows, live: Sequence[Search], config: NCConfig
) -> None:
    """One step of the schedule for every row: ``config.batches`` mini-batches, then the costs."""
    count = len(live)
    # In bfloat16 equal logits are chance; in float32 they are saturated, and reach no label.
    exact = resolve_precision(config.precision, images.device) == torch.float32
    goal = torch.tensor([search.label for search in live], device=images.device)
    cost = torch.tensor([search.schedule.cost for search in live], device=images.device)
    success, elsewhere, vanishing = torch.zeros(3, count, device=images.device)
    steps = torch.tensor([search.steps * config.batches for search in live], dtype=torch.float64)
    for _ in range(config.batches):
        index = torch.stack([search.next_batch() for search in live]).to(images.device)  # (S, B)
        grad, *counts = _gradients(forward, images[index], rows.theta, goal, cost, exact=exact)
        steps += 1
        adam_rows(*rows, grad, steps, lr=config.lr, betas=config.betas)
        for total, each in zip((success, elsewhere, vanishing), counts, strict=True):
            total += each
    norms = squash(rows.theta[:, :1]).clamp(0, 1).sum(dim=(1, 2, 3)).tolist()
    rates = (success / config.batches).clamp(max=1).tolist()
    for row, search in enumerate(live):
        search.take(rates[row], norms[row])
        search.gradients.add(float(elsewhere[row]), float(vanishing[row]))


def _gradients(
    forward: Forward,
    images: Tensor,
    theta: Tensor,
    goal: Tensor,
    cost: Tensor,
    *,
    exact: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradient of every row's own loss; of its images, the share that reaches its label.

    And how many do not, and how many of these have a vanished gradient. The sum of the losses has
    each row's own gradient in that row: no row sees another's images.
    """
    count, size = images.shape[:2]
    with torch.enable_grad():
        theta = theta.detach().requires_grad_()
        free = squash(theta)  # (S, 1 + C, H, W)
        mask, pattern = free[:, None, :1], free[:, None, 1:]
        triggered = images + mask * (pattern - images)  # (S, B, C, H, W)
        logits = forward(triggered.flatten(0, 1))  # (S * B, K)
        goals = goal.repeat_interleave(size)
        losses = F.cross_entropy(logits, goals, reduction="none").view(count, size).mean(1)
        total = (losses + cost * mask.sum(dim=(1, 2, 3, 4))).sum()
        # A model of thresholds depends on no image: then there are no gradients of them.
        grad, pixels = torch.autograd.grad(total, (theta, triggered), allow_unused=True)
    hits = reached(logits, goals)
    pixels = None if pixels is None else pixels.flatten(0, 1) * size
    vanishing = vanished(pixels, logits, goals)
    success = hits if exact else logits.detach().argmax(1) == goals
    counts = [each.view(count, size).float() for each in (success, ~hits, vanishing)]
    # A row without a finite gradient stays where it is.
    grad = torch.where(grad.isfinite(), grad, 0)
    return grad, counts[0].mean(1), counts[1].sum(1), counts[2].sum(1)


@torch.no_grad()
def adam_rows(
    theta: Tensor,
    first: Tensor,
    second: Tensor,
    grad: Tensor,
    steps: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
) -> None:
    """One step of Adam in place on rows ``(S, ...)`` of which each has taken ``steps`` ``(S,)``.

    Source: Kingma and Ba 2015, algorithm 1, with torch's epsilon outside the root.
    """
    shape = (-1, *[1] * (theta.ndim - 1))
    scale = (lr / (1 - betas[0] ** steps)).view(shape).to(theta)
    spread = (1 - betas[1] ** steps).sqrt().view(shape).to(theta)
    first.lerp_(grad, 1 - betas[0])
    second.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
    theta.sub_(scale * first / (second.sqrt() / spread + _EPS))
