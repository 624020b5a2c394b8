from __future__ import annotations

import argparse
import io
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from wm_inject.command.common import (
    EXIT_USAGE,
    CommandLine,
    Parser,
    add_common,
    add_completion,
    add_json,
    resolve_device,
    run_cli,
)
from wm_inject.command.values import (
    comma_list,
    image_size,
    output_file,
    output_folder,
    positive,
    within,
)
from wm_inject.core.files import atomic_path
from wm_inject.core.progress import progress
from wm_inject.core.signals import exits_on_signals


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


def refused(convert, text):
    try:
        convert(text)
    except argparse.ArgumentTypeError:
        return True
    return False


def test_numbers_in_an_interval():
    assert within(float, "(0, 1]")("1") == 1 and within(int, "[2, inf)")("2") == 2
    for kind, interval, wrong in (
        (float, "(0, 1]", ("0", "1.01", "nan", "inf", "-inf", "x", "")),
        (float, "[0, inf)", ("-1e-9", "inf", "nan")),
        (int, "[1, 8]", ("0", "9", "1.5", "nan", "1e3")),
        (int, "[0, inf)", ("-1",)),
    ):
        assert [text for text in wrong if not refused(within(kind, interval), text)] == []


def test_a_side_or_height_and_width():
    sizes = image_size("[8, 1024]")
    assert [sizes(text) for text in ("224", "48x192", "48x48")] == [224, (48, 192), 48]
    wrong = ("7", "48x", "x48", "48x1025", "48x192x3", "48 by 192", "48X192", "48.0x192", "")
    assert [text for text in wrong if not refused(sizes, text)] == []


def test_paths_that_can_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    new = tmp_path / "new" / "deep" / "out.json"
    assert output_file(str(new)) == new and output_folder(str(new)) == new
    assert output_file(str(tmp_path / "file")) == tmp_path / "file"
    below = str(tmp_path / "file" / "out.json")
    for text in (str(tmp_path), below, "/dev/null", "x" * 5000):
        assert refused(output_file, text)
    for text in (str(tmp_path / "file"), below):
        assert refused(output_folder, text)
    assert not new.parent.exists()
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert refused(output_file, str(new)) and refused(output_folder, str(new))


def test_two_options_do_not_write_one_file(tmp_path, monkeypatch, capsys):
    def run(*argv):
        line = CommandLine("wm-demo", "1", description="Demo.", epilog="examples:")
        go = line.add("go", lambda args: 0, "go there")
        go.add_argument("--csv", type=output_file)
        add_json(go)
        return line.main(["go", *argv])

    monkeypatch.chdir(tmp_path)
    assert run("--csv", "a", "--json", "b") == 0
    with pytest.raises(SystemExit) as caught:
        run("--csv", "a", "--json", str(tmp_path / "a"))
    output = capsys.readouterr().err
    assert caught.value.code == EXIT_USAGE and "--csv" in output and "--json" in output


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


def test_whatever_goes_wrong_is_one_line_and_the_exit_code_of_an_error(capsys, subtests):
    numpy_error = np._core._exceptions._ArrayMemoryError((2**50,), np.dtype("float64"))
    for error, *words in [
        (KeyError("bug"), "KeyError: 'bug'", "test_cli_common.py line"),
        (MemoryError(), "not enough memory"),
        (numpy_error, "not enough memory", "PiB"),
        (RuntimeError("[enforce] DefaultCPUAllocator: can't allocate memory: you"), "not enough"),
        (PermissionError(13, "Permission denied", "a\x1b[1m"), "a\\x1b[1m: Permission denied"),
        (ValueError("\udcff\x07"), "\\udcff\\x07"),
    ]:
        with subtests.test(error=error):

            def main(_, error=error):
                raise error

            assert run_cli(main, exit_error=3) == 3
            output = capsys.readouterr().err
            assert output.startswith("error: ") and output.count("\n") == 1
            assert all(word in output for word in words)


def test_a_signal_to_end_tidies_up(capsys, tmp_path):
    def main(_):
        with atomic_path(tmp_path / "a") as part:
            part.write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGTERM)
            raise AssertionError

    assert run_cli(main) == 128 + signal.SIGTERM
    assert capsys.readouterr().err == "terminated\n" and not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_handler_of_the_program_stays(capsys):
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with exits_on_signals():
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        assert signal.signal(signal.SIGTERM, before) == signal.SIG_IGN


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_streams_that_take_nothing_or_not_every_letter(subtests):
    code = "import sys; from wm_inject.command.common import run_cli; sys.exit(run_cli({}, 0))"
    main = "lambda _: print('\\u00e9\\udcff')"
    bad = "lambda _: 1 / 0"
    with open("/dev/full", "w") as full:
        for case, body, streams, expected in [
            ("letters", main, {}, (0, "\\xe9\\udcff\n", "")),
            ("full", main, {"stdout": full}, (1, None, "No space left on device")),
            ("full both", bad, {"stdout": full, "stderr": full}, (1, None, None)),
        ]:
            with subtests.test(case=case):
                pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
                process = subprocess.run(
                    [sys.executable, "-c", code.format(body)],
                    env={**os.environ, "PYTHONIOENCODING": "ascii"},
                    text=True,
                    **pipes,
                )
                assert (process.returncode, process.stdout) == expected[:2]
                assert process.stderr is None or expected[2] in process.stderr
                assert "Traceback" not in (process.stderr or "")
    closed = f'{sys.executable} -c "{code.format(bad)}" >&- 2>&-'
    assert subprocess.run(closed, shell=True).returncode == 1


def test_a_reader_that_is_gone_knows_and_a_full_disk_is_said(monkeypatch, capsys, subtests):
    class Stream(io.StringIO):
        def flush(self):
            raise self.error

    for error, words in [
        (BrokenPipeError(), ""),
        (OSError(28, "No space left on device"), "error: cannot write to standard output: No spa"),
    ]:
        with subtests.test(error=error), monkeypatch.context() as patch:
            stream = Stream()
            stream.error = error
            patch.setattr(sys, "stdout", stream)
            assert run_cli(lambda _: 0, [], exit_error=3) == 3
            assert sys.stdout is None
            assert capsys.readouterr().err.startswith(words)

    def gone(_):
        raise BrokenPipeError

    assert run_cli(gone, [], exit_error=3) == 3 and capsys.readouterr().err == ""


def test_an_empty_folder_of_kernels_is_removed(monkeypatch, tmp_path):
    name, folder = "TORCHINDUCTOR_CACHE_DIR", tmp_path / "kernels"
    monkeypatch.delenv(name, raising=False)

    def main(_):
        folder.mkdir()
        os.environ[name] = str(folder)

    try:
        assert run_cli(main, []) == 0 and not folder.exists()
    finally:
        os.environ.pop(name, None)
    folder.mkdir()
    monkeypatch.setenv(name, str(folder))
    assert run_cli(lambda _: 0, []) == 0 and folder.exists()


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
