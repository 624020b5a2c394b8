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

from wm_eval.attacks.config import AttackStudyConfig
from wm_eval.attacks.run import run_attack_study
from wm_eval.config import DataConfig, MeasureConfig, VictimConfig
from wm_eval.records import read_records
from wm_victim import TrainConfig

pytestmark = pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
STUDY = AttackStudyConfig(
    profile="tiny",
    data=DataConfig("digits", image_size=16, limit=400),
    victim=VictimConfig("resnet10", 8),
    train=TrainConfig.preset("fast", epochs=3, precision="float32"),
    attacks=("badnets", "lf"),
    measure=MeasureConfig(corruptions=("mask", "rotation"), limit=100, pictures=1),
    stealth_images=50,
    watched_images=50,
)
COMMAND = """
import sys
from wm_eval.attacks.run import run_attack_study
from wm_eval.executors import HERE
from wm_eval.local_processes import LocalProcesses
from wm_eval.config import DataConfig, MeasureConfig, VictimConfig
from wm_eval.attacks.config import AttackStudyConfig
from wm_extract import JointConfig
from wm_victim import TrainConfig

if __name__ == "__main__":
    workers = int(sys.argv[2])
    executor = HERE if workers == 1 else LocalProcesses(workers)
    run_attack_study({study}, sys.argv[1], executor=executor)
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, bytes]]:
    """The records of a run that was left alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("whole")
    run_attack_study(STUDY, out, progress=False)
    torch.set_num_threads(before)
    yield records(out)


def records(out: Path) -> dict[str, bytes]:
    found = out.glob("records/[!.]*.json")
    return {path.name: path.read_bytes() for path in found if ".env." not in path.name}


def start(folder: Path, workers: int) -> subprocess.Popen[str]:
    script = folder / "study.py"
    script.write_text(COMMAND.format(study=repr(STUDY)))
    return subprocess.Popen(
        [sys.executable, str(script), str(folder / "out"), str(workers)],
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


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_study_that_was_killed_ends_with_the_same_records(
    workers: int, whole: dict[str, bytes], tmp_path: Path
) -> None:
    assert kill_and_go_on(tmp_path, workers, 1, seed=workers, longest=0.5) == 1
    assert records(tmp_path / "out") == whole
    assert set(read_records(tmp_path / "out" / "records")) == {Path(n).stem for n in whole}
    assert not list((tmp_path / "out" / "work").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_ten_kills(workers: int, whole: dict[str, bytes], tmp_path: Path) -> None:
    assert kill_and_go_on(tmp_path, workers, 10, seed=10 + workers, longest=0.25) >= 8
    assert records(tmp_path / "out") == whole


def test_a_record_that_was_being_written_is_no_record(tmp_path: Path) -> None:
    (tmp_path / ".data.part1.json").write_text('{"what": ')
    with pytest.raises(ValueError, match="expected records"):
        read_records(tmp_path)
