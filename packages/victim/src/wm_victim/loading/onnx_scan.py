"""What an ONNX file holds, and whether it may be parsed at all: a scan of its bytes."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from wm_victim.loading.onnx_ops import refuse_operators
from wm_victim.loading.opened import Limits
from wm_victim.loading.wire import BYTES, BadWire, Field, Walker

_WIDTHS = {1: 4, 2: 1, 3: 1, 4: 2, 5: 2, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 12: 4, 13: 8, 16: 2}
_STRING = 8
_STANDARD = ("", "ai.onnx")
_EXTERNAL_KEYS = {"location", "offset", "length", "checksum"}
_TYPED_DATA = {4: 4, 5: 1, 7: 1, 10: 8, 11: 1}  # field -> least bytes that one number takes


class BadGraph(ValueError):
    """An ONNX file that is damaged, unsupported or made to deceive; says why."""


@dataclass
class _Function:
    nodes: int = 0
    calls: Counter[tuple[str, str]] = field(default_factory=Counter)


@dataclass
class OnnxScan:
    """What a scan found: operators by (domain, name), external files, opset, functions."""

    ops: Counter[tuple[str, str]] = field(default_factory=Counter)
    external: dict[str, int] = field(default_factory=dict)  # file name -> bytes it must have
    opset: int = 0
    functions: int = 0
    nested: Counter[str] = field(default_factory=Counter)  # operators that hold a graph


def scan_onnx(data: Any, limits: Limits) -> OnnxScan:
    """Check an ONNX file without the ONNX library: sizes, names, operators, nesting.

    Args:
        data: The whole file, as bytes or an mmap.
        limits: How many nodes and tensors, and how many bytes in all.

    Raises:
        BadGraph: No ONNX model; operators outside the standard ones; control flow; functions that
            call themselves or expand to too many nodes; a tensor whose shape does not fit its
            bytes; external data that is not a plain name beside the file.
    """
    try:
        return _Scanner(data, limits).run()
    except BadWire as error:
        raise BadGraph(f"no ONNX model, or a damaged one: {error}") from error


class _Scanner:
    def __init__(self, data: Any, limits: Limits) -> None:
        self.walker, self.data, self.limits = Walker(data), data, limits
        self.found = OnnxScan()
        self.functions: dict[tuple[str, str], _Function] = {}
        self.tensors, self.bytes, self.graphs = 0, 0, 0

    def run(self) -> OnnxScan:
        main = _Function()
        for one in self.walker.fields(0, len(self.data)):
            if one.number in (7, 8, 25) and one.kind != BYTES:
                raise BadWire("a graph that is no message")
            if one.number == 7:
                self.graphs += 1
                self._graph(one, main, depth=0)
            elif one.number == 8:
                self._opset(one)
            elif one.number == 25:
                self._function(one)
            elif one.number == 20:
                raise BadGraph("training information in the file")
        if self.graphs != 1:
            raise BadGraph(f"no ONNX model: {self.graphs} graphs at its top, expected 1")
        if self.found.opset == 0:
            raise BadGraph("no ONNX model: it imports no version of the standard operators")
        if not main.nodes:
            raise BadGraph("a graph without a node")
        self._expand(main)
        self.found.functions = len(self.functions)
        refuse_operators(self.found.ops, self.found.nested, set(self.functions), BadGraph)
        return self.found

    def _opset(self, where: Field) -> None:
        domain, version = "", 0
        for one in self.walker.fields(where.start, where.stop):
            if one.number == 1:
                domain = self.walker.text(one)
            elif one.number == 2:
                version = one.value
        if domain in _STANDARD:
            self.found.opset = version
            if not 7 <= version <= 30:
                raise BadGraph(f"opset {version}, expected 7 .. 30: export it anew")

    def _graph(self, where: Field, function: _Function, depth: int) -> None:
        if depth > 8:
            raise BadGraph("graphs nested more than 8 deep")
        for one in self.walker.fields(where.start, where.stop):
            if one.number in (1, 5) and one.kind != BYTES:
                raise BadWire("a node or tensor that is no message")
            if one.number == 1:
                self._node(one, function, depth)
            elif one.number == 5:
                self._tensor(one)
            elif one.number == 15:
                raise BadGraph("sparse tensors")

    def _node(self, where: Field, function: _Function, depth: int) -> None:
        kind, domain, graphs = "", "", 0
        function.nodes += 1
        if function.nodes > self.limits.max_nodes:
            raise BadGraph(f"more than {self.limits.max_nodes} nodes")
        for one in self.walker.fields(where.start, where.stop):
            if one.number == 4:
                kind = self.walker.text(one)
            elif one.number == 7:
                domain = self.walker.text(one)
            elif one.number == 5:
                graphs += self._attribute(one, function, depth)
        domain = "" if domain in _STANDARD else domain
        self.found.ops[domain, kind] += 1
        function.calls[domain, kind] += 1
        if graphs:
            self.found.nested[kind] += 1

    def _attribute(self, where: Field, function: _Function, depth: int) -> int:
        graphs = 0
        if where.kind != BYTES:
            raise BadWire("an attribute that is no message")
        for one in self.walker.fields(where.start, where.stop):
            if one.number in (5, 10):
                self._tensor(one)
            elif one.number in (6, 11):
                if one.kind != BYTES:
                    raise BadWire("a graph that is no message")
                graphs += 1
                self._graph(one, function, depth + 1)
            elif one.number in (22, 23):
                raise BadGraph("sparse tensors")
        return graphs

    def _function(self, where: Field) -> None:
        name, domain, function = "", "", _Function()
        for one in self.walker.fields(where.start, where.stop):
            if one.number == 1:
                name = self.walker.text(one)
            elif one.number == 10:
                domain = self.walker.text(one)
            elif one.number == 7:
                self._node(one, function, depth=0)
            elif one.number == 11:
                self._attribute(one, function, depth=0)
            elif one.number == 13:
                raise BadGraph("functions with overloads")
        if domain in _STANDARD or (domain, name) in self.functions:
            raise BadGraph(f"a function that takes the place of {name!r}")
        self.functions[domain, name] = function
        if len(self.functions) > self.limits.max_nodes:
            raise BadGraph("too many functions")

    def _expand(self, main: _Function) -> None:
        """The number of nodes when every call is replaced by what it calls."""
        sizes: dict[tuple[str, str], int] = {}

        def size(function: _Function, above: tuple[tuple[str, str], ...]) -> int:
            total = 0
            for called, times in function.calls.items():
                inner = self.functions.get(called)
                if inner is None:
                    total += times
                    continue
                if called in above:
                    raise BadGraph(f"a function that calls itself, {called[1]!r}")
                if len(above) > 32:
                    raise BadGraph("functions nested more than 32 deep")
                if called not in sizes:
                    sizes[called] = size(inner, (*above, called))
                total += times * sizes[called]
            return total

        total = size(main, ())
        if total > self.limits.max_nodes:
            raise BadGraph(f"functions that expand to {total} nodes, over {self.limits.max_nodes}")

    def _tensor(self, where: Field) -> None:
        """A tensor's shape must agree with the bytes that stand for it."""
        dims: list[int] = []
        dtype, raw, typed, external, entries = 0, -1, 0, False, {}
        if where.kind != BYTES:
            raise BadWire("a tensor that is no message")
        for one in self.walker.fields(where.start, where.stop):
            if one.number == 1:
                dims += self.walker.numbers(one)
            elif one.number == 2:
                dtype = one.value
            elif one.number == 9:
                raw = one.stop - one.start
            elif one.number in _TYPED_DATA:
                least = _TYPED_DATA[one.number]
                typed += (one.stop - one.start) // least if one.kind == BYTES else 1
            elif one.number == 13:
                key, value = self._entry(one)
                entries[key] = value
            elif one.number == 14:
                external = one.value == 1
        self.tensors += 1
        if self.tensors > self.limits.max_tensors:
            raise BadGraph(f"more than {self.limits.max_tensors} tensors")
        if dtype == _STRING or dtype not in _WIDTHS:
            raise BadGraph(f"a tensor of element type {dtype}, which is no plain number")
        if len(dims) > 16 or any(n >= 2**63 for n in dims):
            raise BadGraph(f"a tensor of shape {[n - (n >> 63) * 2**64 for n in dims[:16]]}")
        count = math.prod(dims)
        need = count * _WIDTHS[dtype]
        self.bytes += need
        if self.bytes > self.limits.max_bytes:
            raise BadGraph(f"tensors that claim {self.bytes} bytes, over {self.limits.max_bytes}")
        if external:
            self._external(entries, need)
        elif entries:
            raise BadGraph("a tensor with a place outside that says it lies inside")
        elif raw >= 0 and (raw != need or typed):
            raise BadGraph(f"a tensor of shape {dims} that has {raw} bytes instead of {need}")
        elif raw < 0 and typed < (count if dtype != 16 else 0):
            raise BadGraph(f"a tensor of shape {dims} that has too few numbers")

    def _entry(self, where: Field) -> tuple[str, str]:
        key, value = "", ""
        for one in self.walker.fields(where.start, where.stop):
            if one.number == 1:
                key = self.walker.text(one)
            elif one.number == 2:
                value = self.walker.text(one)
        return key, value

    def _external(self, entries: dict[str, str], need: int) -> None:
        odd = sorted(set(entries) - _EXTERNAL_KEYS)
        if odd:
            raise BadGraph(f"external data with the unknown key {odd[0]!r}")
        name = entries.get("location", "")
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name:
            raise BadGraph(f"external data outside the model's folder, at {name!r}")
        if not name or path.name != name or not name.isprintable() or name == ".":
            raise BadGraph(f"external data at {name!r}, expected a file beside the model")
        numbers = [entries.get("offset", "0"), entries.get("length", str(need))]
        if not all(text.isascii() and text.isdigit() and len(text) < 16 for text in numbers):
            raise BadGraph(f"external data at the place {numbers[0]!r}, {numbers[1]!r}")
        offset, length = map(int, numbers)
        if length != need:
            raise BadGraph(f"external data of {length} bytes for a tensor of {need}")
        self.found.external[name] = max(self.found.external.get(name, 0), offset + length)
