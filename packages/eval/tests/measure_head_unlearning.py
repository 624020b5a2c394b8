"""Head unlearning on the networks of a population that was run: what is left of each backdoor.

    python packages/eval/tests/measure_head_unlearning.py STUDY FOLDER RECORD.json

STUDY is the population, or its settings in a file, and FOLDER where ``wm-eval run STUDY --out
FOLDER`` left its models. The target is given, the images are those that the scans had, rates are of
500 test images. Of the clean models the label that would be their target is unlearned.
"""

from __future__ import annotations

import json
import sys
import time
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from defense_reverse import HeadUnlearning
from wm_eval.config import load_study
from wm_eval.engine import Store
from wm_eval.study import population_trials
from wm_eval.titles import CLEAN
from wm_eval.trial import Trial
from wm_victim import predict
from wm_victim.metrics import triggered_images

TESTED = 500


def rates(trial: Trial, store: Store, model: nn.Module) -> dict[str, float]:
    """Accuracy, that of the target's own images, and attack success."""
    test, target = trial.test_images(store, TESTED), trial.study.target
    right = predict(model, test.images).argmax(1) == test.labels
    own = test.labels == target
    shares = {"accuracy": right, "of the label": right[own]}
    if trial.attack != CLEAN:
        images = triggered_images(trial.load_trigger(store), test, target=target)[~own]
        shares["asr"] = predict(model, images).argmax(1) == target
    return {key: round(float(value.double().mean()), 4) for key, value in shares.items()}


def row(trial: Trial, store: Store) -> dict[str, Any]:
    """One model before and after."""
    model, images = trial.load_victim(store), trial.defender_images(store)
    before, start = rates(trial, store, model), time.process_time()
    suspected = {trial.study.target: nn.Identity()}
    repaired = HeadUnlearning().repair(model, images.images, images.labels, triggers=suspected)
    seconds = round(time.process_time() - start, 1)
    return {
        **{"setting": trial.setting, "attack": trial.attack, "seed": trial.seed},
        **{"network": trial.study.victim.model, "images": len(images), "cpu_seconds": seconds},
        **{"before": before, "after": rates(trial, store, repaired.model)},
    }


def main(study: str, folder: Path, record: Path) -> None:
    """Measure all models that are there; a record that is there keeps its other rows."""
    torch.set_num_threads(1)
    rows = json.loads(record.read_text()) if record.exists() else {}
    population, store = load_study(study), Store(folder)
    for trial in chain(*(population_trials(population, name) for name in population.settings)):
        if not store.path(trial.victim_file).exists():
            continue
        rows[f"{trial.setting} {trial.attack} {trial.seed}"] = found = row(trial, store)
        print(json.dumps(found), flush=True)
    record.write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
