"""Text from files and errors as a terminal may show it: one line, nothing that it obeys."""

from __future__ import annotations


def escape(text: object) -> str:
    r"""Text with every unprintable character, line ends included, as Python escapes it.

    Examples:
        >>> print(escape("a\n\x1b[2Jb\udcff"))
        a\n\x1b[2Jb\udcff
    """
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in str(text))


def printable(text: object, limit: int = 300) -> str:
    """Untrusted text as one printable line of at most ``limit`` characters."""
    line = escape(" ".join(str(text).split()))
    return line if len(line) <= limit else line[: limit - 3] + "..."


def first_line(error: BaseException) -> str:
    """The first line of an exception's message; its class where there is none."""
    lines = str(error).strip().splitlines()
    return printable(lines[0]) if lines else type(error).__name__
