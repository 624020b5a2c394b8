"""What a scan costs: the factors of precision, of the stack and of the race, each apart.

All are measured in one run, round after round, on one victim with a real, invisible backdoor, with
the default preset, and every way must come to the same verdict and name the
target. As a script it writes a record::

    python packages/defense-reverse/benchmarks/bench_reverse.py --out speed-reverse.json

All together stay just under 2 on a CPU (results/speed/speed-reverse.json), and this bounds them:

- The stack saves no arithmetic. One label alone keeps a core busy, and convolutions of many
  generators side by side, grouped or under vmap, are slower on a CPU than one after the other.
- bfloat16 helps the classifier's passes, by less than two there and back, and the narrow
  generators at full resolution less than that.
- The race of the preset "fast" has milestones at half and three quarters of the steps, and five
  labels always go on: of 1200 steps 952 are left, so that it cannot be worth more than 1.26.

A verdict here is the scan's own. Without the race the settings are not those of the calibration, so
that only the last way is judged by it, and the others by a rule that asks for more. FTrojan in
CIFAR-10 is plain enough for both, and the images must be there (WM_DATA): in the bundled digits its
usual wave is not learned.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

from defense_nc import ScanReport
from defense_reverse import ReverseConfig, ReverseGenerator, UNetGenerator, pretrain
from wm_inject import FTrojanTrigger
from wm_inject.core.files import write_json
from wm_inject.core.plan import PoisonPlan
from wm_victim import (
    Dataset,
    ImageSet,
    TrainConfig,
    attack_success,
    build_classifier,
    defender_subset,
    load_dataset,
    train_classifier,
)

pytestmark = pytest.mark.bench

ROUNDS = 5
TARGET = 0
IMAGES = 500  # as the command takes, and as the calibration was made with
_APART: dict[str, dict[str, Any]] = {
    "reference": {"engine": "one-by-one", "race": False, "precision": "float32"},
    "precision": {"engine": "one-by-one", "race": False},
    "stack": {"race": False, "precision": "float32"},
    "stack and precision": {"race": False},
    "stack, precision and race": {},
}


def ratio(slow: Callable[[], object], fast: Callable[[], object]) -> float:
    """Median of slow / fast in CPU seconds over interleaved pairs, after one warm-up of each."""
    pairs = []
    for _ in range(ROUNDS + 1):
        times = []
        for work in (slow, fast):
            start = time.process_time()
            work()
            times.append(time.process_time() - start)
        pairs.append(times[0] / times[1])
    return statistics.median(pairs[1:])


def training(images: Tensor, **changes: Any) -> Callable[[], UNetGenerator]:
    config = replace(ReverseConfig.preset("fast", residual=False, pretrain_steps=10), **changes)
    return lambda: pretrain(images, config=config)


@pytest.mark.parametrize(
    ("name", "slow"),
    [
        ("float32 / auto", {"precision": "float32"}),
        ("two convolutions per block / one", {"convs": 2}),
        ("width 32, depth 3 / width 8, depth 2", {"width": 32, "depth": 3}),
    ],
)
def test_training_steps(benchmark: BenchmarkFixture, name: str, slow: dict[str, Any]) -> None:
    """What the settings of the generators cost, against those of the preset."""
    images = torch.rand(64, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    benchmark.extra_info[name] = round(ratio(training(images, **slow), training(images)), 2)
    benchmark.pedantic(training(images), rounds=3)


class Victim(NamedTuple):
    """A classifier with a backdoor, its data, and what the attack is and achieves."""

    model: nn.Module
    data: Dataset
    attack: str
    success: float


def victim() -> Victim:
    """A PreActResNet-18 of width 16 on CIFAR-10 with FTrojan's invisible trigger."""
    data = load_dataset("cifar10", limit=20_000, image_size=32)
    model = build_classifier(
        "preactresnet18",
        num_classes=data.num_classes,
        channels=data.channels,
        image_size=32,
        width=16,
        seed=0,
    )
    trigger = FTrojanTrigger(image_size=32, channels=data.channels)
    train_classifier(
        model,
        data.train,
        config=TrainConfig.preset("fast", epochs=6),
        plan=PoisonPlan(ratio=0.1, target=TARGET),
        trigger=trigger,
        progress=False,
    )
    success = attack_success(model, data.test, trigger, target=TARGET)
    return Victim(model.eval(), data, trigger.kind, success)


def factors(preset: str, rounds: int) -> dict[str, Any]:
    """Scan one victim in every way, in turns, and compare times, verdicts and what was found."""
    model, data, attack, success = victim()
    known = defender_subset(data.train, count=IMAGES, seed=0)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in _APART}
    reports: dict[str, ScanReport] = {}
    for _ in range(rounds):
        for name, changes in _APART.items():
            start = time.perf_counter(), time.process_time()
            reports[name] = _scan(model, known, ReverseConfig.preset(preset, **changes))
            seconds[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    found = {name: _change(report, known) for name, report in reports.items()}
    rows = {}
    for name, pairs in seconds.items():
        # CPU seconds: on a machine that is shared, the clock on the wall tells of the others.
        again = [
            before[1] / now[1] for before, now in zip(seconds["reference"], pairs, strict=True)
        ]
        report = reports[name]
        rows[name] = {
            "factor": statistics.median(again),
            "cpu_seconds": statistics.median(cpu for _, cpu in pairs),
            "wall_seconds": statistics.median(wall for wall, _ in pairs),
            "verdict": report.verdict.value,
            "suspected": list(report.suspected),
            "calibrated": report.calibrated,
            "correlation": correlation(found["reference"], found[name]),
            "scores": [round(row.score, 4) for row in report.labels],
            "label_steps": report.log["label_steps"],
        }
    about = {
        "detector": "Reverse generators",
        "preset": preset,
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "images": IMAGES,
        "attack": attack,
    }
    return {**about, "data": data.name, "attack_success": success, "ways": rows}


def _scan(model: nn.Module, known: ImageSet, config: ReverseConfig) -> ScanReport:
    return ReverseGenerator(config).scan(model, known.images, labels=known.labels, progress=False)


@torch.no_grad()
def _change(report: ScanReport, known: ImageSet) -> Tensor:
    """What the target's generator changes in the defender's images ``(N, C, H, W)``."""
    changed: Tensor = report.triggers[TARGET](known.images)
    return changed - known.images


def correlation(first: Tensor, second: Tensor) -> float:
    """Pearson's, over all pixels of all images."""
    return float(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1])


def check(record: dict[str, Any]) -> None:
    """Every way names the target alone, and changes about what the reference changes."""
    assert record["attack_success"] > 0.9, record["attack_success"]
    for name, row in record["ways"].items():
        assert row["verdict"] == "backdoored" and row["suspected"] == [TARGET], (name, row)
        assert min(row["scores"]) == row["scores"][TARGET], (name, row)
        assert row["correlation"] >= 0.5, (name, row)


def table(record: dict[str, Any]) -> str:
    """The record as lines for a terminal."""
    lines = [f"{'way':28s} factor  cpu s  wall s  correlation  verdict"]
    for name, row in record["ways"].items():
        lines.append(
            f"{name:28s} {row['factor']:6.2f} {row['cpu_seconds']:6.1f} {row['wall_seconds']:7.1f} "
            f"{row['correlation']:12.2f}  {row['verdict']} {row['suspected']}"
        )
    return "\n".join(lines)


@pytest.mark.slow  # minutes: left out of `hatch run bench`
@pytest.mark.skipif("WM_DATA" not in os.environ, reason="WM_DATA, with CIFAR-10, is not set")
def test_factors_of_precision_stack_and_race(benchmark: BenchmarkFixture) -> None:
    record: dict[str, Any] = benchmark.pedantic(
        factors, kwargs={"preset": "fast", "rounds": 1}, rounds=1
    )
    benchmark.extra_info.update({name: row["factor"] for name, row in record["ways"].items()})
    sys.stdout.write(f"\n{table(record)}\n")
    check(record)


def main() -> None:
    """Measure, print the table and write the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the record here, as JSON")
    parser.add_argument("--preset", choices=("fast", "robust"), default="fast")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    record = factors(args.preset, args.rounds)
    sys.stdout.write(f"{table(record)}\n")
    if args.out is not None:
        write_json(args.out, record)
    check(record)


if __name__ == "__main__":
    main()
