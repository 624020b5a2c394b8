"""The steps of a look at a graph: values at the side, stamps, searches, and what they show."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor

from wm_inject.core.image_size import as_image_size
from wm_inject.core.text import printable
from wm_victim.branches.bounds import never_changes
from wm_victim.branches.firing import Evidence, Hit, best_evidence, firing, forcing, likeliest
from wm_victim.branches.graph_view import GraphView
from wm_victim.branches.joins import find_sides
from wm_victim.branches.pictures import Stamp, noises, stamps
from wm_victim.branches.quiet import Quiet
from wm_victim.branches.search import search
from wm_victim.branches.torch_operators import Unsupported
from wm_victim.branches.values import GraphRun, plain
from wm_victim.branches.words import decides, describe, own_nodes

_TRIED = 12  # of the clean pictures are stamped
_STARTS = 3  # pictures from which a search starts
_EARLY = 2  # trained layers before a first feature
_SEARCHED = 12  # values that are searched for
_LARGE = 2**16  # numbers of a value: a feature map
_MUCH_WORK, _MOST_WORK = 2**21, 2**25  # numbers that a search computes in each step
_AT_ONCE = 2**21  # numbers of all values that are looked at together
# What tells dark or grey pictures apart, to prepare them, may be moved by a part of one as well.
_PREPARED = 0.05  # of the pixels: so few move no mean
_WIDE = 0.2  # of the pixels: stamps that values which are never quite still are tried with


class Looker:
    """A look at one graph.

    Args:
        run: The graph.
        images: Clean pictures ``(N, C, H, W)`` of 8 bits.
    """

    def __init__(self, run: GraphRun, images: Tensor) -> None:
        self.run, self.view, self.images = run, run.view, images
        self.sizes = self._sizes()
        self.sides = {side.value: side for side in find_sides(self.view, self.sizes)}
        self.quiet = self._quiet()

    def branches(self) -> list[dict[str, Any]]:
        """All branches, each once: those that stamps fire, that searches fire, and the others.

        Each is what `words.describe` tells, with its "state" (`report.State`) and, if something
        fires it, the evidence.
        """
        rows: list[dict[str, Any]] = []
        channels, height, width = self.images.shape[1:]
        size = as_image_size(height, width)
        hits = self._hits((*stamps(channels, size), *noises(self.images.shape[1:])))
        rest = dict(self.quiet)
        while names := {name for hit in hits for name in hit.moved if name in rest}:
            # Stamps that move different values may need each other: the earliest value decides.
            earliest = self._first(names)[0]
            together = [hit.moved.keys() for hit in hits if earliest in hit.moved]
            group = self._first(set.intersection(*map(set, together)) & rest.keys())
            rows.append(self._judged(group, likeliest(hits, group)))
            rest = {name: one for name, one in rest.items() if not self._behind(name, group)}
        still = {name for name, one in rest.items() if one.still and self._worth(name)}
        for name in self._first(still)[:_SEARCHED]:
            if name not in rest or never_changes(self.run, name, self.images[:1]):
                continue
            stamp, why = self._searched(name)
            if stamp is not None:
                moved = {one for hit in self._hits([stamp]) for one in hit.moved} | {name}
                group = self._first(moved & rest.keys())
                rows.append(self._judged(group, [stamp]))
                rest = {one: q for one, q in rest.items() if not self._behind(one, group)}
            elif self._any(decides, name):
                rows.append(self._told([name]) | {"state": "not fired", "why": why})
        return rows

    def _sizes(self) -> dict[str, int]:
        """How many numbers each early value has that depends on the picture."""
        view = self.view
        names = [name for name in view.pixels if name != view.image and view.is_shallow(name)]
        try:
            values = next(self.run.values(sorted(names), self.images[:1]))
        except (ValueError, StopIteration):
            return {}
        return {name: value.size for name, value in values.items()}

    def _quiet(self) -> dict[str, Quiet]:
        """By value: what it is on clean pictures, without feature maps that move with them."""
        quiet: dict[str, Quiet] = {}
        for names in self._parts(list(self.sides)):
            few = list(self.run.values(names, self.images[:4]))
            calm = [
                name
                for name in names
                if few[0][name].size <= _LARGE or _closest([values[name] for values in few])
            ]
            every = list(self.run.values(calm, self.images)) if calm else []
            for name in calm:
                values = [each[name] for each in every]
                if len({value.shape for value in values}) == 1:
                    quiet[name] = Quiet(values)
        return quiet

    def _parts(self, names: list[str]) -> Iterator[list[str]]:
        """Names of values that fit into memory together."""
        part: list[str] = []
        for name in names:
            if part and sum(self.sizes.get(each, 0) for each in (*part, name)) > _AT_ONCE:
                yield part
                part = []
            part.append(name)
        if part:
            yield part

    def _hits(self, tried: Sequence[Stamp]) -> list[Hit]:
        """Stamps that move values; those that are never quite still are tried with large ones."""
        still = [name for name, one in self.quiet.items() if one.still]
        lively = [name for name in self.quiet if name not in still]
        hits = []
        for number, stamp in enumerate(tried):
            names = still + lively if stamp.share > _WIDE else still
            if not names:
                continue
            image = self.images[number % _STARTS][None]
            (values,) = self.run.values(names, stamp(image))
            moved = {
                name: self.quiet[name].distance(values[name])
                for name in names
                if self.quiet[name].moved(values[name])
            }
            if moved:
                hits.append(Hit(stamp, moved))
        return hits

    def _first(self, names: set[str]) -> list[str]:
        """Those that do not depend on others of them, in the order of the graph."""
        return [
            name
            for name in self.sides
            if name in names and not self._behind(name, sorted(names - {name}))
        ]

    def _behind(self, name: str, group: Sequence[str]) -> bool:
        """Whether a value is one of a group or computed from it."""
        before = self.view.before(name)
        return any(name == one or self.view.producer[one] in before for one in group)

    def _worth(self, name: str) -> bool:
        """Whether to search for what moves a value: behind the first features if it decides."""
        return self.view.layers[name].bit_count() <= _EARLY or self._any(decides, name)

    def _any(self, what: Callable[[GraphView, int], bool], name: str) -> bool:
        """Whether any node of a branch is of a kind."""
        own = own_nodes(self.view, [self.sides[name]])
        return any(what(self.view, place) for place in own)

    def _searched(self, name: str) -> tuple[Stamp | None, str]:
        """A stamp, found by gradients, that moves a value; or why none was looked for."""
        before = self.view.before(name)
        work = sum(self.sizes.get(one, 0) for n in before for one in self.view.nodes[n].output)
        if work > _MOST_WORK:
            return None, "too large to follow gradients through"
        starts = self.images[: 1 if work > _MUCH_WORK else _STARTS]
        fires = firing(self.run, {name: self.quiet[name]})
        force = forcing(self.run, name, self.quiet[name])
        try:
            result = search(self.run, name, starts, fires=fires, force=force)
        except (Unsupported, RuntimeError, IndexError, KeyError, TypeError) as error:
            return None, printable(error, 120)
        return (None if result is None else Stamp("found by gradients", *result)), ""

    def _judged(self, names: list[str], tried: list[Stamp]) -> dict[str, Any]:
        """What a branch does that some stamps fire."""
        group = {name: self.quiet[name] for name in names}
        evidence = best_evidence(self.run, group, self.images[:_TRIED], tried)
        words = self._told(names)
        early = words["before_layers"]
        small = evidence.small and not (early and evidence.stamp.share > _PREPARED)
        if small and evidence.effect.steers:
            state = "steers"
        elif not evidence.effect.steered:
            state = "harmless"
        else:
            state = "preparation" if early and not small else "fired"
        return words | _shown(evidence) | {"state": state}

    def _told(self, names: Sequence[str]) -> dict[str, Any]:
        count = max(self.quiet[name].taken for name in names)
        words = describe(self.view, [self.sides[name] for name in names])
        return words | {"clean": len(self.images), "clean_taken": count}


def _shown(evidence: Evidence) -> dict[str, Any]:
    image, stamped = evidence.images[0], evidence.stamped[0]
    places = (stamped != image).any(0).nonzero()
    (top, left), (bottom, right) = (
        (places.amin(0).tolist(), places.amax(0).tolist()) if len(places) else ((0, 0), (0, 0))
    )
    pixels: Any = (stamped * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
    return {
        "stamp": evidence.stamp.name,
        "share": evidence.stamp.share,
        "change": float((evidence.stamped - evidence.images).abs().max()),
        "box": [top, bottom, left, right] if len(places) else [],
        "effect": asdict(evidence.effect),
        "picture": base64.b64encode(pixels.tobytes()).decode(),
    }


def _closest(values: Sequence[Any]) -> bool:
    """Whether at least two of a few values are all but equal."""
    arrays = [plain(value) for value in values]
    pairs = [(a, b) for place, a in enumerate(arrays) for b in arrays[:place]]
    return any(a.shape == b.shape and Quiet([a, b]).still for a, b in pairs)
