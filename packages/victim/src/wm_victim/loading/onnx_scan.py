"""A scan of an ONNX file's bytes: what it holds, and whether it may be parsed at all."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from wm_victim.loading.contract import Limits, LoadingError
from wm_victim.loading.onnx_operators import refuse_foreign, refuse_operators
from wm_victim.loading.protobuf import BYTES, Field, ProtobufError, Walker

_WIDTHS = {1: 4, 2: 1, 3: 1, 4: 2, 5: 2, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 12: 4, 13: 8, 16: 2}
_STRING = 8
_STANDARD = ("", "ai.onnx")
_EXTERNAL_KEYS = {"location", "offset", "length", "checksum"}
_TYPED_DATA = {4: 4, 5: 1, 7: 1, 10: 8, 11: 1}  # field -> least bytes that one number takes


@dataclass
class _Function:
    nodes: int = 0
    calls: Counter[tuple[str, str]] = field(default_factory=Counter)


@dataclass
class OnnxScan:
    """Operators by (domain, name), external files, opset, number of functions."""

    ops: Counter[tuple[str, str]] = field(default_factory=Counter)
    external: dict[str, int] = field(default_factory=dict)  # file name -> bytes it must have
    opset: int = 0
    functions: int = 0
    nested: Counter[str] = field(default_factory=Counter)  # operators that hold a graph


def scan_onnx(data: Any, limits: Limits, *, runs_only: bool = False) -> OnnxScan:
    """Check an ONNX file without the ONNX library: sizes, names, operators, nesting.

    Args:
        data: The whole file, as bytes or an mmap.
        limits: How many nodes and tensors, and how many bytes in all.
        runs_only: It will only be run by ONNX Runtime, in the sandbox: control flow and operators
            that the importer does not know are taken.

    Raises:
        LoadingError: No ONNX model; operators outside the standard ones; control flow; functions
            that call themselves or expand to too many nodes; a tensor whose shape does not fit its
            bytes; external data that is not a plain name beside the file.
    """
    try:
        return _Scanner(data, limits, runs_only).run()
    except ProtobufError as error:
        raise LoadingError(f"no ONNX model, or a damaged one: {error}") from error


class _Scanner:
    def __init__(self, data: Any, limits: Limits, runs_only: bool) -> None:
        self.runs_only = runs_only
        self.walker, self.data, self.limits = Walker(data), data, limits
        self.scan = OnnxScan()
        self.functions: dict[tuple[str, str], _Function] = {}
        self.tensors, self.bytes, self.graphs = 0, 0, 0

    def run(self) -> OnnxScan:
        main = _Function()
        for item in self.walker.fields(0, len(self.data)):
            if item.number == 7:
                self.graphs += 1
                self._graph(item, main, depth=0)
            elif item.number == 8:
                self._opset(item)
            elif item.number == 25:
                self._function(item)
            elif item.number == 20:
                raise LoadingError("training information in the file")
        if self.graphs != 1:
            raise LoadingError(f"no ONNX model: {self.graphs} graphs at its top, expected 1")
        if self.scan.opset == 0:
            raise LoadingError("no ONNX model: it imports no version of the standard operators")
        if not main.nodes:
            raise LoadingError("a graph without a node")
        self._expand(main)
        self.scan.functions = len(self.functions)
        if self.runs_only:
            refuse_foreign(self.scan.ops, set(self.functions))
        else:
            refuse_operators(self.scan.ops, self.scan.nested, set(self.functions))
        return self.scan

    def _opset(self, message: Field) -> None:
        domain, version = "", 0
        for item in self.walker.message(message):
            if item.number == 1:
                domain = self.walker.text(item)
            elif item.number == 2:
                version = item.value
        if domain in _STANDARD:
            self.scan.opset = version
            if not 7 <= version <= 30:
                raise LoadingError(f"opset {version}, expected 7 .. 30: export it anew")

    def _graph(self, message: Field, function: _Function, depth: int) -> None:
        if depth > 8:
            raise LoadingError("graphs nested more than 8 deep")
        for item in self.walker.message(message):
            if item.number == 1:
                self._node(item, function, depth)
            elif item.number == 5:
                self._tensor(item)
            elif item.number == 15:
                raise LoadingError("sparse tensors")

    def _node(self, message: Field, function: _Function, depth: int) -> None:
        kind, domain, graphs = "", "", 0
        function.nodes += 1
        if function.nodes > self.limits.max_nodes:
            raise LoadingError(f"more than {self.limits.max_nodes} nodes")
        for item in self.walker.message(message):
            if item.number == 4:
                kind = self.walker.text(item)
            elif item.number == 7:
                domain = self.walker.text(item)
            elif item.number == 5:
                graphs += self._attribute(item, function, depth)
        domain = "" if domain in _STANDARD else domain
        self.scan.ops[domain, kind] += 1
        function.calls[domain, kind] += 1
        if graphs:
            self.scan.nested[kind] += 1

    def _attribute(self, message: Field, function: _Function, depth: int) -> int:
        graphs = 0
        for item in self.walker.message(message):
            if item.number in (5, 10):
                self._tensor(item)
            elif item.number in (6, 11):
                graphs += 1
                self._graph(item, function, depth + 1)
            elif item.number in (22, 23):
                raise LoadingError("sparse tensors")
        return graphs

    def _function(self, message: Field) -> None:
        name, domain, function = "", "", _Function()
        for item in self.walker.message(message):
            if item.number == 1:
                name = self.walker.text(item)
            elif item.number == 10:
                domain = self.walker.text(item)
            elif item.number == 7:
                self._node(item, function, depth=0)
            elif item.number == 11:
                self._attribute(item, function, depth=0)
            elif item.number == 13:
                raise LoadingError("functions with overloads")
        if domain in _STANDARD or (domain, name) in self.functions:
            raise LoadingError(f"a function that takes the place of {name!r}")
        self.functions[domain, name] = function
        if len(self.functions) > self.limits.max_nodes:
            raise LoadingError("too many functions")

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
                    raise LoadingError(f"a function that calls itself, {called[1]!r}")
                if len(above) > 32:
                    raise LoadingError("functions nested more than 32 deep")
                if called not in sizes:
                    sizes[called] = size(inner, (*above, called))
                total += times * sizes[called]
            return total

        total = size(main, ())
        if total > self.limits.max_nodes:
            raise LoadingError(
                f"functions that expand to {total} nodes, over {self.limits.max_nodes}"
            )

    def _tensor(self, message: Field) -> None:
        """Check a tensor's shape against its bytes."""
        dims: list[int] = []
        dtype, raw, typed, external, entries = 0, -1, 0, False, {}
        for item in self.walker.message(message):
            if item.number == 1:
                dims += self.walker.numbers(item)
            elif item.number == 2:
                dtype = item.value
            elif item.number == 9:
                raw = item.stop - item.start
            elif item.number in _TYPED_DATA:
                least = _TYPED_DATA[item.number]
                typed += (item.stop - item.start) // least if item.kind == BYTES else 1
            elif item.number == 13:
                key, value = self._entry(item)
                entries[key] = value
            elif item.number == 14:
                external = item.value == 1
        self.tensors += 1
        if self.tensors > self.limits.max_tensors:
            raise LoadingError(f"more than {self.limits.max_tensors} tensors")
        if dtype == _STRING or dtype not in _WIDTHS:
            raise LoadingError(f"a tensor of element type {dtype}, which is no plain number")
        if len(dims) > 16 or any(n >= 2**63 for n in dims):
            raise LoadingError(f"a tensor of shape {[n - (n >> 63) * 2**64 for n in dims[:16]]}")
        count = math.prod(dims)
        need = count * _WIDTHS[dtype]
        self.bytes += need
        if self.bytes > self.limits.max_bytes:
            raise LoadingError(
                f"tensors that claim {self.bytes} bytes, over {self.limits.max_bytes}"
            )
        if external:
            self._external(entries, need)
        elif entries:
            raise LoadingError("a tensor with external entries that says it is not external")
        elif raw >= 0 and (raw != need or typed):
            raise LoadingError(f"a tensor of shape {dims} that has {raw} bytes instead of {need}")
        elif raw < 0 and typed < (count if dtype != 16 else 0):
            raise LoadingError(f"a tensor of shape {dims} that has too few numbers")

    def _entry(self, message: Field) -> tuple[str, str]:
        key, value = "", ""
        for item in self.walker.message(message):
            if item.number == 1:
                key = self.walker.text(item)
            elif item.number == 2:
                value = self.walker.text(item)
        return key, value

    def _external(self, entries: dict[str, str], need: int) -> None:
        unknown = sorted(set(entries) - _EXTERNAL_KEYS)
        if unknown:
            raise LoadingError(f"external data with the unknown key {unknown[0]!r}")
        name = entries.get("location", "")
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name:
            raise LoadingError(f"external data outside the model's folder, at {name!r}")
        if not name or path.name != name or not name.isprintable() or name == ".":
            raise LoadingError(f"external data at {name!r}, expected a file beside the model")
        numbers = [entries.get("offset", "0"), entries.get("length", str(need))]
        if not all(text.isascii() and text.isdigit() and len(text) < 16 for text in numbers):
            raise LoadingError(f"external data at offset and length {numbers[0]!r}, {numbers[1]!r}")
        offset, length = map(int, numbers)
        if length != need:
            raise LoadingError(f"external data of {length} bytes for a tensor of {need}")
        self.scan.external[name] = max(self.scan.external.get(name, 0), offset + length)
