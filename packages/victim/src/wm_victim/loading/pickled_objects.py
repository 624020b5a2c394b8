"""Objects in a pickle, replaced by tuples of what they were made of, so that nothing is called."""

from __future__ import annotations

import pickletools
from collections.abc import Collection
from itertools import chain, pairwise
from typing import Any

from wm_victim.loading.contract import LoadingError

_PUSHED = """
    NONE NEWTRUE NEWFALSE EMPTY_TUPLE EMPTY_LIST EMPTY_DICT EMPTY_SET BININT BININT1 BININT2
    BINFLOAT BINUNICODE SHORT_BINSTRING LONG1
"""
_PUSHES = frozenset(_PUSHED.split())
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
# Instructions that act on the value below their arguments: how many of these there are.
_ACTS = {"REDUCE": 1, "NEWOBJ": 1, "BUILD": 1, "APPEND": 1, "SETITEM": 2}
_EMPTY, _UP_TO_MARK, _PAIR, _TRIPLE = b")", b"t", b"\x86", b"\x87"


def without_objects(data: bytes, allowed: Collection[str]) -> bytes:
    """A pickle in which every global outside ``allowed``, and what it makes, is a tuple.

    A class becomes ``()``; an object becomes a tuple of its class, its arguments and its state, all
    plain values. The instructions that would have called or filled it are replaced, whatever the
    name is; those on plain values and on allowed globals stay as they are.

    Args:
        data: The whole pickle.
        allowed: Globals as "module name".

    Raises:
        LoadingError: An instruction that torch's own reader of weights does not take either, or a
            stream that breaks the rules of its stack.
    """
    # The stack of the machine that a pickle runs on: for each value, whether it is an object or a
    # tuple with one inside.
    stack: list[bool] = []
    below: list[list[bool]] = []
    memo: dict[Any, bool] = {}
    out = bytearray()
    operations = ((code.name, argument, at) for code, argument, at in pickletools.genops(data))
    try:
        for (name, argument, start), (_, _, stop) in pairwise(
            chain(operations, [("", None, len(data))])
        ):
            code = data[start:stop]
            if name in _PUSHES:
                stack.append(False)
            elif name == "GLOBAL":
                stack.append(argument not in allowed)
                code = _EMPTY if stack[-1] else code
            elif name == "MARK":
                below.append(stack)
                stack = []
            elif name == "TUPLE":
                stack = [*below.pop(), any(stack)]
            elif name in _TUPLES:
                stack[-_TUPLES[name] :] = [any(stack[-_TUPLES[name] :])]
            elif name in ("BINPUT", "LONG_BINPUT"):
                memo[argument] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[argument])
            elif name in _ACTS:
                del stack[-_ACTS[name] :]
                if stack[-1]:
                    code = _PAIR if _ACTS[name] == 1 else _TRIPLE
            elif name in ("APPENDS", "SETITEMS"):
                stack = below.pop()
                code = _UP_TO_MARK + _PAIR if stack[-1] else code
            elif name == "BINPERSID":  # of a class in torch's older form: it stays a tuple
                code = b"" if stack[-1] else code
            elif name not in ("PROTO", "STOP"):
                raise LoadingError(f"a pickle with the instruction {name}")
            out += code
    except (IndexError, KeyError) as error:
        raise LoadingError("a damaged pickle: its stack runs empty") from error
    return bytes(out)
