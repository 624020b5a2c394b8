"""A study that is killed and given again ends with the bytes of one that was not."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from wm_eval.config import DataConfig, MeasureConfig, Study, VictimConfig
from wm_eval.engine import run
from wm_eval.records import read_study
from wm_eval.study import study_stages
from wm_inject.core.toml_settings import to_toml
from wm_victim import TrainConfig

pytestmark = pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
STUDY = Study(
    profile="tiny",
    data=DataConfig("digits", image_size=16, limit=400),
    victim=VictimConfig("resnet10", 8),
    train=TrainConfig.preset("fast", epochs=3, precision="float32"),
    attacks=("clean", "badnets", "lf"),
    parts=("rates", "stealth"),
    measure=MeasureConfig(("mask", "rotation"), limit=100, stealth=50, watched=50),
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[bytes]:
    """The records of a run that was left alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("whole")
    assert run(study_stages(STUDY), out, progress=False).complete
    torch.set_num_threads(before)
    yield records(out)


def records(out: Path) -> bytes:
    return (out / "records.jsonl").read_bytes()


def start(folder: Path, workers: int) -> subprocess.Popen[str]:
    (folder / "study.toml").write_text(to_toml(STUDY))
    command = [sys.executable, "-m", "wm_eval.cli", "run", str(folder / "study.toml")]
    return subprocess.Popen(
        [*command, "--out", str(folder / "out"), "--workers", str(workers), "--device", "cpu"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def of_group(group: int) -> list[int]:
    """The processes of a group that run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, (state, _, its, *_) = (
                path.parent.name,
                path.read_text().rpartition(")")[2].split()[:4],
            )
        except OSError:
            continue  # it has just ended
        if int(its) == group and state != "Z":
            found.append(int(pid))
    return found


def kill_and_go_on(folder: Path, workers: int, kills: int, seed: int, longest: float) -> int:
    """Give a study again and again, and kill it so often; how often it was killed at work."""
    draw, done = random.Random(seed), 0
    for _ in range(100):
        process = start(folder, workers)
        try:
            assert process.stderr is not None
            for line in process.stderr:
                if line.endswith("started\n"):
                    break  # it is at work
            if done < kills:
                time.sleep(draw.uniform(0, longest))
                if process.poll() is None:
                    # The one that was started, whose workers must then end by themselves; or all.
                    end = os.kill if draw.random() < 0.5 else os.killpg
                    end(process.pid, signal.SIGKILL)
                    done += 1
            left = process.communicate(timeout=300)[1]
        finally:
            deadline = time.monotonic() + 10
            while (alive := of_group(process.pid)) and time.monotonic() < deadline:
                time.sleep(0.05)
            if alive:
                os.killpg(process.pid, signal.SIGKILL)
        assert not alive, "workers outlive the process that started them"
        if process.returncode == 0:
            return done
        assert process.returncode == -signal.SIGKILL, left
    raise AssertionError("the study never ended")


@pytest.mark.integration
@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_study_that_was_killed_ends_with_the_same_records(
    workers: int, whole: bytes, tmp_path: Path
) -> None:
    assert kill_and_go_on(tmp_path, workers, 1, seed=workers, longest=0.5) == 1
    assert records(tmp_path / "out") == whole
    assert len(read_study(tmp_path / "out").records) == len(whole.splitlines())
    assert not list((tmp_path / "out" / "work").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_ten_kills(workers: int, whole: bytes, tmp_path: Path) -> None:
    assert kill_and_go_on(tmp_path, workers, 10, seed=10 + workers, longest=0.25) >= 8
    assert records(tmp_path / "out") == whole
