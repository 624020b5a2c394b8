"""Protocol-buffer fields, walked without building a message, so that no file can inflate it.

The library that parses ONNX turns a two-byte empty node into an object of a hundred bytes and
follows nesting wherever it goes. This walker keeps positions only, and counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


class ProtobufError(ValueError):
    """Bytes that are no protocol buffer, or too many fields."""


class Field(NamedTuple):
    """One field: its number, its wire type, its value if a varint, and where its bytes lie."""

    number: int
    kind: int
    value: int
    start: int
    stop: int


class Walker:
    """Walks the fields of bytes or an mmap, at most ``max_fields`` over all walks together.

    All methods raise `ProtobufError`.
    """

    def __init__(self, data: Any, *, max_fields: int = 2_000_000) -> None:
        self.data, self.left = data, max_fields

    def message(self, field: Field) -> Iterator[Field]:
        """The fields of the message in a field; ``ProtobufError`` if it holds none."""
        if field.kind != BYTES:
            raise ProtobufError("a number in place of a message")
        yield from self.fields(field.start, field.stop)

    def fields(self, start: int, stop: int) -> Iterator[Field]:
        """The fields of the message between two positions.

        Raises:
            ProtobufError: A field that is cut short or of an unknown wire type, or too many fields.
        """
        at = start
        while at < stop:
            self.left -= 1
            if self.left < 0:
                raise ProtobufError("too many fields")
            key, at = self._varint(at, stop)
            number, kind = key >> 3, key & 7
            value = 0
            if kind == VARINT:
                first = at
                value, at = self._varint(at, stop)
                yield Field(number, kind, value, first, at)
                continue
            if kind == BYTES:
                length, at = self._varint(at, stop)
            elif kind in (FIXED32, FIXED64):
                length = 4 if kind == FIXED32 else 8
            else:
                raise ProtobufError(f"a field of wire type {kind}")
            if number == 0 or length > stop - at:
                raise ProtobufError("a field that is cut short")
            yield Field(number, kind, value, at, at + length)
            at += length

    def text(self, field: Field, limit: int = 4096) -> str:
        """A field's bytes as text of at most ``limit`` bytes."""
        if field.kind != BYTES or field.stop - field.start > limit:
            raise ProtobufError(f"expected text of at most {limit} bytes")
        try:
            return bytes(self.data[field.start : field.stop]).decode()
        except UnicodeDecodeError as error:
            raise ProtobufError("text that is not UTF-8") from error

    def numbers(self, field: Field, limit: int = 64) -> list[int]:
        """A field's varints, packed or single: 1 .. ``limit`` of them."""
        if field.kind == VARINT:
            return [field.value]
        values: list[int] = []
        at = field.start
        while field.kind == BYTES and at < field.stop and len(values) <= limit:
            value, at = self._varint(at, field.stop)
            values.append(value)
        if not values or len(values) > limit:
            raise ProtobufError(f"expected 1 .. {limit} numbers")
        return values

    def _varint(self, at: int, stop: int) -> tuple[int, int]:
        value = 0
        for shift in range(0, 70, 7):
            if at >= stop:
                break
            byte = self.data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value & (2**64 - 1), at
        raise ProtobufError("a number that is cut short")
