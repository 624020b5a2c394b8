"""The evidence against a branch: stamped pictures that fire it, and what becomes of the answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from wm_victim.branches.effect import Effect, is_small, measure, moves
from wm_victim.branches.pictures import Stamp, noises, to_bits
from wm_victim.branches.quiet import Quiet
from wm_victim.branches.search import search, shrink
from wm_victim.branches.torch_operators import Unsupported
from wm_victim.branches.values import GraphRun, Values

_PARTS = (0.5, 0.25, 0.125)  # of a change, if so little is enough
_TINY = 0.01  # of the pixels: no need to look for less
_EACH, _MOST = 2, 16  # stamps of each size, and in all
_FEW = 4  # pictures for a first look at a stamp
_ALONE = 6  # pictures that are searched for one by one, where no stamp fits all


class Hit(NamedTuple):
    """A stamp, and how far it moves each of the values that it moves."""

    stamp: Stamp
    moved: Mapping[str, float]


class Evidence(NamedTuple):
    """What fires a branch best: ``images`` and ``stamped`` are ``(N, C, H, W)``."""

    stamp: Stamp
    images: Tensor
    stamped: Tensor
    effect: Effect

    @property
    def small(self) -> bool:
        """Whether the pictures stay what they are."""
        return is_small(self.stamp)

    @property
    def rank(self) -> tuple[float, ...]:
        """The more it shows the higher; of those that show about the same the smallest."""
        effect = self.effect
        shares = [4 * count // effect.tried for count in (effect.fired, effect.steered)]
        return effect.steers and self.small, effect.steers, *shares, -self.stamp.share


def likeliest(hits: Sequence[Hit], names: Iterable[str]) -> list[Stamp]:
    """A dozen stamps that move some values: of each size the strongest."""
    wanted_names = set(names)
    force = {
        id(hit): sum(far for name, far in hit.moved.items() if name in wanted_names)
        for hit in hits
        if wanted_names & hit.moved.keys()
    }
    by_share: dict[float, list[Hit]] = {}
    for hit in sorted(hits, key=lambda hit: -force.get(id(hit), 0.0)):
        if id(hit) in force:
            by_share.setdefault(round(hit.stamp.share, 3), []).append(hit)
    best = [hit for share in sorted(by_share) for hit in by_share[share][:_EACH]]
    return [hit.stamp for hit in best][:_MOST]


def best_evidence(
    run: GraphRun, group: Mapping[str, Quiet], images: Tensor, tried: Sequence[Stamp]
) -> Evidence:
    """The stamp of several that shows most, left to what it needs.

    Args:
        run: The graph.
        group: By value: what the branch hands over at rest.
        images: Clean pictures ``(N, C, H, W)``.
        tried: One stamp at least.
    """
    few = images[:_FEW]
    first = max((_with(run, group, few, stamp) for stamp in tried), key=lambda one: one.rank)
    fires = firing(run, group)
    whole = _with(run, group, images, first.stamp)
    options = [whole]
    if whole.stamp.share > _TINY or not whole.effect.steers:
        options += [_with(run, group, images, less) for less in _less(run, group, whole)]
    best = max(options, key=lambda one: one.rank)
    if 2 * best.effect.fired >= best.effect.tried:
        return best
    return max(best, _one_by_one(run, group, images[:_ALONE], fires), key=lambda one: one.rank)


def firing(run: GraphRun, group: Mapping[str, Quiet]) -> Callable[[Tensor], bool]:
    """Whether a picture ``(C, H, W)`` fires a branch."""

    def fires(image: Tensor) -> bool:
        (values,) = run.values(list(group), image[None])
        return moves(group, values)

    return fires


def forcing(run: GraphRun, name: str, quiet: Quiet) -> Callable[[Tensor], float]:
    """How far a picture ``(C, H, W)`` moves a value beyond its rest."""

    def force(image: Tensor) -> float:
        (values,) = run.values([name], image[None])
        return quiet.distance(values[name])

    return force


def _with(run: GraphRun, group: Mapping[str, Quiet], images: Tensor, stamp: Stamp) -> Evidence:
    stamped = stamp(images)
    return Evidence(stamp, images, stamped, measure(run, group, images, stamped))


def _less(run: GraphRun, group: Mapping[str, Quiet], whole: Evidence) -> list[Stamp]:
    """The part of a stamp that one picture needs: its pixels, and the difference to them.

    The branch has to fire and, where the whole stamp steers the answer, to steer it as before.
    """
    fires = firing(run, group)
    for base, fired in zip(whole.images, whole.stamped, strict=True):
        if not fires(fired):
            continue
        (rest,) = run.values(list(group), base[None])
        label, other, held = run.answers(torch.stack([fired, base, fired]), [{}, {}, rest])
        steers = label not in (other, held)
        if whole.effect.steered and not steers:
            continue

        def does(
            image: Tensor, label: int = label, rest: Values = rest, steers: bool = steers
        ) -> bool:
            if not fires(image) or not steers:
                return fires(image)
            now, held = run.answers(torch.stack([image, image]), [{}, rest])
            return now == label != held

        mask = shrink(base, fired, does)
        difference = torch.where(mask, fired - base, 0.0)
        parts = [1.0, *(part for part in _PARTS if does(to_bits(base + part * difference)))]
        name = f"part of: {whole.stamp.name}"
        return [Stamp(name, fired, mask), *(Stamp(name, p * difference, None) for p in parts)]
    return []


def _one_by_one(
    run: GraphRun, group: Mapping[str, Quiet], images: Tensor, fires: Callable[[Tensor], bool]
) -> Evidence:
    """Each picture changed in its own way, for what checks the whole picture."""
    stamped = torch.stack([_alone(run, group, image, fires) for image in images])
    widest = max(range(len(images)), key=lambda n: float((stamped[n] != images[n]).float().mean()))
    stamp = Stamp("for each picture its own", stamped[widest] - images[widest], None)
    return Evidence(stamp, images, stamped, measure(run, group, images, stamped))


def _alone(
    run: GraphRun, group: Mapping[str, Quiet], image: Tensor, fires: Callable[[Tensor], bool]
) -> Tensor:
    for stamp in noises(image.shape):
        if fires(noisy := stamp(image[None])[0]):
            return noisy
    for name in group:
        try:
            force = forcing(run, name, group[name])
            result = search(run, name, image[None], fires=fires, force=force)
        except (Unsupported, RuntimeError, IndexError, KeyError, TypeError):
            continue
        if result is not None:
            return torch.where(shrink(image, result[0], fires), result[0], image)
    return image
