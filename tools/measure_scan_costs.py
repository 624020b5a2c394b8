"""What an audit of one model costs, detector by detector: time and memory of ``wm-eval scan``.

``python tools/measure_scan_costs.py MODEL --data cifar10 --out results/speed/scan-costs.json``
scans MODEL with 500 test images, each detector in a process of its own, and writes an entry for it
into the file. A detector that takes longer than ``--minutes`` is broken off.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from wm_eval.detectors import DETECTORS, detector
from wm_eval.titles import AUDIT, PAPERS
from wm_inject.command.common import Parser, add_common, run_cli
from wm_inject.core.files import write_json
from wm_inject.core.images import save_image, to_pixels
from wm_victim import load_classifier, load_dataset
from wm_victim.datasets import Dataset

IMAGES = 500


def save_images(data: Dataset, folder: Path) -> None:
    """Test images as PNG files in class folders."""
    order = torch.randperm(len(data.test), generator=torch.Generator().manual_seed(0))[:IMAGES]
    for i, pixels in zip(order.tolist(), to_pixels(data.test.images[order]), strict=True):
        path = folder / f"{int(data.test.labels[i]):03}" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        save_image(path, pixels)


def scan(model: Path, images: Path, name: str, minutes: float) -> dict[str, Any]:
    """One detector's scan: seconds, the largest memory, and what it said."""
    file = images.parent / f"{name}.json"
    command = [sys.executable, "-m", "wm_eval.cli", "scan", str(model), "--images", str(images)]
    command += ["--detectors", name, "--minutes", str(minutes), "--json", str(file)]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, _, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    report = json.loads(file.read_text(encoding="utf-8"))
    return {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "mebibytes": round(usage.ru_maxrss / 1024),
        "verdict": report["verdict"],
        "suspected": report["suspected"],
        "finished": name not in report["out_of_time"],
    }


def passes(name: str, preset: str, classes: int) -> float:
    """Images through the model and back, at most."""
    return DETECTORS[name].passes(detector(name, preset).settings, classes, IMAGES)


def measure(model: Path, data: Dataset, names: Sequence[str], minutes: float) -> dict[str, Any]:
    """All detectors on one model, one after the other."""
    classifier = load_classifier(model)
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder, "images")
        images.mkdir()
        save_images(data, images)
        rows = {}
        for name in names:
            rows[name] = scan(model, images, name, minutes) | {
                f"passes_{preset}": passes(name, preset, data.num_classes)
                for preset in ("fast", "paper")
            }
            print(name, rows[name], flush=True)
    return {
        "data": data.name,
        "classes": data.num_classes,
        "parameters": sum(p.numel() for p in classifier.parameters()),
        "threads": torch.get_num_threads(),
        "minutes": minutes,
        "detectors": rows,
    }


def _main(argv: Sequence[str] | None) -> int:
    parser = Parser(prog="measure_scan_costs", description=__doc__)
    parser.add_argument("model", type=Path, help="a classifier's file")
    parser.add_argument("--data", required=True, help="the data set that it was trained on")
    parser.add_argument("--out", type=Path, required=True, help="JSON, one entry a model")
    parser.add_argument("--detectors", default=",".join((*AUDIT, *PAPERS)))
    parser.add_argument("--minutes", type=float, default=30, help="for each detector, at most")
    add_common(parser, version="with the workspace")
    args = parser.parse_args(argv)
    entries = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {}
    names = args.detectors.split(",")
    entry = measure(args.model, load_dataset(args.data), names, args.minutes)
    write_json(args.out, entries | {args.model.stem: entry})
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(_main))
