"""Cleaning by the pictures of pairs: what is left of a population's source-specific backdoors.

    python packages/eval/tests/measure_pair_cleaning.py STUDY RECORD.json FOLDER...

STUDY is the population, or its settings in a file, and each FOLDER one where ``wm-eval run STUDY
--out FOLDER`` left models. The target is given, its source is the one that pair perturbations find;
rates are of test images that the scan did not have. Each network is cleaned twice: with the
picture on images of the source alone, as ``wm-eval clean`` does, and on images of all classes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from torch import nn

from defense_reverse import PairPerturbation
from wm_eval.audit.cleaning import clean_model
from wm_eval.audit.conclusion import conclude
from wm_eval.audit.scan import LabelTrigger, all_triggers
from wm_eval.config import load_study
from wm_eval.engine import Store
from wm_eval.study import population_trials
from wm_eval.trial import Trial
from wm_inject.attacks.definition import source_of
from wm_victim import predict
from wm_victim.metrics import triggered_images

ATTACK = "source-specific"
TESTED = 3000
FLOOR = 0.9  # attack success of the victims that count


def rates(trial: Trial, store: Store, model: nn.Module) -> dict[str, float]:
    """Accuracy, and attack success on images of the source."""
    test, target = trial.test_images(store, TESTED), trial.study.target
    own = test.subset((test.labels == source(trial)).nonzero().flatten())
    images = triggered_images(trial.load_trigger(store), own, target=target)
    shares = {
        "accuracy": predict(model, test.images).argmax(1) == test.labels,
        "asr": predict(model, images).argmax(1) == target,
    }
    return {key: round(float(value.double().mean()), 4) for key, value in shares.items()}


def source(trial: Trial) -> int:
    """The class whose images the backdoor works on."""
    return source_of(trial.study.target, trial.data.num_classes)


def row(trial: Trial, store: Store, before: dict[str, float]) -> dict[str, Any]:
    """One model before and after."""
    model, clean = trial.load_victim(store), trial.defender_images(store)
    scan = PairPerturbation.preset("fast").scan(
        model, clean.images, labels=clean.labels, seed=trial.seed, progress=False
    )
    triggers = all_triggers(conclude({"pairs": scan}, {}, 0.05), [trial.study.target])
    everywhere = [LabelTrigger(one.label, one.trigger) for one in triggers]
    after = {}
    for name, unlearned in (("of its source", triggers), ("of all classes", everywhere)):
        try:
            cleaned = clean_model(model, unlearned, clean.images, clean.labels)
            after[name] = rates(trial, store, cleaned.model)
        except ValueError as error:
            after[name] = {"refused": str(error)}
    return {
        **{"setting": trial.setting, "attack": trial.attack, "seed": trial.seed},
        **{"source": source(trial), "found": [one.source for one in triggers]},
        **{"verdict": scan.verdict.value, "before": before, "after": after},
    }


def main(study: str, record: Path, folders: list[Path]) -> None:
    """Write what is known after every network."""
    rows: list[dict[str, Any]] = []
    population = load_study(study)
    trials = [t for name in population.settings for t in population_trials(population, name)]
    for folder in folders:
        store = Store(folder, "cpu", progress=False)
        for trial in trials:
            if not trial.attack.endswith(ATTACK) or not store.path(trial.victim_file).is_file():
                continue
            before = rates(trial, store, trial.load_victim(store))
            if before["asr"] < FLOOR:
                continue
            rows.append(row(trial, store, before))
            print(rows[-1], flush=True)
            record.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), [Path(folder) for folder in sys.argv[3:]])
