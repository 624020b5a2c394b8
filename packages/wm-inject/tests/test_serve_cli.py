from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from wm_inject import serve
from wm_inject.cli import main
from wm_inject.serve import ServeSettings, read_token
from wm_inject.serve.settings import TOKEN_VARIABLE

TOKEN = "correct-horse-battery"


def run(*options: str) -> int:
    return main(["serve", *options])


def test_settings_have_safe_defaults():
    settings = ServeSettings()
    assert (settings.host, settings.token, settings.max_body) == ("127.0.0.1", None, 64 * 2**20)


def test_bad_settings_are_refused(subtests):
    for change, told_so in [
        ({"port": -1}, r"port in 0 \.\. 65535, got -1"),
        ({"port": 70000}, "port in"),
        ({"port": "80"}, "port in"),
        ({"port": True}, "port in"),
        ({"max_body": 0}, "max_body in"),
        ({"max_json": 0}, "max_json in"),
        ({"max_batch": 0}, "max_batch in"),
        ({"queue": 0}, "queue in"),
        ({"threads": 0}, "threads in"),
        ({"workers": 0}, "workers in"),
        ({"workers": 1.5}, "workers in"),
        ({"connections": 0}, "connections in"),
        ({"delay_ms": -1}, "delay_ms in"),
        ({"delay_ms": float("nan")}, "delay_ms in"),
        ({"request_timeout": 0}, "request_timeout in"),
        ({"infer_timeout": float("inf")}, "infer_timeout in"),
        ({"stop_timeout": "soon"}, "stop_timeout in"),
        ({"log": "some"}, "log to be all, errors or none"),
        ({"token": "short"}, "a token of 16 to 512"),
        ({"token": "with a space in the middle"}, "a token of 16 to 512"),
        ({"token": ""}, "a token of 16 to 512"),
        ({"host": "0.0.0.0"}, r"a token for a server beyond this machine \(0\.0\.0\.0\), got none"),
        ({"host": "::"}, "a token for a server beyond"),
        ({"host": "example"}, "a token for a server beyond"),
        ({"host": ""}, "a token for a server beyond"),
        ({"host": "192.168.0.1"}, "a token for a server beyond"),
    ]:
        with subtests.test(change=change, told_so=told_so):
            with pytest.raises(ValueError, match=told_so) as caught:
                ServeSettings(**change)
            assert "with a space" not in str(caught.value)


def test_this_machine_needs_no_token(subtests):
    for host in ["127.0.0.1", "127.8.9.1", "::1", "localhost"]:
        with subtests.test(host=host):
            assert ServeSettings(host=host).token is None


def test_others_need_a_token_or_a_word():
    assert ServeSettings(host="0.0.0.0", token=TOKEN)
    assert ServeSettings(host="0.0.0.0", open_to_all=True)


def test_the_token_comes_from_a_file_or_a_variable(tmp_path, monkeypatch):
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    assert read_token(None) is None
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    assert read_token(None) == TOKEN
    (tmp_path / "token").write_text("  another-correct-horse\n")
    assert read_token(tmp_path / "token") == "another-correct-horse"
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    for name, told_so in (("empty", "empty file"), ("bytes", "cannot read"), ("no", "cannot read")):
        with pytest.raises(ValueError, match=told_so):
            read_token(tmp_path / name)


def test_options_become_settings(serve_graphs, monkeypatch, tmp_path, capsys):
    seen = []
    monkeypatch.setattr(serve, "run_server", seen.append)
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    (tmp_path / "token").write_text(TOKEN)
    options = ["--host", "0.0.0.0", "--token-file", str(tmp_path / "token"), "--delay-ms", "2.5"]
    options += ["--max-batch", "8", "--workers", "2", "--queue", "99", "--log", "all"]
    models = [f"--model={name}={serve_graphs[name]}" for name in ("told", "float")]
    assert run(*models, *options) == 0
    assert capsys.readouterr().out == "stopped; 2 models served\n"
    (service,) = seen
    settings = service.settings
    assert list(service.models) == ["told", "float"] and settings.token == TOKEN
    assert (settings.delay_ms, settings.max_batch, settings.workers) == (2.5, 8, 2)
    assert (settings.queue, settings.log, settings.port) == (99, "all", 8000)


def test_a_model_is_a_name_and_a_path(capsys, subtests):
    for given in ["told", "=x", "told=", ""]:
        with subtests.test(given=given):
            with pytest.raises(SystemExit) as caught:
                run("--model", given)
            assert caught.value.code == 64 and "NAME=PATH" in capsys.readouterr().err


def test_errors_are_one_line(serve_graphs, capsys, monkeypatch):
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    told = f"told={serve_graphs['told']}"
    with pytest.raises(SystemExit):
        run("--model", told, "--model", told)
    capsys.readouterr()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for options, told_so in (
            (["--model", "a=nowhere.onnx"], "found no file"),
            (["--model", told, "--port", port], "cannot listen on 127.0.0.1"),
        ):
            assert run(*options) == 1
            err = capsys.readouterr().err
            assert err.startswith("error: ") and err.count("\n") == 1 and told_so in err


@pytest.mark.parametrize(("option", "value"), [("--host", "0.0.0.0"), ("--queue", "0")])
def test_a_setting_out_of_range_is_a_usage_error(option, value, capsys, monkeypatch):
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    with pytest.raises(SystemExit) as caught:
        run("--model", "a=nowhere.onnx", option, value)
    err = capsys.readouterr().err
    assert caught.value.code == 64 and err.count("\n") == 1 and f"argument {option}: " in err


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit):
        run("--help")
    out = capsys.readouterr().out
    assert "wm-inject serve --model wanet=wanet.onnx" in out and "--token-file" in out
    with pytest.raises(SystemExit):
        run("--model", "a=b", "--token", TOKEN)  # a token in the arguments is for all to see


def test_every_public_name_is_there():
    for name in serve.__all__:
        assert getattr(serve, name).__doc__
    assert set(serve.__all__) <= set(dir(serve))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = serve.nothing


def test_a_missing_package_names_the_extra(subtests):
    for missing in ["starlette", "uvicorn", "orjson", "prometheus_client"]:
        with subtests.test(missing=missing):
            block = f"import sys; sys.modules[{missing!r}] = None"
            code = f"{block}; from wm_inject.serve import run_server"
            done = subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, check=False
            )
            assert (
                "RuntimeError: the service needs more packages: install wm-inject[serve]"
                in done.stderr
            )
