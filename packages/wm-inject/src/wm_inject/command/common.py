"""What the six command lines share: the parser, the common options, one-line errors.

Only the standard library is imported here; torch comes in where it is used.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import torch

EXIT_USAGE = 64
EXIT_INTERRUPTED = 130
DEVICES = ("auto", "cpu", "cuda")
SHELLS = ("bash", "zsh", "tcsh")


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
        from wm_inject.core.files import write_json

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
