"""In the child: the branches of an untrusted ONNX graph that pictures can steer."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wm_inject.core.text import printable
from wm_victim.branches.bounds import never_changes
from wm_victim.branches.effect import Effect, is_small, measure, moves
from wm_victim.branches.graph_view import GraphView
from wm_victim.branches.joins import Side, find_sides
from wm_victim.branches.pictures import Stamp, natural_images, resized, stamps, to_bits
from wm_victim.branches.quiet import Quiet
from wm_victim.branches.search import search, shrink
from wm_victim.branches.straight_through import Unsupported
from wm_victim.branches.values import GraphRun, plain
from wm_victim.branches.words import DECIDING, describe, own_nodes
from wm_victim.loading.graph_ports import ImageInput, image_input, logits_output, ways_to_run
from wm_victim.loading.import_onnx import open_session
from wm_victim.loading.onnx_float32 import to_float32

_NATURAL = 24  # pictures, where there are none of the user's
_TRIED = 12  # of the clean pictures are stamped
_STARTS = 3  # pictures from which a search starts
_SEARCHED = 12  # values that are searched for
_NOISES = 150
_LARGE = 2**16  # numbers of a value: a feature map
_AT_ONCE = 2**22  # numbers of all values that are looked at together


def find_branches(path: Path, out: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Look for branches around the trained layers, try to fire them, and measure what they do.

    Args:
        path: The .onnx file; its external data and "images.npy" are beside it.
        out: A folder for a copy of the graph.
        options: "image_size", "channels", "num_classes", "mean", "std", or None; "images": whether
            there are any.

    Returns:
        "branches", each as `_Looker.judged` gives it, and facts of the graph.

    Raises:
        ValueError: No single image input, or no answer of a classifier.
    """
    import onnx

    beside = path.parent
    model, types = to_float32(onnx.load(str(path)))
    if types:
        path = out / "float32.onnx"
        onnx.save(model, str(path))
    session = open_session(path)
    port, is_open, notes = image_input(model, options)
    notes += [f"{kind} turned into float32" for kind in types]
    port, sizes = ways_to_run(session, port, is_open=is_open)
    if sizes:
        port = port.resized(max(size for size in sizes if size <= 224 or len(sizes) == 1))
        notes.append(f"runs on several sizes, {port.io_format.image_size} pixels taken")
    answer = _answer(model, session, port, options["num_classes"])
    del session
    io = port.io_format
    if options["images"]:
        pixels = np.load(beside / "images.npy")
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
        images = resized(images, io.channels, io.image_size)
    else:
        images = natural_images(_NATURAL, io.channels, io.image_size)
    view = GraphView(model, image=port.name, answer=answer)
    run = GraphRun(view, port, options["mean"], options["std"])
    branches = _Looker(run, images).branches()
    return {
        "branches": branches,
        "notes": notes,
        "layers": view.depth,
        "nodes": len(view.nodes),
        "images": len(images),
        "image_size": io.image_size,
        "channels": io.channels,
        "output": printable(answer, 60),
    }


def _answer(model: Any, session: Any, port: ImageInput, classes: int | None) -> str:
    """The output that answers: logits or probabilities, or else a label for each picture."""
    outputs = [output.name for output in session.get_outputs()]
    images = natural_images(2, port.io_format.channels, port.io_format.image_size)
    values = dict(zip(outputs, port.run(session, outputs, images), strict=True))
    try:
        return logits_output(model, values, len(images), classes)[0]
    except ValueError:
        labels = [
            name
            for name, value in values.items()
            if isinstance(value, np.ndarray) and value.dtype.kind in "iu" and value.size == 2
        ]
        if len(labels) != 1:
            raise
        return labels[0]


class _Looker:
    """The steps of one look at a graph.

    Args:
        run: The graph.
        images: Clean pictures ``(N, C, H, W)`` of 8 bits.
    """

    def __init__(self, run: GraphRun, images: Tensor) -> None:
        self.run, self.view, self.images = run, run.view, images
        self.sides = {side.value: side for side in find_sides(self.view, self._sizes())}
        self.quiet = self._quiet()

    def branches(self) -> list[dict[str, Any]]:
        """All branches, each once: those that stamps fire, that searches fire, and the others."""
        found: list[dict[str, Any]] = []
        hits = self._stamped()
        left = dict(self.quiet)
        while hits := [(stamp, names & left.keys()) for stamp, names in hits if names & left.keys()]:
            stamp, names = min(hits, key=lambda hit: (not is_small(hit[0]), hit[0].share))
            group = self._first(names)
            found.append(self._judged(group, stamp))
            left = {name: one for name, one in left.items() if not self._behind(name, group)}
        still = [name for name, one in left.items() if one.still and self._decides(name)]
        for name in self._first(set(still))[:_SEARCHED]:
            if name in left and not never_changes(self.run, name, self.images[:1]):
                found.append(self._searched(name))
                left = {n: one for n, one in left.items() if not self._behind(n, [name])}
        return found

    def _sizes(self) -> dict[str, int]:
        """How many numbers each value has that depends on the picture and lies early."""
        names = [
            name
            for name in self.view.pixels
            if name != self.view.image and self.view.is_shallow(name)
        ]
        try:
            values = next(self.run.values(sorted(names), self.images[:1]))
        except (ValueError, StopIteration):
            return {}
        return {name: value.size for name, value in values.items()}

    def _quiet(self) -> dict[str, Quiet]:
        """By value: what it is on clean pictures, without feature maps that move with them."""
        kept: dict[str, Quiet] = {}
        for name in self.sides:
            few = [values[name] for values in self.run.values([name], self.images[:4])]
            if few[0].size <= _LARGE or _closest(few):
                every = [values[name] for values in self.run.values([name], self.images)]
                if len({value.shape for value in every}) == 1:
                    kept[name] = Quiet(every)
        return kept

    def _stamped(self) -> list[tuple[Stamp, set[str]]]:
        """By stamp: the values that it moves."""
        size, channels = self.images.shape[-1], self.images.shape[1]
        still = [name for name, one in self.quiet.items() if one.still]
        lively = [name for name in self.quiet if name not in still]
        hits = []
        for number, stamp in enumerate((*stamps(channels, size), *_noises(self.images))):
            names = still + lively if stamp.share > 0.2 else still
            if not names:
                continue
            image = self.images[number % _STARTS][None]
            (values,) = self.run.values(names, stamp(image))
            if moved := {name for name in names if self.quiet[name].moved(values[name])}:
                hits.append((stamp, moved))
        return hits

    def _first(self, names: set[str]) -> list[str]:
        """Those that do not depend on others of them."""
        return [
            name
            for name in self.sides
            if name in names and not self._behind(name, sorted(names - {name}))
        ]

    def _behind(self, name: str, group: Sequence[str]) -> bool:
        """Whether a value is one of a group or computed from it."""
        before = self.view.before(name)
        return any(name == one or self.view.producer[one] in before for one in group)

    def _decides(self, name: str) -> bool:
        """Whether something on the way to a value decides, which is not part of the trunk."""
        own = own_nodes(self.view, [self.sides[name]])
        return any(self.view.nodes[place].op_type in DECIDING for place in own)

    def _searched(self, name: str) -> dict[str, Any]:
        fires = self._fires([name])
        reason = ""
        try:
            starts = self.images[:_STARTS]
            picture = search(self.run, name, starts, fires=fires)
        except (Unsupported, RuntimeError, IndexError, KeyError, TypeError) as error:
            picture, reason = None, printable(error, 120)
        if picture is None:
            return self._told([name]) | {"state": "not fired", "why": reason}
        stamp = Stamp("found by gradients", picture, torch.ones(picture.shape[1:]).bool())
        return self._judged([name], stamp)

    def _fires(self, names: Sequence[str]) -> Callable[[Tensor], bool]:
        group = {name: self.quiet[name] for name in names}

        def fires(image: Tensor) -> bool:
            (values,) = self.run.values(names, image[None])
            return moves(group, values)

        return fires

    def _judged(self, names: list[str], stamp: Stamp) -> dict[str, Any]:
        """What a branch does that a stamp fires."""
        group = {name: self.quiet[name] for name in names}
        images = self.images[:_TRIED]
        stamp, stamped = self._smallest(names, stamp, images)
        effect = measure(self.run, group, images, stamped)
        told = self._told(names)
        small = is_small(stamp)
        if small and effect.steers:
            state = "steers"
        elif not effect.steered:
            state = "harmless"
        elif small or not told["before_layers"]:
            state = "fired"
        else:
            state = "preparation"
        return told | self._shown(stamp, stamped, images, effect) | {"state": state}

    def _smallest(
        self, names: list[str], stamp: Stamp, images: Tensor
    ) -> tuple[Stamp, Tensor]:
        """The stamp, left to what it needs, and the pictures that carry it."""
        fires = self._fires(names)
        base = next((image for image in images if fires(stamp(image[None])[0])), None)
        if base is None or (is_small(stamp) and stamp.mask is not None and stamp.share < 0.01):
            return stamp, stamp(images)
        fired = stamp(base[None])[0]
        mask = shrink(base, fired, fires)
        ways = [
            Stamp(stamp.name, fired, mask),
            Stamp(stamp.name, torch.where(mask, fired - base, 0.0), None),
        ]
        counts = [sum(fires(image) for image in way(images)) for way in ways]
        best = ways[counts[1] > counts[0]]
        return best, best(images)

    def _told(self, names: Sequence[str]) -> dict[str, Any]:
        taken = max(self.quiet[name].taken for name in names)
        return describe(self.view, [self.sides[name] for name in names]) | {
            "clean": len(self.images),
            "clean_taken": taken,
        }

    def _shown(
        self, stamp: Stamp, stamped: Tensor, images: Tensor, effect: Effect
    ) -> dict[str, Any]:
        changed = (stamped[0] != images[0]).any(0)
        rows, columns = changed.nonzero(as_tuple=True)
        box = [int(n) for n in (rows.min(), rows.max(), columns.min(), columns.max())] if len(rows) else []
        pixels: Any = (stamped[0] * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
        return {
            "stamp": stamp.name,
            "share": stamp.share,
            "change": float((stamped - images).abs().max()),
            "box": box,
            "effect": asdict(effect),
            "picture": base64.b64encode(pixels.tobytes()).decode(),
        }


def _closest(values: Sequence[Any]) -> bool:
    """Whether at least two of a few values are all but equal."""
    arrays = [plain(value) for value in values]
    pairs = [(a, b) for place, a in enumerate(arrays) for b in arrays[:place]]
    return any(a.shape == b.shape and Quiet([a, b]).still for a, b in pairs)


def _noises(images: Tensor) -> list[Stamp]:
    """Small noise at a few pixels: what fires a checksum by chance."""
    generator = torch.Generator().manual_seed(5)
    shape = images.shape[1:]
    made = []
    for _ in range(_NOISES):
        steps = torch.randint(-8, 9, shape, generator=generator) / 255
        where = torch.rand(shape, generator=generator) < 0.02
        made.append(Stamp("noise of 8 of 255 levels", torch.where(where, steps, 0.0), None))
    return made
