"""What the six command lines share: the parser, the common options, one-line errors.

Only the standard library is imported at the top; torch comes in where it is used.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from wm_inject.command.values import output_file, seed
from wm_inject.core.checks import check_choice
from wm_inject.core.errors import error_line
from wm_inject.core.signals import Terminated, exits_on_signals

if TYPE_CHECKING:
    import torch

EXIT_ERROR = 1
EXIT_NOT_SCANNED = 3  # of a scan, whose 1 means "backdoored"
EXIT_USAGE = 64
EXIT_INTERRUPTED = 130
DEVICES = ("auto", "cpu", "cuda")
SHELLS = ("bash", "zsh", "tcsh")


class Parser(argparse.ArgumentParser):
    """An `argparse.ArgumentParser` that exits 64 on a usage error and keeps its epilog's lines."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        settings.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        settings.setdefault("allow_abbrev", False)
        super().__init__(*args, **settings)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse; with --print-config, no other argument is required."""
        args = sys.argv[1:] if args is None else list(args)
        if "--print-config" in args and "--print-config" in self._option_string_actions:
            required: list[Any] = [*self._actions, *self._mutually_exclusive_groups]
            for action in required:
                action.required = False
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Write one line to stderr and exit with 64."""
        self.exit(EXIT_USAGE, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


class CommandLine:
    """A command with sub-commands: a parser, and a function to run for each of them.

    Args:
        prog: The command's name.
        version: The version of its package.
        description: What it is for, in a sentence.
        epilog: Examples; every sub-command shows them, unless it has its own.
    """

    def __init__(self, prog: str, version: str, *, description: str, epilog: str) -> None:
        self.version, self.epilog = version, epilog
        self.parser = Parser(prog=prog, description=description, epilog=epilog)
        self.parser.add_argument("--version", action="version", version=f"{prog} {version}")
        add_completion(self.parser)
        self._commands = self.parser.add_subparsers(
            dest="command", required=True, metavar="COMMAND"
        )

    def add(
        self,
        name: str,
        run: Callable[[argparse.Namespace], int | None],
        help: str,
        *,
        aliases: Sequence[str] = (),
        epilog: str | None = None,
        exit_error: int = EXIT_ERROR,
    ) -> Parser:
        """Add a sub-command.

        Args:
            name: Its name.
            run: Parsed arguments in, exit code out; None is 0.
            help: What it does, for the list of commands and for its own description.
            aliases: Other names.
            epilog: Examples of its own.
            exit_error: Exit code after an error.

        Returns:
            Its parser, which gets the common options when the command runs.
        """
        description = f"{help[0].upper()}{help[1:]}" + ("" if help.endswith("?") else ".")
        parser: Parser = self._commands.add_parser(
            name,
            aliases=list(aliases),
            help=help,
            description=description,
            epilog=epilog or self.epilog,
        )
        parser.set_defaults(run=run, parser=parser, exit_error=exit_error)
        return parser

    def main(self, argv: Sequence[str] | None = None) -> int:
        """Parse the arguments, run the sub-command and return its exit code."""
        prepare_streams()
        for parser in dict.fromkeys(self._commands.choices.values()):
            add_common(parser, version=self.version)
        args = self.parser.parse_args(argv)
        _refuse_shared_outputs(args)
        return run_cli(args.run, args, exit_error=args.exit_error)


def _refuse_shared_outputs(args: argparse.Namespace) -> None:
    """Exit with a usage error if two options name one file to write."""
    names: dict[Path, str] = {}
    for action in args.parser._actions:
        path = getattr(args, action.dest, None)
        if action.type is output_file and path is not None:
            name = action.option_strings[0] if action.option_strings else action.metavar
            if (other := names.setdefault(path.absolute(), name)) != name:
                args.parser.error(f"{other} and {name} name one file, {path}")


def add_common(parser: argparse.ArgumentParser, *, version: str) -> None:
    """Give the parser of a command the options --device, --seed and --version."""
    group = parser.add_argument_group("common options")
    group.add_argument(
        "--device", choices=DEVICES, default="auto", help="where to compute (default: auto)"
    )
    # A command with a settings file takes its seed from there.
    default = None if "--print-config" in parser._option_string_actions else 0
    group.add_argument("--seed", type=seed, default=default, help="seed of every draw (default: 0)")
    package = parser.prog.split()[0]
    group.add_argument("--version", action="version", version=f"{package} {version}")


def add_json(
    parser: argparse.ArgumentParser, help: str = "write the printed figures here as JSON"
) -> None:
    """Give the parser of a command that prints figures the option --json."""
    parser.add_argument("--json", type=output_file, metavar="OUT", help=help)


def write_results(args: argparse.Namespace, results: Any) -> None:
    """Write results to the file of --json, if it was given.

    Raises:
        ValueError: NaN or infinity, which JSON does not have.
    """
    if args.json is not None:
        from wm_inject.core.files import write_json

        write_json(args.json, results)


class _Completion(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *given: Any) -> NoReturn:
        try:
            import shtab
        except ImportError:
            parser.error("--completion needs shtab: pip install shtab")
        sys.stdout.write(shtab.complete(parser, shell=given[1]))
        parser.exit()


def add_completion(parser: argparse.ArgumentParser) -> None:
    """Give the outermost parser of a command the option --completion."""
    parser.add_argument(
        "--completion",
        action=_Completion,
        choices=SHELLS,
        help="print the completion script of a shell and exit (needs shtab)",
    )


def resolve_device(name: str) -> torch.device:
    """The torch device of --device: "auto" takes CUDA when there is one.

    Raises:
        ValueError: Another name, or "cuda" where torch finds no CUDA device.
    """
    import torch

    check_choice("a device", name, DEVICES)
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ValueError("expected a CUDA device, torch found none: use --device cpu or auto")
    return torch.device("cuda" if available and name != "cpu" else "cpu")


def run_cli(
    main: Callable[[Any], int | None], arguments: Any = None, *, exit_error: int = EXIT_ERROR
) -> int:
    """Run a command; whatever goes wrong becomes one line on stderr.

    Args:
        main: The command: arguments in, exit code out; None is 0.
        arguments: What it is called with.
        exit_error: The exit code after an error.

    Returns:
        main's exit code, ``exit_error`` after any exception, 130 after Ctrl-C, 143 after SIGTERM.
    """
    prepare_streams()
    line = ""
    try:
        with exits_on_signals(), _without_empty_cache():
            code = main(arguments) or 0
    except KeyboardInterrupt:
        line, code = "interrupted", EXIT_INTERRUPTED
    except Terminated as end:
        line, code = "terminated", end.exit_code
    except BrokenPipeError:  # the reader is gone, and knows
        code = exit_error
    except Exception as error:
        line, code = f"error: {error_line(error)}", exit_error
    try:
        sys.stdout.flush()
    except OSError as error:
        code = exit_error
        sys.stdout = None  # or Python flushes it again, and ends with a code of its own
        if not isinstance(error, BrokenPipeError):
            line = f"error: cannot write to standard output: {error.strerror}"
    with contextlib.suppress(OSError):
        sys.stderr.write(f"{line}\n" if line else "")
    return code


@contextlib.contextmanager
def _without_empty_cache() -> Iterator[None]:
    """Remove the folder of compiled kernels that torch makes with any optimiser, if it is empty."""
    name = "TORCHINDUCTOR_CACHE_DIR"  # torch sets it when it makes the folder
    of_user = name in os.environ
    try:
        yield
    finally:
        if not of_user and name in os.environ:
            with contextlib.suppress(OSError):
                os.rmdir(os.environ[name])


def prepare_streams() -> None:
    """Let stdout and stderr take every character in any locale, and closed ones swallow.

    What Pillow has to say of a file is left out: the command says it in a line of its own.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
