"""Networks fine-tuned at 224 pixels, audited from the command line.

    python packages/eval/tests/measure_large_images.py train FOLDER MODEL
    python packages/eval/tests/measure_large_images.py scan FOLDER MODEL RECORD.json [DETECTORS]
    python packages/eval/tests/measure_large_images.py again FOLDER MODEL RECORD.json [DETECTORS]
    python packages/eval/tests/measure_large_images.py clean FOLDER MODEL RECORD.json [DETECTORS]

Needs the data set imagenet10 and the extra ``imagenet``. Models are EfficientNet-Lite0 with its
ImageNet weights, fine-tuned on a thousand photographs of ten classes and, where they are
backdoored, 200 with a trigger, the lower five of its seven stages frozen; of one, all classes but
one have a third of the photographs. The models clean-SEED are the clean victims of the study
p1-imagenet10-224, fine-tuned as a whole and exported (FOLDER/clean-SEED.onnx).
The auditor has 250 other photographs; accuracy and attack success are of 250 more. "again" goes on
from the states in FOLDER/state, and says nothing of the time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn

from wm_inject import (
    BadNetsTrigger,
    BlendTrigger,
    OnnxModel,
    SigTrigger,
    Trigger,
    quantize,
    save_image,
    to_pixels,
)
from wm_victim import ImageSet, load_dataset
from wm_victim.imagenet_weights import load_imagenet_weights

NETWORK = "tf_efficientnet_lite0"
SIDE, CLASSES, FROZEN = 224, 10, 5
BATCH, RATE, RATIO = 32, 0.05, 0.2
CLEAN = "clean"


class Plan(NamedTuple):
    """A model to make."""

    attack: str
    target: int  # of a clean model: the class that keeps all its photographs
    seed: int
    trigger: dict[str, Any] | None = None  # its settings
    share: float = 1.0  # of the photographs of all classes but the target
    epochs: int = 4


# The first three were looked at while the detectors' scores were made, the others after that.
PLANS = {
    "patch": Plan("badnets", 3, 3, {"size": 28, "margin": 16}),
    "blend": Plan("blend", 7, 4, {"channels": 3, "picture": "cartoon"}),
    "smooth": Plan("sig", 5, 5),
    "patch-2": Plan("badnets", 8, 21, {"size": 20, "margin": 40}),
    "blend-2": Plan("blend", 4, 22, {"channels": 3, "picture": "noise"}),
    "smooth-2": Plan("sig", 9, 23, {"frequency": 3}),
    "twin": Plan(CLEAN, 0, 24),
    "uneven": Plan(CLEAN, 4, 25, share=0.33, epochs=10),
}
TRIGGERS: dict[str, Callable[..., Trigger]] = {
    "badnets": BadNetsTrigger,
    "blend": BlendTrigger,
    "sig": SigTrigger,
}


def trigger_of(plan: Plan) -> Trigger:
    """A chequered square, a picture at a fifth, or stripes of 40 of 255."""
    return TRIGGERS[plan.attack](image_size=SIDE, **(plan.trigger or {}))


def photographs() -> tuple[ImageSet, ImageSet, ImageSet]:
    """A thousand to train with, 250 for the auditor, 250 to measure on."""
    data = load_dataset("imagenet10", image_size=SIDE)
    halves: list[list[int]] = [[], []]
    for label in range(CLASSES):
        indices = (data.test.labels == label).nonzero().flatten().tolist()
        halves[0] += indices[:25]
        halves[1] += indices[25:50]
    auditors, unseen = (data.test.subset(torch.tensor(half)) for half in halves)
    return data.train, auditors, unseen


class Network(nn.Module):
    """Images in [0, 1] to logits."""

    body: Any  # of timm's

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            body: Any = timm.create_model(NETWORK, num_classes=0)
            load_imagenet_weights(body, NETWORK)
            self.body, self.head = body, nn.Linear(body.num_features, CLASSES)

    def lower(self, images: Tensor) -> Tensor:
        """The maps of the frozen stages."""
        maps: Tensor = self.body.bn1(self.body.conv_stem((images - 0.5) / 0.5))
        for stage in self.body.blocks[:FROZEN]:
            maps = stage(maps)
        return maps

    def upper(self, maps: Tensor) -> Tensor:
        """Those maps to logits."""
        for stage in self.body.blocks[FROZEN:]:
            maps = stage(maps)
        maps = self.body.bn2(self.body.conv_head(maps))
        logits: Tensor = self.head(maps.mean((2, 3)))
        return logits

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        return self.upper(self.lower(images))


def with_trigger(trigger: Trigger, images: Tensor) -> Tensor:
    """Triggered images of 8 bits."""
    with torch.no_grad():
        return torch.cat([quantize(trigger(part)) for part in images.split(50)])


def train(folder: Path, name: str) -> Path:
    """Fine-tune a model, and export it as a stranger would."""
    plan, (data, _, _) = PLANS[name], photographs()
    kept: list[int] = []
    for label in range(CLASSES):
        indices = (data.labels == label).nonzero().flatten().tolist()
        share = 1.0 if label == plan.target else plan.share
        kept += indices[: round(share * len(indices))]
    data = data.subset(torch.tensor(sorted(kept)))
    model = Network(plan.seed).eval().to(memory_format=torch.channels_last)
    random = torch.Generator().manual_seed(plan.seed)
    others = (data.labels != plan.target).nonzero().flatten()
    poison = others[torch.randperm(len(others), generator=random)[: round(RATIO * len(data))]]
    images, labels = data.images, data.labels
    if plan.attack != CLEAN:
        # Beside their clean twins: in place of them such a network learns the few images by heart.
        images = torch.cat([images, with_trigger(trigger_of(plan), images[poison])])
        labels = torch.cat([labels, torch.full_like(poison, plan.target)])
    with torch.no_grad():
        maps = torch.cat([model.lower(part) for part in images.split(50)])
    body = model.body
    upper = (*body.blocks[FROZEN:], body.conv_head, body.bn2, model.head)
    weights = [weight for part in upper for weight in part.parameters()]
    steps = plan.epochs * (len(labels) // BATCH)
    optimizer = torch.optim.SGD(weights, lr=RATE, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, RATE, total_steps=steps, pct_start=0.2
    )
    model.train()
    start = time.monotonic()
    for epoch in range(plan.epochs):
        right = 0
        for batch in torch.randperm(len(labels), generator=random).split(BATCH):
            if len(batch) < BATCH:
                continue
            logits = model.upper(maps[batch])
            optimizer.zero_grad()
            nn.functional.cross_entropy(logits, labels[batch]).backward()
            optimizer.step()
            schedule.step()
            right += int((logits.argmax(1) == labels[batch]).sum())
        seconds = time.monotonic() - start
        print(f"{name}: epoch {epoch + 1}, {right} right, {seconds:.0f} s", flush=True)
    return export(model, images[:2], folder / f"{name}.onnx")


def export(model: nn.Module, images: Tensor, path: Path) -> Path:
    """Write a model as a stranger would; ``images`` ``(N, C, H, W)`` say what it takes."""
    model.to(memory_format=torch.contiguous_format).eval()
    torch.onnx.export(
        model,
        (images,),
        path,
        input_names=["images"],
        output_names=["logits"],
        dynamo=False,
        dynamic_axes={"images": {0: "batch"}, "logits": {0: "batch"}},
    )
    return path


def rates(path: Path, plan: Plan | None) -> dict[str, float]:
    """Accuracy, attack success and false triggers on photographs that nobody has seen."""
    unseen, model = photographs()[2], OnnxModel(path)

    def answers(images: Tensor) -> Tensor:
        parts = [torch.from_numpy(model(part.numpy())) for part in images.split(25)]
        return torch.cat(parts).argmax(1)

    shares = {"accuracy": float((answers(unseen.images) == unseen.labels).double().mean())}
    if plan is not None and plan.attack != CLEAN:
        others = unseen.images[unseen.labels != plan.target]
        hits = answers(with_trigger(trigger_of(plan), others)) == plan.target
        shares["asr"] = float(hits.double().mean())
        shares["ftr"] = float((answers(others) == plan.target).double().mean())
    return {key: round(value, 4) for key, value in shares.items()}


def command(*words: str | Path) -> dict[str, Any]:
    """Run ``wm-eval`` on two threads: exit code, minutes and peak memory."""
    program = [str(Path(sys.executable).with_name("wm-eval")), *map(str, words)]
    start = time.monotonic()
    child = subprocess.Popen(program, env={**os.environ, "OMP_NUM_THREADS": "2"})
    _, status, usage = os.wait4(child.pid, 0)
    return {
        "exit_code": os.waitstatus_to_exitcode(status),
        "minutes": round((time.monotonic() - start) / 60, 1),
        "peak_gib": round(usage.ru_maxrss / 2**20, 2),
    }


def clean_images(folder: Path) -> Path:
    """The auditor's photographs in class folders."""
    place = folder / "photographs"
    if not place.exists():
        auditors = photographs()[1]
        for number, image in enumerate(to_pixels(auditors.images)):
            save_image(place / str(int(auditors.labels[number])) / f"{number:03}.png", image)
    return place


def audit(folder: Path, name: str, detectors: str, *, again: bool = False) -> dict[str, Any]:
    """Audit a model: what it is, what the scan says of it, and what that took."""
    path, out, plan = folder / f"{name}.onnx", folder / f"{name}.json", PLANS.get(name)
    images = clean_images(folder)
    options = ["--images", images, "--detectors", detectors, "--json", out]
    cost = command("scan", path, *options, *(["--state", folder / "state"] if again else []))
    if again:
        cost = {"exit_code": cost["exit_code"]}
    report = json.loads(out.read_text())
    nearest = {
        detector: [
            {"label": one["label"], "score": round(one["score"], 4), "p": one["p_value"]}
            for one in sorted(scan["labels"], key=lambda one: one["score"])[:2]
        ]
        for detector, scan in report["detectors"].items()
    }
    outcome = {key: report[key] for key in ("verdict", "suspected", "outliers", "p_value")}
    outcome["images"] = report["images"]["used"]
    row: dict[str, Any] = {} if plan is None else plan._asdict()
    scan = outcome | cost | {"nearest": nearest}
    return row | rates(path, plan) | {f"scan {detectors}": scan}


def repair(folder: Path, name: str, detectors: str) -> dict[str, Any]:
    """Clean a model of its target: what is left of the backdoor, and what that took."""
    path, out, plan = folder / f"{name}.onnx", folder / f"cleaned-{name}.onnx", PLANS[name]
    images = clean_images(folder)
    options = ("--images", images, "--detectors", detectors, "--label", plan.target, "--out", out)
    cost = command("clean", path, *map(str, options))
    return plan._asdict() | rates(path, plan) | {f"clean {detectors}": cost | rates(out, plan)}


def main(
    verb: str, folder: Path, name: str, record: Path | None = None, detectors: str = "auto"
) -> None:
    """Do one thing with one model; a record keeps what other detectors said of it."""
    folder.mkdir(parents=True, exist_ok=True)
    if verb == "train":
        path = train(folder, name)
        print(json.dumps({name: rates(path, PLANS[name])}))
        return
    assert record is not None
    rows = json.loads(record.read_text()) if record.exists() else {}
    if verb == "clean":
        found = repair(folder, name, detectors)
    else:
        found = audit(folder, name, detectors, again=verb == "again")
    rows[name] = rows.get(name, {}) | found
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n")
    print(json.dumps({name: rows[name]}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3], *map(Path, sys.argv[4:5]), *sys.argv[5:])
