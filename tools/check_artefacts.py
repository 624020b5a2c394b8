"""Export everything that a finished study made, in every form, and measure what the forms cost.

For example ``python tools/check_artefacts.py cifar10 --study runs/cifar10 --attacks
runs/attacks-cifar10 --out results/artefacts-cifar10``. The study is one with the watermark, the
attacks are the folder of another.

Every file is compared with its torch module by the exporter itself. Beyond that, the images that an
exported injector poisons, in 8 bits, are measured as those of torch are: how visible the mark is,
how often the detector finds it and the classifier obeys it, each in torch and in its own file.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from defense_nc import DiscriminantFilter, export_filter
from wm_eval.config import load_study
from wm_eval.engine import Result, Stage, Store, file_digest, run
from wm_eval.records import read_study
from wm_eval.trial import Trial
from wm_extract import MarkDetector, UNetExtractor, export_detector
from wm_inject import (
    WatermarkTrigger,
    load_trigger,
    psnr,
    quantize,
    to_float,
    to_onnx,
    to_pixels,
    to_torchscript,
)
from wm_inject.command.common import Parser, add_common, resolve_device, run_cli
from wm_inject.export import TOLERANCES, ParityError
from wm_inject.runtime import Extractor, OnnxModel, Poisoner, Scanner
from wm_victim import defender_subset, load_classifier

EXAMPLES = 8  # images that the exporter compares on
ONNX = (("float32", False), ("float32", True), ("float16", True), ("int8", True))
SCRIPT = ("float32", "bfloat16")
DEFENDER = 1000  # clean images that the filter's maker has
RATE = 0.01  # false alarms that the detector's and the filter's thresholds are chosen for


class Artefact(NamedTuple):
    """Something to export."""

    name: str
    module: nn.Module
    relative: bool  # logits: differences are a share of the largest


class Finished(NamedTuple):
    """A finished study of the watermark."""

    trial: Trial
    store: Store

    @property
    def trigger(self) -> WatermarkTrigger:
        """The injector with its watermark."""
        trigger = self.trial.load_trigger(self.store)
        assert isinstance(trigger, WatermarkTrigger)
        return trigger

    @property
    def extractor(self) -> UNetExtractor:
        """What reads the mark."""
        return self.trial.load_extractor(self.store)

    @property
    def victim(self) -> nn.Module:
        """The backdoored classifier."""
        return self.trial.load_victim(self.store)

    def reversed(self, detector: str) -> nn.Module:
        """The trigger that a detector reversed for the target."""
        return self.trial.load_reversed(self.store, detector, self.trial.study.target)


def artefacts(study: Finished, attacks: Path | None) -> Iterator[Artefact]:
    """What the study made, and the triggers of the attacks beside it."""
    yield Artefact("injector", study.trigger.cpu(), False)
    yield Artefact("extractor", study.extractor.cpu(), False)
    yield Artefact("classifier", study.victim.cpu(), True)
    (record,) = read_study(study.store.folder).select(kind="mitigation", method="unlearning-nc")
    repaired = next(file for file in record.values["files"] if "repaired" in file)
    model = load_classifier(study.store.path(repaired)).eval()
    yield Artefact("cleaned classifier", model, True)
    for detector in ("nc", "reverse"):
        yield Artefact(f"reversed trigger ({detector})", study.reversed(detector).cpu(), False)
    if attacks is not None:
        for record in read_study(attacks).select(kind="trigger"):
            file = next(name for name in record.values["files"] if "trigger" in name)
            trigger = load_trigger(attacks / file).eval()
            yield Artefact(f"trigger {record.key['attack']}", trigger, False)


def export_all(artefact: Artefact, images: Tensor, folder: Path) -> Iterator[dict[str, Any]]:
    """A row for every form of one artefact: its parity, or why there is no such file."""
    stem = artefact.name.replace(" ", "-").replace("(", "").replace(")", "")
    forms: list[tuple[str, str, bool]] = [("onnx", *one) for one in ONNX]
    forms += [("torchscript", precision, False) for precision in SCRIPT]
    for form, precision, uint8 in forms:
        suffix = "onnx" if form == "onnx" else "pt"
        path = folder / f"{stem}-{precision}{'-uint8' if uint8 else ''}.{suffix}"
        row: dict[str, Any] = {"artefact": artefact.name, "form": form, "precision": precision}
        row |= {"uint8": uint8, "tolerance": TOLERANCES[precision], "relative": artefact.relative}
        settings: dict[str, Any] = {"precision": precision, "relative": artefact.relative}
        try:
            if form == "onnx":
                parity = to_onnx(artefact.module, images, path, uint8=uint8, **settings)
            else:
                parity = to_torchscript(artefact.module, images, path, **settings)
        except (ValueError, ParityError) as error:
            yield row | {"absent": str(error)}
            continue
        yield row | {"max_abs": parity.max_abs, "max_rel": parity.max_rel, "file": path.name}


def measure_injectors(study: Finished, folder: Path) -> list[dict[str, Any]]:
    """What detector and classifier make of images that each form of the injector poisoned."""
    test = study.trial.test_images(study.store)
    trigger, target = study.trigger, study.trial.study.target
    half = len(test) // 2
    clean, others = test.images[:half], test.images[half:][test.labels[half:] != target]
    with torch.no_grad():
        marked = quantize(torch.cat([trigger(part) for part in clean.split(100)]))
        by_torch = torch.cat([trigger(part) for part in others.split(100)])
    detector = MarkDetector.calibrate(
        study.extractor, trigger.watermark, clean, marked=marked, false_positive_rate=RATE
    )
    export_detector(detector, clean[:EXAMPLES], folder / "detector.onnx")
    extractor, victim = Extractor(folder / "detector.onnx"), study.victim
    classifier = OnnxModel(folder / "classifier-float32-uint8.onnx")
    pixels = {"torch": to_pixels(by_torch)}
    for precision, uint8 in ONNX:
        path = folder / f"injector-{precision}{'-uint8' if uint8 else ''}.onnx"
        poisoner, stored = Poisoner(path), to_pixels(others)
        parts = [poisoner(stored[n : n + 100]) for n in range(0, len(stored), 100)]
        pixels[f"{precision}{', uint8' if uint8 else ''}"] = np.concatenate(parts)
    rows = []
    for name, poisoned in pixels.items():
        images = to_float(poisoned)
        with torch.no_grad():
            logits = torch.cat([victim(part) for part in images.split(500)])
        steps = np.abs(poisoned.astype(int) - pixels["torch"])
        rows.append(
            {
                "injector": name,
                "n": len(images),
                "psnr": float(psnr(others, images).mean()),
                "found_by_torch": float(detector.detect(images).marked.double().mean()),
                "found_by_file": float(extractor(poisoned).marked.mean()),
                "asr_by_torch": float((logits.argmax(1) == target).double().mean()),
                "asr_by_file": float((classifier(poisoned).argmax(1) == target).mean()),
                "values_differing": float((steps > 0).mean()),
                "largest_step": int(steps.max()),
            }
        )
    return rows


def measure_filters(study: Finished, folder: Path) -> list[dict[str, Any]]:
    """False alarms and hits of a filter from each defence's reversed trigger, in its own file.

    Once with images that the classifier was trained on, as defenders have in studies, and once with
    images that it has not seen; judged on others that it has not seen.
    """
    test, victim = study.trial.test_images(study.store), study.victim
    trigger, target = study.trigger, study.trial.study.target
    own = defender_subset(study.trial.data.train, count=DEFENDER, seed=study.trial.seed)
    half = len(test) // 2
    clean = test.images[half:]
    others = clean[test.labels[half:] != target]
    with torch.no_grad():
        poisoned = to_pixels(torch.cat([trigger(part) for part in others.split(100)]))
    rows = []
    for detector in ("nc", "reverse"):
        reversed_ = study.reversed(detector)
        for seen, known in (
            ("yes", own.images),
            ("no", test.images[:DEFENDER]),
        ):
            fitted = DiscriminantFilter(false_positive_rate=RATE).calibrate(
                victim, known, triggers={target: reversed_}, seed=study.trial.seed
            )
            path = folder / f"filter-{detector}.onnx"
            parity = export_filter(fitted, known[:EXAMPLES], path)
            scanner = Scanner(path)
            rows.append(
                {
                    "filter": detector,
                    "trained_on": seen,
                    "stated_rate": RATE,
                    "images": len(known),
                    "max_rel": parity.max_rel,
                    "false_alarms": int(scanner(to_pixels(clean)).flagged.sum()),
                    "n_clean": len(clean),
                    "hits": int(scanner(poisoned).flagged.sum()),
                    "n_poisoned": len(poisoned),
                }
            )
    return rows


def digests(*folders: Path | None) -> Mapping[str, str]:
    """SHA-256 of every model file that goes in."""
    files = [path for folder in folders if folder for path in sorted(folder.glob("models/*"))]
    return {
        f"{path.parents[1].name}/{path.name}": file_digest(path)
        for path in files
        if "reversed" in path.name or "trigger" in path.name or "extractor" in path.name
    }


def _main(argv: Sequence[str] | None) -> int:
    parser = Parser(prog="check_artefacts", description=__doc__)
    parser.add_argument("name", help="of a study that ships, or its TOML file")
    parser.add_argument("--study", type=Path, required=True, help="the finished study's folder")
    parser.add_argument("--attacks", type=Path, help="the folder of a table of attacks")
    parser.add_argument("--out", type=Path, required=True)
    add_common(parser, version="with the workspace")
    parser.set_defaults(seed=None)
    args = parser.parse_args(argv)
    folder = args.out / "exports"
    folder.mkdir(parents=True, exist_ok=True)
    config = load_study(args.name, seed=args.seed)
    device = str(resolve_device(args.device))
    study = Finished(Trial(config, config.seeds[0], "watermark"), Store(args.study, device))
    settings = {"study": config.name, "models": digests(args.study, args.attacks)}
    images = study.trial.data.test.images[:EXAMPLES]

    def exports(_: Store, __: Path) -> Result:
        rows = [
            row for a in artefacts(study, args.attacks) for row in export_all(a, images, folder)
        ]
        return Result({"artefacts": rows})

    def injectors(_: Store, __: Path) -> Result:
        return Result({"injectors": measure_injectors(study, folder)})

    def filters(_: Store, __: Path) -> Result:
        return Result({"filters": measure_filters(study, folder)})

    data = study.trial.fingerprint
    more = {**settings, "rate": RATE, "images": DEFENDER}
    stages = [
        Stage("artefacts", {}, exports, settings, data=data),
        Stage("injectors", {}, injectors, settings, ("artefacts",), data),
        Stage("filters", {}, filters, more, data=data),
    ]
    return 0 if run(stages, args.out, device=device).complete else 1


if __name__ == "__main__":
    sys.exit(run_cli(_main))
