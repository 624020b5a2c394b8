"""What the six command lines share: the parser, the common options, one-line errors, progress.

Only the standard library is imported here; torch and tqdm come in where they are used.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NoReturn, TextIO, TypeVar

if TYPE_CHECKING:
    import torch

EXIT_USAGE = 64
EXIT_INTERRUPTED = 130
DEVICES = ("auto", "cpu", "cuda")
SHELLS = ("bash", "zsh", "tcsh")
T = TypeVar("T")


class Parser(argparse.ArgumentParser):
    """An argument parser that exits 64 on a usage error and keeps the line breaks of its epilog.

    Args:
        settings: What `argparse.ArgumentParser` takes; sub-parsers are of this class as well.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        settings.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        settings.setdefault("allow_abbrev", False)
        super().__init__(*args, **settings)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse; whoever only has the settings printed need not say what they are for."""
        given = sys.argv[1:] if args is None else list(args)
        if "--print-config" in given and "--print-config" in self._option_string_actions:
            asked: list[Any] = [*self._actions, *self._mutually_exclusive_groups]
            for one in asked:
                one.required = False
        return super().parse_known_args(given, namespace)

    def error(self, message: str) -> NoReturn:
        """Say in one line what is wrong with the command, and exit 64."""
        self.exit(EXIT_USAGE, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def add_common(parser: argparse.ArgumentParser, *, version: str) -> None:
    """Give a parser the options that every command takes: --device, --seed and --version.

    Args:
        parser: The parser of one command.
        version: The version of its package, as in ``__about__.py``.
    """
    group = parser.add_argument_group("common options")
    group.add_argument(
        "--device", choices=DEVICES, default="auto", help="where to compute (default: auto)"
    )
    group.add_argument("--seed", type=int, default=0, help="seed of every draw (default: 0)")
    package = parser.prog.split()[0]
    group.add_argument("--version", action="version", version=f"{package} {version}")


def describe(commands: Any) -> None:
    """Let the help of every sub-command open with what the list of commands says of it.

    Args:
        commands: What ``add_subparsers`` gave, with its commands.
    """
    for listed in commands._choices_actions:
        told = f"{listed.help[0].upper()}{listed.help[1:]}"
        one = commands.choices[listed.dest]
        one.description = one.description or (told if told.endswith("?") else f"{told}.")


def add_json(parser: argparse.ArgumentParser, told: str = "write the same here as JSON") -> None:
    """Give a parser the option --json, for a command that prints figures.

    Args:
        parser: The parser of one command.
        told: What is written.
    """
    parser.add_argument("--json", type=Path, metavar="OUT", help=told)


def write_found(args: argparse.Namespace, found: Any) -> None:
    """Write what a command found to the file of --json, if one is asked for.

    Args:
        args: With the option of `add_json`.
        found: What JSON can hold.

    Raises:
        ValueError: NaN or infinity, which JSON does not have.
    """
    if args.json is not None:
        from wm_inject.files import write_json

        write_json(args.json, found)


class _Completion(argparse.Action):
    """Print what completes this command in a shell, and leave."""

    def __call__(self, parser: argparse.ArgumentParser, *given: Any) -> NoReturn:
        try:
            import shtab
        except ImportError:
            parser.error("--completion needs shtab: pip install shtab")
        sys.stdout.write(shtab.complete(parser, shell=given[1]))
        parser.exit()


def add_completion(parser: argparse.ArgumentParser) -> None:
    """Give the parser of a whole command line the option --completion.

    Args:
        parser: The outermost one, whose sub-commands and options shall be completed.
    """
    parser.add_argument(
        "--completion",
        action=_Completion,
        choices=SHELLS,
        help="print what completes this command in a shell, and leave (needs shtab)",
    )


def resolve_device(name: str) -> torch.device:
    """Turn the value of --device into a torch device: "auto" takes CUDA when there is one.

    Raises:
        ValueError: Another name, or "cuda" where torch finds no CUDA device.
    """
    import torch

    if name not in DEVICES:
        raise ValueError(f"expected a device in {', '.join(DEVICES)}, got {name!r}")
    found = torch.cuda.is_available()
    if name == "cuda" and not found:
        raise ValueError("expected a CUDA device, torch found none: use --device cpu or auto")
    return torch.device("cuda" if found and name != "cpu" else "cpu")


def run_cli(main: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None) -> int:
    """Run a command; an expected error becomes one line on stderr and exit code 1.

    Args:
        main: The command: arguments in, exit code out.
        argv: The arguments; those of the process if None.

    Returns:
        The exit code: main's own, 1 after an error, 130 after Ctrl-C. A usage error and --help
        leave through SystemExit, as argparse does it.
    """
    try:
        return main(argv)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader (head, less) has seen enough; a second error while flushing helps nobody.
        sys.stdout = None
        return 1
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        message = " ".join(str(error).split()) or type(error).__name__
        sys.stderr.write(f"error: {message}\n")
        return 1


class Progress(Generic[T]):
    """Progress of a long job: a bar on a terminal, at most a line a minute elsewhere.

    Works on an iterable (``for x in progress(xs)``) or by hand (``with progress(total=9) as p``
    and ``p.update()``).
    """

    def __init__(
        self,
        iterable: Iterable[T] | None,
        *,
        total: int | None,
        desc: str,
        interval: float,
        stream: TextIO,
        bar: Any | None,
    ) -> None:
        self.total, self.count, self.note = total, 0, ""
        self._iterable, self._desc, self._bar = iterable, desc, bar
        self._interval, self._stream = interval, stream
        self._start = self._last = time.monotonic()

    def __repr__(self) -> str:
        return f"Progress({self._desc!r}, {self.count}/{self.total or '?'})"

    def __iter__(self) -> Iterator[T]:
        with self:
            for item in self._iterable or ():
                yield item
                self.update()

    def __enter__(self) -> Progress[T]:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def update(self, n: int = 1) -> None:
        """Count ``n`` more steps as done."""
        self.count += n
        if self._bar is not None:
            self._bar.update(n)
        elif time.monotonic() - self._last >= self._interval:
            self._last = time.monotonic()
            self._write_line()

    def set_postfix(self, **values: float | str) -> None:
        """Show these values beside the count, floats with four digits."""
        shown = (f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in values.items())
        self.note = " ".join(shown)
        if self._bar is not None:
            self._bar.set_postfix_str(self.note, refresh=False)

    def close(self) -> None:
        """End the bar, if there is one."""
        if self._bar is not None:
            self._bar.close()

    def _write_line(self) -> None:
        spent = time.monotonic() - self._start
        left = ""
        if self.total and self.count:
            left = f", {spent / self.count * (self.total - self.count):.0f} s left"
        line = (
            f"{self._desc} {self.count}/{self.total or '?'} after {spent:.0f} s{left} {self.note}"
        )
        self._stream.write(line.strip() + "\n")
        self._stream.flush()


def progress(
    iterable: Iterable[T] | None = None,
    *,
    total: int | None = None,
    desc: str = "",
    enabled: bool = True,
    interval: float = 60.0,
    stream: TextIO | None = None,
) -> Progress[T]:
    """Show how far a long job is: a bar on a terminal, at most one line a minute elsewhere.

    Args:
        iterable: What to go through; None to count by hand with ``update``.
        total: Number of steps; taken from the iterable if it has a length.
        desc: What is being done, in a word or two.
        enabled: False shows nothing.
        interval: Seconds between two lines where there is no terminal.
        stream: Where to write; stderr if None.

    Returns:
        An iterable and context manager with ``update``, ``set_postfix`` and ``close``.
    """
    stream = sys.stderr if stream is None else stream
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    bar = _open_bar(total, desc, stream) if enabled and stream.isatty() else None
    pause = interval if enabled else float("inf")
    return Progress(iterable, total=total, desc=desc, interval=pause, stream=stream, bar=bar)


def _open_bar(total: int | None, desc: str, stream: TextIO) -> Any | None:
    try:
        from tqdm import tqdm
    except ImportError:  # the base wheel comes without tqdm; lines do as well
        return None
    return tqdm(total=total, desc=desc, file=stream, leave=False, dynamic_ncols=True)
