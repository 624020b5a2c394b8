"""A pickle's instructions, listed without running one."""

from __future__ import annotations

import pickletools

_MAX_OPCODES = 1_000_000
_STORAGES = ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
# What torch writes into a dictionary of tensors, and nothing else.
ALLOWED_GLOBALS = frozenset(
    {
        "collections OrderedDict",
        "torch._utils _rebuild_tensor_v2",
        "torch._utils _rebuild_parameter",
        "torch Size",
        *(f"torch {name}Storage" for name in _STORAGES),
    }
)
# Those that name a class in a way of their own, or start code without naming a global.
_REFUSED_OPCODES = frozenset({"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ_EX", "PERSID"})
_REFUSED_OPCODES |= {"EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "READONLY_BUFFER"}


class BadPickle(ValueError):
    """A pickle that is damaged or asks for more than weights; says why."""


def check_pickle(data: bytes) -> None:
    """Refuse a pickle that would do anything but describe tensors.

    Args:
        data: The whole pickle.

    Raises:
        BadPickle: Another global than those of a dictionary of tensors, an unusual instruction,
            too many instructions, bytes behind the end, or no pickle.
    """
    wanted: dict[str, None] = {}
    count, end = 0, -1
    try:
        for opcode, argument, position in pickletools.genops(data):
            count += 1
            if count > _MAX_OPCODES:
                raise BadPickle(f"a pickle of more than {_MAX_OPCODES} instructions")
            if opcode.name == "GLOBAL":
                wanted[str(argument)] = None
            elif opcode.name in _REFUSED_OPCODES:
                raise BadPickle(f"a pickle with the instruction {opcode.name}")
            end = position or 0
    except BadPickle:
        raise
    # pickletools raises whatever its readers meet in a damaged stream.
    except Exception as error:
        raise BadPickle(f"a damaged pickle: {error}") from error
    odd = [name.replace(" ", ".") for name in wanted if name not in ALLOWED_GLOBALS]
    if odd:
        more = f" and {len(odd) - 4} more" if len(odd) > 4 else ""
        raise BadPickle(f"its pickle asks for code: {', '.join(odd[:4])}{more}")
    if end != len(data) - 1:
        raise BadPickle("a pickle with bytes behind its end")
