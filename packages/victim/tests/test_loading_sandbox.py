"""The child's bonds hold: tried from inside, without torch, so that every run can afford it."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import wm_victim.loading.child_process as child_process
from wm_victim.loading import Limits, LoadingError, open_model
from wm_victim.loading.child_process import run_child, sandboxed
from wm_victim.loading.graphs import _forbidden_call
from wm_victim.loading.regular_files import read_regular_file

from .hostile_models import SCRIPT, acts_at_load, writes_a_file_at_forward

needs_landlock = pytest.mark.skipif(not sandboxed(), reason="this kernel has no Landlock")
_PROBE = """
import json, os, runpy, socket, sys
settings = json.loads(sys.argv[1])
sandbox = runpy.run_path(settings["sandbox"])
restrictions = sandbox["restrict_process"](settings)
os.makedirs(settings["scratch"], exist_ok=True)

def tried(action):
    try:
        action()
    except MemoryError:
        return "memory"
    except OSError as error:
        return error.strerror
    return "done"

def write(path):
    with open(path, "w") as file:
        file.write("x")

outside, inside = settings["outside"], settings["scratch"]
results = {
    "write outside": tried(lambda: write(outside + "/marker")),
    "truncate outside": tried(lambda: write(outside + "/kept")),
    "read outside": tried(lambda: open(outside + "/kept").read()),
    "read /etc": tried(lambda: open("/etc/passwd").read()),
    "link in": tried(lambda: os.link(outside + "/kept", inside + "/link")),
    "symlink": tried(lambda: os.symlink(outside, inside + "/symlink")),
    "write given": tried(lambda: write(settings["input"] + "/model")),
    "socket": tried(lambda: socket.socket()),
    "fork": tried(lambda: os.fork()),
    "program": tried(lambda: os.execv("/bin/true", ["true"])),
    "kill": tried(lambda: os.kill(settings["pid"], 0)),
    "memory": tried(lambda: bytearray(2 << 30)),
    "write inside": tried(lambda: write(inside + "/result")),
    "read given": tried(lambda: open(settings["input"] + "/model").read()),
}
print(json.dumps({"restrictions": restrictions, "results": results}))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("in", "out", "outside"):
        (tmp_path / name).mkdir()
    (tmp_path / "in" / "model").write_text("model")
    (tmp_path / "outside" / "kept").write_text("kept")
    return tmp_path


def probe(folder: Path, code: str = _PROBE) -> subprocess.CompletedProcess[str]:
    settings = {
        "sandbox": str(Path(child_process.__file__).with_name("sandbox.py")),
        "input": str(folder / "in"),
        "scratch": str(folder / "out"),
        "outside": str(folder / "outside"),
        "memory": 256 * 2**20,
        "seconds": 0.5,
        "file_bytes": 2**20,
        "pid": os.getpid(),
    }
    command = [sys.executable, "-I", "-B", "-c", code, json.dumps(settings)]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


@needs_landlock
def test_a_child_reads_its_input_writes_its_folder_and_does_nothing_else(folder: Path) -> None:
    done = probe(folder)
    report = json.loads(done.stdout)
    assert report["restrictions"]["landlock"] >= 1
    results = report["results"]
    for allowed in ("write inside", "read given"):
        assert results.pop(allowed) == "done"
    assert results.pop("memory") == "memory"
    if not report["restrictions"]["calls"]:
        for name in ("socket", "fork", "program", "kill"):
            results.pop(name)
    assert set(results.values()) <= {"Permission denied", "Operation not permitted"}, results
    assert [one.name for one in (folder / "outside").iterdir()] == ["kept"]
    assert (folder / "outside" / "kept").read_text() == "kept"


@pytest.mark.integration
def test_a_child_that_spins_or_fills_the_disk_is_stopped(folder: Path) -> None:
    start = _PROBE[: _PROBE.index("os.makedirs")]
    spins = probe(folder, start + "while True: pass")
    assert spins.returncode in (-signal.SIGXCPU, -signal.SIGKILL)
    fills = probe(folder, start + "open(settings['scratch'] + '/x', 'wb').write(bytes(2 << 20))")
    assert fills.returncode != 0
    assert "too large" in fills.stderr


def test_what_a_child_wrote_is_read_only_if_it_is_a_plain_file(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"x" * 10)
    assert read_regular_file(tmp_path / "plain", 10) == b"x" * 10
    with pytest.raises(ValueError, match="at most 9 bytes"):
        read_regular_file(tmp_path / "plain", 9)
    (tmp_path / "link").symlink_to(tmp_path / "plain")
    with pytest.raises(OSError):
        read_regular_file(tmp_path / "link", 10)
    os.link(tmp_path / "plain", tmp_path / "hard")
    with pytest.raises(ValueError):
        read_regular_file(tmp_path / "hard", 10)


def test_torchscript_is_refused_where_there_is_no_sandbox(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    path = tmp_path / "a.pt"
    torch.jit.script(torch.nn.ReLU()).save(str(path))
    with pytest.raises(LoadingError, match=r"a\.pt: TorchScript, which is code"):
        open_model(path)
    monkeypatch.setattr("wm_victim.loading.graphs.sandboxed", lambda: False)
    with pytest.raises(LoadingError, match="no Landlock"):
        open_model(path, **SCRIPT)


@pytest.mark.slow
@needs_landlock
@pytest.mark.parametrize("build", [acts_at_load, writes_a_file_at_forward])
def test_script_that_passes_the_listing_still_reaches_nothing(
    build: object, folder: Path, tmp_path: Path
) -> None:
    assert callable(build)
    marker = tmp_path / "marker"
    path = build(folder / "in", marker)
    assert _forbidden_call(path), "the listing would have stopped it: this goes around"
    # Some calls fail loudly and some without a word; what counts is that nothing came of them.
    with contextlib.suppress(LoadingError):
        options = {"image_size": 16, "channels": 3}
        run_child("torchscript", path, 10_000, Limits(), options)
    assert not marker.exists()
    # The control: without the sandbox, the same file does act.
    control = "import sys, torch; torch.jit.load(sys.argv[1])(torch.rand(2, 3, 16, 16))"
    command = [sys.executable, "-W", "ignore", "-c", control, str(path)]
    subprocess.run(command, capture_output=True, timeout=60, check=False)
    assert marker.exists()


@pytest.mark.integration
@pytest.mark.parametrize(("queued", "ends"), [(0.0, False), (10.0, True), (100.0, False)])
def test_waiting_for_a_processor_is_not_held_against_a_child(
    queued: float, ends: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    naps = 1.0 if queued < 100 else 60.0  # however much it waited, the time has an end
    monkeypatch.setattr(child_process, "_queued_seconds", lambda _: queued)
    command = [sys.executable, "-S", "-c", f"import time; time.sleep({naps})"]
    assert child_process._watch(command, tmp_path, 0.8) == (0 if ends else None)


@pytest.mark.skipif(not Path("/proc/self/schedstat").is_file(), reason="nobody counts the waiting")
def test_the_time_in_a_queue_is_the_kernels() -> None:
    assert 0 < child_process._queued_seconds(os.getpid()) < 1e6
    assert child_process._queued_seconds(2**22 + 1) == 0.0  # no such process
