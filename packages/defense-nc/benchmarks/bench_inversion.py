"""What a scan costs: the factors of precision, of the stack and of the race, each apart.

All are measured in one run, round after round, on one victim with a real backdoor, and every way
must come to the same verdict with the same mask of the target. As a script it writes a record::

    python packages/defense-nc/benchmarks/bench_inversion.py --out inversion.json
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

from defense_nc import NCConfig, NeuralCleanse, ScanReport, invert_trigger
from wm_inject import BadNetsTrigger
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
from wm_victim.inference import frozen

pytestmark = pytest.mark.bench

ROUNDS = 7
CONFIG = NCConfig.preset(
    "robust", steps=2, batches=8, batch_size=32, early_stop=False, race=False, precision="float32"
)
TARGET = 0
_APART: dict[str, dict[str, Any]] = {
    "reference": {"engine": "single", "race": False, "precision": "float32"},
    "precision": {"engine": "single", "race": False},
    "stack": {"race": False, "precision": "float32"},
    "stack and precision": {"race": False},
    "stack, precision and race": {},
}


def ratio(slow: Callable[[], object], fast: Callable[[], object]) -> float:
    """Median of slow / fast over interleaved pairs, after one warm-up of each."""
    pairs = []
    for _ in range(ROUNDS + 1):
        times = []
        for work in (slow, fast):
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
        pairs.append(times[0] / times[1])
    return statistics.median(pairs[1:])


@pytest.mark.parametrize(("name", "width"), [("resnet10", 16), ("wanet-mnist", None)])
def test_inversion_against_bare_passes(
    benchmark: BenchmarkFixture, name: str, width: int | None
) -> None:
    """What the inversion costs beside the passes that it cannot do without."""
    size, channels = (32, 3) if name == "resnet10" else (28, 1)
    model = build_classifier(
        name, num_classes=10, channels=channels, image_size=size, width=width
    ).eval()
    images = torch.rand(64, channels, size, size, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(64) % 9 + 1

    def inversion() -> object:
        return invert_trigger(model, images, 0, config=CONFIG, labels=labels)

    def bare() -> None:
        """As many passes through the model, forward and back to the pixels, and nothing else."""
        pixels = images[:32].clone().requires_grad_()
        with frozen(model):
            for _ in range(CONFIG.steps * CONFIG.batches * len(CONFIG.starts)):
                F.cross_entropy(model(pixels), labels[:32]).backward()

    benchmark.extra_info["overhead"] = ratio(inversion, bare)
    benchmark.pedantic(inversion, rounds=ROUNDS, warmup_rounds=1)


def victim() -> tuple[nn.Module, Dataset, float]:
    """A PreActResNet-18 of width 16 with a BadNets backdoor, its data, and the attack's success.

    CIFAR-10 where WM_DATA has it, the bundled digits at 32 pixels otherwise.
    """
    real = "WM_DATA" in os.environ
    data = load_dataset(
        "cifar10" if real else "digits", limit=8000 if real else None, image_size=32
    )
    model = build_classifier(
        "preactresnet18",
        num_classes=data.num_classes,
        channels=data.channels,
        image_size=32,
        width=16,
        seed=0,
    )
    trigger = BadNetsTrigger(image_size=32)
    train_classifier(
        model,
        data.train,
        config=TrainConfig.preset("fast", epochs=6),
        plan=PoisonPlan(ratio=0.1, target=TARGET),
        trigger=trigger,
        progress=False,
    )
    return model.eval(), data, attack_success(model, data.test, trigger, target=TARGET)


def factors(preset: str, rounds: int) -> dict[str, Any]:
    """Scan one victim in every way, in turns, and compare times, verdicts and masks."""
    model, data, success = victim()
    known = defender_subset(data.train, count=300, seed=0)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in _APART}
    reports: dict[str, ScanReport] = {}
    for _ in range(rounds):
        for name, changes in _APART.items():
            start = time.perf_counter(), time.process_time()
            reports[name] = _scan(model, known, NCConfig.preset(preset, **changes))
            seconds[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    masks = {name: _mask(report) for name, report in reports.items()}
    rows = {}
    for name, pairs in seconds.items():
        # CPU seconds: on a machine that is shared, the clock on the wall tells of the others.
        again = [
            before[1] / now[1] for before, now in zip(seconds["reference"], pairs, strict=True)
        ]
        rows[name] = {
            "factor": statistics.median(again),
            "cpu_seconds": statistics.median(cpu for _, cpu in pairs),
            "wall_seconds": statistics.median(wall for wall, _ in pairs),
            "verdict": reports[name].verdict,
            "suspected": list(reports[name].suspected),
            "overlap": overlap(masks["reference"], masks[name]),
            "scores": [round(row.score, 2) for row in reports[name].labels],
        }
    about = {
        "detector": "Neural Cleanse",
        "preset": preset,
        "rounds": rounds,
        "threads": torch.get_num_threads(),
    }
    return {**about, "data": data.name, "attack_success": success, "ways": rows}


def _scan(model: nn.Module, known: ImageSet, config: NCConfig) -> ScanReport:
    return NeuralCleanse(config).scan(model, known.images, labels=known.labels, progress=False)


def _mask(report: ScanReport) -> Tensor:
    mask: Tensor = report.triggers[TARGET].get_buffer("mask")
    return mask


def overlap(first: Tensor, second: Tensor) -> float:
    """Intersection over union of two masks, each cut at half of its peak."""
    one, two = (mask > mask.max() / 2 for mask in (first, second))
    return float((one & two).sum() / (one | two).sum())


def check(record: dict[str, Any]) -> None:
    """Every way says what the reference says: verdict, target and mask. Times are only told."""
    assert record["attack_success"] > 0.9, record["attack_success"]
    verdict = record["ways"]["reference"]["verdict"]
    for name, row in record["ways"].items():
        assert row["verdict"] == verdict and row["suspected"] == [TARGET], (name, row)
        assert row["overlap"] >= 0.5, (name, row)


def table(record: dict[str, Any]) -> str:
    """The record as lines for a terminal."""
    lines = [f"{'way':28s} factor  cpu s  wall s  overlap"]
    for name, row in record["ways"].items():
        lines.append(
            f"{name:28s} {row['factor']:6.2f} {row['cpu_seconds']:6.1f} "
            f"{row['wall_seconds']:7.1f} {row['overlap']:8.2f}"
        )
    return "\n".join(lines)


@pytest.mark.slow  # minutes: left out of `hatch run bench`
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
