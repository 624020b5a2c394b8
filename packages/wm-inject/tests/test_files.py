from __future__ import annotations

import errno
import os
import resource
from contextlib import contextmanager
from pathlib import Path

import pytest

from wm_inject.core import files
from wm_inject.core.files import (
    atomic_path,
    only_writer,
    write_csv,
    write_json,
    write_text,
)


def test_the_file_appears_only_at_the_end(tmp_path):
    path = tmp_path / "folder" / "a.txt"
    with atomic_path(path) as part:
        part.write_text("new")
        assert not path.exists()
        assert part.suffix == ".txt"
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


def test_a_failure_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(KeyError), atomic_path(path) as part:
        part.write_text("half")
        raise KeyError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_json_is_sorted_and_refuses_nan(tmp_path):
    write_json(tmp_path / "a.json", {"b": 1, "a": [2]})
    assert (tmp_path / "a.json").read_text() == '{\n  "a": [\n    2\n  ],\n  "b": 1\n}\n'
    with pytest.raises(ValueError):
        write_json(tmp_path / "b.json", {"a": float("nan")})
    assert not (tmp_path / "b.json").exists()


@contextmanager
def full_disk():
    """No file of this process may grow beyond 64 bytes: not pytest's own output either."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_one_line_that_names_the_file(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, 1)
    message = r"^cannot write .*a\.json: File too large$"
    with pytest.raises(OSError, match=message), full_disk():
        write_json(path, "x" * 100)
    assert path.read_text() == "1\n" and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot write .*file/a\.json: .*file is no folder"):
        write_json(tmp_path / "file" / "a.json", 1)


def test_an_error_about_another_file_is_left_alone(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "a"):
        Path("/nonexistent/source").read_bytes()


def test_names_that_are_long_or_no_utf8(tmp_path):
    long = tmp_path / f"{'x' * 250}.png"
    with atomic_path(long) as part:
        part.write_bytes(b"")
    assert long.exists() and len(list(tmp_path.iterdir())) == 1
    name = os.fsdecode(b"caf\xe9")
    write_text(tmp_path / "a.html", f"<p>{name}\r\n")
    assert (tmp_path / "a.html").read_bytes() == b"<p>caf\\udce9\r\n"
    write_csv(tmp_path / "a.csv", ["file"], [[name], ["a,b"]])
    assert (tmp_path / "a.csv").read_bytes() == b'file\r\ncaf\\udce9\r\n"a,b"\r\n'


def test_without_locks_every_writer_is_let_in(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "no locks on this file system")

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    with only_writer(tmp_path), only_writer(tmp_path):
        pass
    monkeypatch.setattr(files, "fcntl", None)
    with only_writer(tmp_path / "new"):
        assert (tmp_path / "new").is_dir()


def test_a_folder_has_one_writer_at_a_time(tmp_path):
    folder = tmp_path / "out"
    with only_writer(folder):
        with pytest.raises(OSError, match="another process is writing to"), only_writer(folder):
            pass
        (folder / "a").touch()
    with only_writer(folder):
        assert [path.name for path in folder.iterdir()] == ["a"]
