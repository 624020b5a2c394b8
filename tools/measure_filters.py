"""What filters of incoming images catch that need no scan: STRIP, parameter scaling, layer ranks.

``python tools/measure_filters.py STUDY FOLDER --out results/artefacts-cifar10`` takes the victims
that a study has trained in its folder. A thousand test images choose the threshold, others are
judged.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from defense_nc import LayerRanks, ParameterScaling, Strip, auroc
from wm_eval.config import Study, load_study, plain
from wm_eval.engine import Result, Stage, Store, run
from wm_eval.intervals import wilson
from wm_eval.records import Key, read_study
from wm_eval.titles import CLEAN
from wm_eval.trial import Trial
from wm_inject import quantize
from wm_inject.command.common import Parser, add_common, resolve_device, run_cli
from wm_victim.metrics import triggered_images

KNOWN, JUDGED, RATE = 1000, 2000, 0.05
FILTERS: dict[str, Strip | ParameterScaling | LayerRanks] = {
    "strip": Strip(false_positive_rate=RATE, calibration=KNOWN),
    "parameter-scaling": ParameterScaling(false_positive_rate=RATE),
    "layer-ranks": LayerRanks(false_positive_rate=RATE),
}


def measure(trial: Trial, folder: Path, name: str, store: Store, _: Path) -> Result:
    """False alarms and hits of one filter on one victim."""
    victims = Store(folder, store.device)
    model, trigger = trial.load_victim(victims), trial.load_trigger(victims)
    test = trial.test_images(victims, KNOWN + JUDGED)
    known, judged = (test.subset(part) for part in torch.arange(len(test)).split([KNOWN, JUDGED]))
    found = FILTERS[name].calibrate(model, quantize(known.images), seed=trial.seed)
    attacked = judged.subset((judged.labels != trial.study.target).nonzero().flatten().cpu())
    clean = found.score(quantize(judged.images))
    triggered = found.score(triggered_images(trigger, attacked, target=trial.study.target))
    alarms, hits = (int((scores > found.threshold).sum()) for scores in (clean, triggered))
    truths = torch.arange(len(clean) + len(triggered)) >= len(clean)
    return Result(
        {
            "false_alarms": alarms,
            "false_alarms_interval": list(wilson(alarms, len(clean))),
            "n_clean": len(clean),
            "hits": hits,
            "hits_interval": list(wilson(hits, len(triggered))),
            "n_triggered": len(triggered),
            "auroc": auroc(torch.cat([clean, triggered]), truths),
            "log": dict(found.log),
        }
    )


def stages(study: Study, folder: Path, names: Sequence[str]) -> Iterator[Stage]:
    """These filters on every backdoored victim in the folder."""
    for record in read_study(folder).select(kind="victim"):
        attack, seed = str(record.key["attack"]), int(record.key["seed"])
        if attack == CLEAN or record.key["corruptions"] != "plain":
            continue
        trial = Trial(study, seed, attack=attack)
        for name, settings in ((name, FILTERS[name]) for name in names):
            key: Key = {"study": study.name, "attack": attack, "seed": seed, "filter": name}
            facts = {"victim": record.digest, "filter": plain(settings), "judged": JUDGED}
            work = partial(measure, trial, folder, name)
            yield Stage("filter", key, work, facts, data=trial.fingerprint)


def _main(argv: Sequence[str] | None) -> int:
    parser = Parser(prog="measure_filters", description=__doc__)
    parser.add_argument("study", help="the name of one that ships")
    parser.add_argument("folder", type=Path, help="where it has been run")
    parser.add_argument("--out", type=Path, required=True, help="folder for records")
    text = f"default: {','.join(FILTERS)}"
    parser.add_argument("--filters", metavar="A,B", default=",".join(FILTERS), help=text)
    add_common(parser, version="with the workspace")
    args = parser.parse_args(argv)
    made = stages(load_study(args.study), args.folder, args.filters.split(","))
    return 0 if run(made, args.out, device=str(resolve_device(args.device))).complete else 1


if __name__ == "__main__":
    sys.exit(run_cli(_main))
