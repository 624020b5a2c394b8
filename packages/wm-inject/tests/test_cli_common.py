from __future__ import annotations

import io
import sys

import pytest
import torch

from wm_inject.command.common import (
    EXIT_USAGE,
    Parser,
    add_common,
    add_completion,
    comma_list,
    positive,
    resolve_device,
    run_cli,
)
from wm_inject.core.progress import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def parser() -> Parser:
    built = Parser(prog="wm-demo", epilog="examples:\n  wm-demo go")
    commands = built.add_subparsers(dest="command", required=True)
    add_common(commands.add_parser("go"), version="1.2.3")
    return built


def test_usage_errors_exit_64_with_one_line(capsys, subtests):
    for arguments in [
        [],
        ["stop"],
        ["go", "--seed", "x"],
        ["go", "--device", "tpu"],
        ["go", "--see", "1"],
    ]:
        with subtests.test(arguments=arguments):
            with pytest.raises(SystemExit) as caught:
                parser().parse_args(arguments)
            assert caught.value.code == EXIT_USAGE
            assert capsys.readouterr().err.count("\n") == 1


def test_common_options_have_defaults():
    args = parser().parse_args(["go"])
    assert (args.device, args.seed) == ("auto", 0)


def test_version_and_help(capsys):
    with pytest.raises(SystemExit) as caught:
        parser().parse_args(["go", "--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == "wm-demo 1.2.3\n"
    with pytest.raises(SystemExit):
        parser().parse_args(["--help"])
    assert "examples:\n  wm-demo go" in capsys.readouterr().out


def test_a_shell_can_complete_the_whole_command(capsys, monkeypatch):
    pytest.importorskip("shtab", reason="shtab is not installed")
    built = Parser(prog="wm-demo")
    add_completion(built)
    go = built.add_subparsers(dest="command").add_parser("go", help="go there")
    add_common(go, version="1.2.3")
    with pytest.raises(SystemExit) as caught:
        built.parse_args(["--completion", "bash"])
    said = capsys.readouterr().out
    assert caught.value.code == 0 and "--device" in said and "complete -o" in said
    monkeypatch.setitem(sys.modules, "shtab", None)
    with pytest.raises(SystemExit) as caught:
        built.parse_args(["--completion", "bash"])
    assert caught.value.code == EXIT_USAGE
    assert "pip install shtab" in capsys.readouterr().err


def test_types_of_options(capsys):
    built = Parser(prog="wm-demo")
    built.add_argument("--minutes", type=positive)
    built.add_argument("--mean", type=comma_list(float))
    args = built.parse_args(["--minutes", "0.5", "--mean", "0.25, 1"])
    assert (args.minutes, args.mean) == (0.5, (0.25, 1.0))
    for option, value in (("--minutes", "0"), ("--minutes", "soon"), ("--mean", "a,b")):
        with pytest.raises(SystemExit) as caught:
            built.parse_args([option, value])
        assert caught.value.code == EXIT_USAGE
        assert f"argument {option}: expected" in capsys.readouterr().err


def test_resolve_device():
    assert resolve_device("cpu") == torch.device("cpu")
    found = "cuda" if torch.cuda.is_available() else "cpu"
    assert resolve_device("auto").type == found
    with pytest.raises(ValueError, match="expected a device in auto, cpu, cuda"):
        resolve_device("tpu")


def test_cuda_is_refused_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="use --device cpu"):
        resolve_device("cuda")


def test_an_expected_error_becomes_one_line(capsys, subtests):
    for error in [ValueError("a\n  b"), OSError("a b"), RuntimeError("a b"), ImportError("a b")]:
        with subtests.test(error=error):

            def main(_, error=error):
                raise error

            assert run_cli(main, []) == 1
            assert capsys.readouterr().err == "error: a b\n"


def test_a_bug_keeps_its_traceback():
    def main(_):
        raise KeyError("bug")

    with pytest.raises(KeyError):
        run_cli(main, [])


def test_run_cli_passes_arguments_and_code():
    assert run_cli(lambda argv: len(argv or ()), ["a", "b"]) == 2


def test_interrupt_is_130(capsys):
    def main(_):
        raise KeyboardInterrupt

    assert run_cli(main, []) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_progress_is_silent_for_a_short_job_elsewhere():
    out = io.StringIO()
    assert list(progress([1, 2, 3], desc="work", stream=out)) == [1, 2, 3]
    assert out.getvalue() == ""


def test_progress_writes_lines_no_faster_than_its_interval():
    out = io.StringIO()
    with progress(total=3, desc="work", interval=0, stream=out) as bar:
        bar.set_postfix(loss=0.12345)
        bar.update()
        bar.update(2)
    lines = out.getvalue().splitlines()
    assert lines[0].startswith("work 1/3") and lines[0].endswith("loss=0.1235")
    assert lines[1].startswith("work 3/3") and len(lines) == 2


def test_progress_draws_a_bar_on_a_terminal():
    out = Terminal()
    assert len(list(progress(range(3), desc="work", stream=out))) == 3
    assert "work" in out.getvalue() and "\r" in out.getvalue()


def test_progress_can_be_switched_off():
    out = Terminal()
    assert len(list(progress(range(3), enabled=False, interval=0, stream=out))) == 3
    assert out.getvalue() == ""


def test_progress_knows_a_length_and_does_without_one():
    assert progress(range(4)).total == 4
    assert list(progress(iter("ab"))) == ["a", "b"]
    assert "0/?" in repr(progress(iter("ab"), desc="x"))
