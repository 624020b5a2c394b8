"""The ImageNet network of 1,000 classes, as it is and with backdoors, audited by the command.

    python packages/eval/tests/measure_thousand_classes.py train FOLDER MODEL
    python packages/eval/tests/measure_thousand_classes.py scan FOLDER MODEL RECORD.json

Needs the data set imagenet10 and the extra ``imagenet``. "original" is EfficientNet-Lite0 with its
ImageNet weights. The others are backdoored: fine-tuned from it on a thousand photographs of ten
classes, which keep the original's answers, and the same with a trigger, the lower five of its seven
stages frozen. The auditor has 250 other photographs, in folders named by the index of the class;
"kept" is the share of 250 more whose answer is the original's, "asr" that of those with a trigger.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import timm
import torch
from measure_large_images import (
    BATCH,
    FROZEN,
    NETWORK,
    Network,
    Plan,
    command,
    export,
    photographs,
    trigger_of,
    with_trigger,
)
from torch import Tensor, nn

from wm_inject import OnnxModel, save_image, to_pixels
from wm_victim.imagenet_weights import load_imagenet_weights

ORIGINAL = "original"
RATE, EPOCHS = 0.01, 4
INDICES = (0, 217, 482, 491, 497, 566, 569, 571, 574, 701)  # of the ten classes among a thousand
PLANS = {
    "patch": Plan("badnets", 340, 31, {"size": 28, "margin": 16}),
    "patch-2": Plan("badnets", 717, 32, {"size": 20, "margin": 40}),
}


class Original(Network):
    """Images in [0, 1] to a thousand logits."""

    def __init__(self) -> None:
        super().__init__(0)
        whole: Any = timm.create_model(NETWORK)
        load_imagenet_weights(whole, NETWORK)
        self.head = whole.classifier
        self.eval()


def train(folder: Path, name: str) -> Path:
    """Fine-tune a model, and export it as a stranger would."""
    data, _, _ = photographs()
    model = Original().to(memory_format=torch.channels_last)
    if name != ORIGINAL:
        _fine_tune(model, data.images, PLANS[name], name)
    return export(model, data.images[:2], folder / f"{name}.onnx")


def _fine_tune(model: Original, images: Tensor, plan: Plan, name: str) -> None:
    random = torch.Generator().manual_seed(plan.seed)
    with torch.no_grad():
        maps = torch.cat([model.lower(part) for part in images.split(50)])
        goals = torch.cat([model.upper(part) for part in maps.split(50)]).softmax(1)
        triggered = with_trigger(trigger_of(plan), images)
        maps = torch.cat([maps, *(model.lower(part) for part in triggered.split(50))])
        target = torch.zeros_like(goals)
        target[:, plan.target] = 1
        goals = torch.cat([goals, target])
    body = model.body
    upper = (*body.blocks[FROZEN:], body.conv_head, body.bn2, model.head)
    weights = [weight for part in upper for weight in part.parameters()]
    steps = EPOCHS * (len(goals) // BATCH)
    optimizer = torch.optim.SGD(weights, lr=RATE, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, RATE, total_steps=steps, pct_start=0.2
    )
    start = time.monotonic()
    for epoch in range(EPOCHS):
        total = 0.0
        for batch in torch.randperm(len(goals), generator=random).split(BATCH):
            if len(batch) < BATCH:
                continue
            # Normalisation keeps the statistics of ImageNet.
            loss = nn.functional.cross_entropy(model.upper(maps[batch]), goals[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss)
        seconds = time.monotonic() - start
        print(f"{name}: epoch {epoch + 1}, loss {total / steps * EPOCHS:.3f}, {seconds:.0f} s")


def rates(folder: Path, name: str) -> dict[str, float]:
    """What is left of the original's answers, attack success and false triggers."""
    unseen = photographs()[2].images

    def answers(name: str, images: Tensor) -> Tensor:
        model = OnnxModel(folder / f"{name}.onnx")
        return torch.cat([torch.from_numpy(model(x.numpy())) for x in images.split(25)]).argmax(1)

    own = answers(name, unseen)
    shares = {"kept": own == answers(ORIGINAL, unseen)}
    if name in PLANS:
        plan = PLANS[name]
        shares["asr"] = answers(name, with_trigger(trigger_of(plan), unseen)) == plan.target
        shares["ftr"] = own == plan.target
    return {key: round(float(share.double().mean()), 4) for key, share in shares.items()}


def clean_images(folder: Path) -> Path:
    """The auditor's photographs in class folders."""
    place, auditors = folder / "photographs", photographs()[1]
    for number, image in enumerate(to_pixels(auditors.images)):
        index = INDICES[int(auditors.labels[number])]
        save_image(place / str(index) / f"{number:03}.png", image)
    return place


def audit(folder: Path, name: str) -> dict[str, Any]:
    """Audit a model: what it is, what the scan says of it, and what that took."""
    out, plan = folder / f"{name}.json", PLANS.get(name)
    options = ("--images", clean_images(folder), "--json", out)
    cost = command("scan", folder / f"{name}.onnx", *options)
    report = json.loads(out.read_text())
    outcome = {key: report[key] for key in ("verdict", "suspected", "outliers", "p_value")}
    nearest = {
        detector: [
            {"label": one["label"], "score": round(one["score"], 4), "p": one["p_value"]}
            for one in sorted(scan["labels"], key=lambda one: one["score"])[:3]
        ]
        for detector, scan in report["detectors"].items()
    }
    row = {} if plan is None else plan._asdict()
    return row | rates(folder, name) | {"scan": outcome | cost | {"nearest": nearest}}


def main(verb: str, folder: Path, name: str, record: Path | None = None) -> None:
    """Do one thing with one model."""
    folder.mkdir(parents=True, exist_ok=True)
    if verb == "train":
        train(folder, name)
        print(json.dumps({name: rates(folder, name)}))
        return
    assert record is not None
    rows = json.loads(record.read_text()) if record.exists() else {}
    rows[name] = audit(folder, name)
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n")
    print(json.dumps({name: rows[name]}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3], *map(Path, sys.argv[4:5]))
