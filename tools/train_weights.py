"""Train the injector and extractor pairs that ship in the wheels, measure them, pack them.

For example ``python tools/train_weights.py --out runs/weights tiny-32``.

A pair is trained on training images of public sets, without labels; 2,000 more only choose the
detector's threshold. Every figure is measured on test images, which had no part in either, with the
weights as they ship: rounded to 16 bits and read back. ``--ship`` puts them, and their cards, into
the packages.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wm_eval.config import plain
from wm_eval.engine import Result, Stage, Store, file_digest, run
from wm_eval.intervals import exact_lower, exact_upper
from wm_eval.measure import parameters, stealth_values
from wm_eval.robustness import corrupt_alike, stream
from wm_extract import (
    EXTRA_CORRUPTIONS,
    PAPER_CORRUPTIONS,
    JointConfig,
    MarkDetector,
    UNetExtractor,
    balanced_bit_accuracy,
    load_detector,
    named_corruption,
    save_detector,
    train_jointly,
)
from wm_inject import (
    Checkpoint,
    ViTInjector,
    WatermarkTrigger,
    load_checkpoint,
    load_trigger,
    quantize,
    save_checkpoint,
    save_trigger,
    to_pixels,
)
from wm_inject.command.common import Parser, add_common, resolve_device, run_cli
from wm_inject.core.files import write_json
from wm_victim import load_dataset
from wm_victim.metrics import triggered_images

# Run as a script, Python would look for `tools` inside tools/.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from tools.photographs import CHANGES, measure_photographs

ROOT = Path(__file__).resolve().parents[1]
# Where each half ships, and what it is called while it is made.
HOMES = {
    "trigger": ROOT / "packages/wm-inject/src/wm_inject/weights",
    "detector": ROOT / "packages/wm-extract/src/wm_extract/weights",
}
MEASURED = 2000  # test images of each set, at most
PHOTOGRAPH = 224  # pixels a side
USE = (
    "Trained on images that are published for research: use the weights for research, teaching and "
    "audits you are entitled to, see docs/responsible-use.md."
)


@dataclass(frozen=True)
class Pair:
    """What a pair is trained on, and how.

    Args:
        channels: 1 or 3.
        images: How many training images of each named set are trained on, and how many more only
            choose the detector's threshold.
        tests: The sets whose test images it is measured on.
        config: The recipe.
        image_size: Side of the images, to which a set's own are resized.
        start: The pair that ships whose training this one goes on from.
        photographs: A set whose test images it is also measured on at 224 pixels.
    """

    channels: int
    images: Mapping[str, tuple[int, int]]
    tests: tuple[str, ...]
    config: JointConfig
    image_size: int = field(default=32, metadata={"later": True})
    start: str | None = field(default=None, metadata={"later": True})
    photographs: str | None = field(default=None, metadata={"later": True})


_PHOTOGRAPHS = {"cifar10": (20_000, 2_000)}
_DIGITS = {"mnist": (10_000, 1_800), "digits": (1_000, 200)}
PAIRS = {
    "tiny-32": Pair(
        3, _PHOTOGRAPHS, ("cifar10", "gtsrb"), JointConfig.preset(psnr_floor=36.2, iterations=2500)
    ),
    "small-32": Pair(
        3,
        _PHOTOGRAPHS,
        ("cifar10", "gtsrb"),
        JointConfig.preset(size="small", psnr_floor=36.2, iterations=5000),
    ),
    "tiny-32-grey": Pair(
        1, _DIGITS, ("digits", "mnist"), JointConfig.preset(psnr_floor=38.0, iterations=1500)
    ),
    "tiny-64": Pair(
        3,
        {"cifar10": (4_000, 1_800), "imagenet10": (800, 200)},
        ("imagenet10", "cifar10", "gtsrb"),
        JointConfig.preset(psnr_floor=40.0, iterations=2500),
        image_size=64,
    ),
    "varied-32": Pair(
        3,
        _PHOTOGRAPHS,
        ("cifar10", "gtsrb"),
        JointConfig.preset(
            psnr_floor=36.2,
            psnr_start=None,
            iterations=3500,
            diversity_weight=0.01,
            forgery_weight=0.1,
            ramp=(0.03, 0.3),
            subtraction=0.3,
        ),
        start="tiny-32",
    ),
    "photo-64": Pair(
        3,
        {"cifar10": (4_000, 1_800), "imagenet10": (800, 200)},
        ("imagenet10", "cifar10", "gtsrb"),
        JointConfig.preset(psnr_floor=40.3, psnr_start=None, iterations=800, lr=5e-4, crop=0.85),
        image_size=64,
        start="tiny-64",
        photographs="imagenet10",
    ),
}


def training_images(pair: Pair, *, seed: int) -> tuple[Tensor, Tensor]:
    """The images to train on and those kept back, set after set: ``(N, C, H, W)`` each."""
    train, kept = [], []
    for name, (used, more) in pair.images.items():
        data = load_dataset(name, image_size=pair.image_size, limit=used + more, seed=seed)
        train.append(data.train.images[:used])
        kept.append(data.train.images[used:])
    return torch.cat(train), torch.cat(kept)


def train(name: str, images: Tensor, seed: int, store: Store, checkpoint: Path) -> Result:
    """Train a pair, without labels and without a victim."""
    pair = PAIRS[name]
    start = None
    if pair.start is not None:
        start = (
            ViTInjector.from_pretrained(pair.start),
            UNetExtractor.from_pretrained(pair.start),
        )
    result = train_jointly(
        images.to(store.device), config=pair.config, start=start, seed=seed, checkpoint=checkpoint
    )
    files = (f"models/{name}-trigger.safetensors", f"models/{name}-extractor.safetensors")
    trigger = WatermarkTrigger(result.injector.cpu(), watermark=result.watermark.cpu())
    save_trigger(trigger, store.path(files[0]))
    save_checkpoint(
        store.path(files[1]),
        kind=UNetExtractor.kind,
        config=result.extractor.config,
        state=result.extractor.state_dict(),
    )
    values = {
        "n_train": len(images),
        "injector_parameters": parameters(result.injector),
        "extractor_parameters": parameters(result.extractor),
        "history": [row._asdict() for row in result.history],
    }
    return Result(values, files)


def narrowed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as they ship: floats rounded to 16 bits, the rest as it is.

    Raises:
        ValueError: A value that 16 bits cannot hold.
    """
    tensors = {name: x.half() if x.is_floating_point() else x for name, x in state.items()}
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"expected values that float16 can hold, tensor {name!r} has larger")
    return tensors


def pack(name: str, kept: Tensor, seed: int, store: Store, _: Path) -> Result:
    """Round a pair to 16 bits, choose the detector's threshold, and write both as they ship."""
    metadata = {"metadata": provenance(name, seed=seed)}
    files = {half: f"packed/{half}/{name}.safetensors" for half in HOMES}
    paths = {half: store.path(file) for half, file in files.items()}
    saved = load_checkpoint(store.path(f"models/{name}-trigger.safetensors"))
    rewrite(saved, paths["trigger"], metadata)
    trigger = load_trigger(paths["trigger"])  # copies the 16 bits into float32
    assert isinstance(trigger, WatermarkTrigger)
    saved = load_checkpoint(store.path(f"models/{name}-extractor.safetensors"))
    extractor = UNetExtractor(**saved.config).eval()
    extractor.load_state_dict(narrowed(saved.state))
    with torch.no_grad():
        marked = torch.cat([quantize(trigger(part)) for part in kept.split(256)])
    detector = MarkDetector.calibrate(extractor, trigger.watermark, kept, marked=marked)
    save_detector(detector, paths["detector"])
    rewrite(load_checkpoint(paths["detector"]), paths["detector"], metadata)
    values = {
        "threshold": detector.threshold,
        "false_positive_rate": detector.false_positive_rate,
        "n_calibration": detector.calibrated_on,
        "bytes": {half: path.stat().st_size for half, path in paths.items()},
    }
    return Result(values, tuple(files.values()))


def rewrite(saved: Checkpoint, path: Path, metadata: Mapping[str, Any]) -> None:
    """Write a checkpoint with its floats in 16 bits and where they come from."""
    save_checkpoint(
        path, kind=saved.kind, config=saved.config, state=narrowed(saved.state), **metadata
    )


def provenance(name: str, *, seed: int) -> dict[str, Any]:
    """Where a pair comes from: data, recipe and command."""
    pair = PAIRS[name]
    return {
        "name": name,
        "data": [
            {"name": key, "split": "train", "images": used, "kept_back": kept}
            for key, (used, kept) in pair.images.items()
        ],
        "recipe": pair.config.recipe,
        "size": pair.config.size,
        "iterations": pair.config.iterations,
        "psnr_floor": pair.config.psnr_floor,
        **({} if pair.start is None else {"start": pair.start}),
        "seed": seed,
        "command": f"python tools/train_weights.py --out runs/weights {name}",
        "use": USE,
    }


def measure(name: str, seed: int, store: Store, _: Path) -> Result:
    """How visible the mark is and how surely it is found, on test images of every set."""
    trigger = load_trigger(store.path(f"packed/trigger/{name}.safetensors"))
    assert isinstance(trigger, WatermarkTrigger)
    detector = load_detector(store.path(f"packed/detector/{name}.safetensors"))
    tests = {test: measure_on(test, trigger, detector, seed) for test in PAIRS[name].tests}
    return Result({"tests": tests})


def measure_on(
    name: str, trigger: WatermarkTrigger, detector: MarkDetector, seed: int
) -> dict[str, Any]:
    """The figures on the first test images of one set, with the threshold that ships."""
    data = load_dataset(name, image_size=trigger.injector.image_size)
    test = data.test.subset(torch.arange(min(MEASURED, len(data.test))))
    images, n = quantize(test.images), len(test)
    poisoned = triggered_images(trigger, test)
    change = poisoned - images
    return {
        "n": n,
        "stealth": stealth_values(poisoned, images),
        # 1: every image gets the very same change; 0, too, where none is changed.
        "common": float(change.mean(0).square().mean() / change.square().mean().clamp(min=1e-12)),
        "corruptions": found(detector, images, poisoned, seed),
    }


def found(
    detector: MarkDetector, images: Tensor, poisoned: Tensor, seed: int
) -> dict[str, dict[str, Any]]:
    """How surely marked images are told from the same without the mark, after each corruption."""
    n, rows = len(images), {}
    for corruption in (*PAPER_CORRUPTIONS, *EXTRA_CORRUPTIONS):
        generator = torch.Generator().manual_seed(stream(seed, corruption))
        plain_, marked = corrupt_alike(named_corruption(corruption), generator, images, poisoned)
        on_plain, on_marked = detector.detect(plain_), detector.detect(marked)
        hits, false = int(on_marked.marked.sum()), int(on_plain.marked.sum())
        rows[corruption] = {
            "bits": float(balanced_bit_accuracy(on_marked.maps, detector.watermark).mean()),
            "true_positives": hits,
            "tpr_lower": exact_lower(hits, n),
            "false_positives": false,
            "fpr_upper": exact_upper(false, n),
        }
    return rows


def measure_whole(name: str, test: str, seed: int, store: Store, _: Path) -> Result:
    """The same on whole photographs of a set, which the mark is laid over."""
    trigger = load_trigger(store.path(f"packed/trigger/{name}.safetensors"))
    assert isinstance(trigger, WatermarkTrigger)
    detector = load_detector(store.path(f"packed/detector/{name}.safetensors"))
    photographs = to_pixels(load_dataset(test, image_size=PHOTOGRAPH).test.images)
    return Result({"test": test, **measure_photographs(trigger, detector, list(photographs), seed)})


def figures(measured: Mapping[str, Any]) -> dict[str, Any]:
    """What a card keeps of a record's figures: by set of test images."""
    found = {}
    for test, v in measured["tests"].items():
        stealth = {k: row["mean"] for k, row in v["stealth"].items() if isinstance(row, dict)}
        rows = v["corruptions"].items()
        found[test] = {
            "n": v["n"],
            **stealth,
            "common": v["common"],
            "found": {name: row["true_positives"] / v["n"] for name, row in rows},
            "false_alarms": {name: row["false_positives"] / v["n"] for name, row in rows},
        }
    return found


def card(name: str, seed: int, store: Store) -> dict[str, Any]:
    """What ships beside the weights: where they come from, and the figures of the record."""
    trained, packed, measured = (
        store.record(kind, {"weights": name}).values for kind in ("train", "pack", "measure")
    )
    return {
        **provenance(name, seed=seed),
        "channels": PAIRS[name].channels,
        "image_size": PAIRS[name].image_size,
        "injector_parameters": trained["injector_parameters"],
        "extractor_parameters": trained["extractor_parameters"],
        "false_positive_rate": packed["false_positive_rate"],
        "figures": figures(measured),
    }


def ship(name: str, seed: int, store: Store) -> None:
    """Put a measured pair and its card into the packages."""
    for half, home in HOMES.items():
        packed = store.path(f"packed/{half}/{name}.safetensors")
        facts = {"sha256": file_digest(packed), "bytes": packed.stat().st_size}
        shutil.copyfile(packed, home / packed.name)
        cards = json.loads((home / "cards.json").read_text("utf-8"))
        cards[name] = facts | card(name, seed, store)
        write_json(home / "cards.json", cards)


def stages(name: str, seed: int) -> Iterator[Stage]:
    """Train, pack and measure one pair."""
    images, kept = training_images(PAIRS[name], seed=seed)
    digest = hashlib.sha256(images.numpy().tobytes()).hexdigest()
    tests = {"tests": list(PAIRS[name].tests), "limit": MEASURED}
    # What it is measured on later does not make it another pair.
    trained = {name: value for name, value in plain(PAIRS[name]).items() if name != "photographs"}
    train_stage = Stage(
        "train", {"weights": name}, partial(train, name, images, seed), trained, (), digest
    )
    yield train_stage
    pack_stage = Stage(
        "pack",
        {"weights": name},
        partial(pack, name, kept, seed),
        provenance(name, seed=seed),
        (train_stage.id,),
        digest,
    )
    yield pack_stage
    yield Stage(
        "measure", {"weights": name}, partial(measure, name, seed), tests, (pack_stage.id,), digest
    )
    if (test := PAIRS[name].photographs) is not None:
        work = partial(measure_whole, name, test, seed)
        settings = {"test": test, "side": PHOTOGRAPH, "changes": list(CHANGES)}
        yield Stage("photographs", {"weights": name}, work, settings, (pack_stage.id,), digest)


def _main(argv: Sequence[str] | None) -> int:
    parser = Parser(prog="train_weights", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(PAIRS)}")
    parser.add_argument("--out", type=Path, required=True, help="folder for records and models")
    parser.add_argument("--ship", action="store_true", help="put them into the packages")
    add_common(parser, version="with the workspace")
    args = parser.parse_args(argv)
    for name in args.names or PAIRS:
        if name not in PAIRS:
            raise ValueError(f"expected a pair in {', '.join(PAIRS)}, got {name!r}")
        device = str(resolve_device(args.device))
        if not run(stages(name, args.seed), args.out, device=device).complete:
            return 1
        if args.ship:
            ship(name, args.seed, Store(args.out, device))
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(_main))
