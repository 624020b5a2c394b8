"""The stages of cleaning, one function each: measure a victim, scan it, clean it, scan it again.

A victim and its trigger come from the files of its attack study. What the scans reverse and what
unlearning leaves are files as well, so that every stage can be repeated from the ones before it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from defense_nc import ScanReport, Verdict
from defense_nc.protocols import Mitigator
from wm_eval.attacks.config import CLEAN
from wm_eval.attacks.study import AttackStudy
from wm_eval.cleaning.config import RESCANNED, SCANNED_BY, CleaningConfig
from wm_eval.cleaning.measures import cleaning_values
from wm_eval.detectors import detector as find_detector
from wm_eval.measure import metrics_values, scan_values
from wm_eval.robustness import Outcomes, outcomes, summarize
from wm_eval.stages import NoTrigger
from wm_eval.study import load_reversed, save_reversed
from wm_eval.workspace import Made
from wm_inject import load_checkpoint, save_checkpoint
from wm_victim import ImageSet, defender_subset, load_classifier, save_classifier

_OUTCOMES = "outcomes"
_SUFFIX = ".safetensors"


class Job(NamedTuple):
    """One cleaning: of which victim, by what, and with how much clean data."""

    attack: str
    method: str
    share: float
    forced: bool = False  # with the true target's reversed trigger, whatever the scan said

    def stage(self, seed: int) -> str:
        """The name of its record."""
        return f"{'forced' if self.forced else 'clean'}-{self._middle}-{seed}"

    def rescan(self, seed: int) -> str:
        """The name of the record of the scan after it."""
        return f"rescan-{SCANNED_BY[self.method]}-{self._middle}-{seed}"

    def model(self, seed: int) -> str:
        """Where the cleaned model is kept, inside the study."""
        return f"models/cleaned-{self._middle}-{seed}{_SUFFIX}"

    @property
    def _middle(self) -> str:
        return f"{self.method}-{self.share:g}-{self.attack}"


def describe(study: AttackStudy, config: CleaningConfig) -> Made:
    """What the images are, and what was asked for: tables tell from it what is missing."""
    data = study.data
    planned = {
        "attacks": list(config.attacks),
        "methods": list(config.rows),
        "shares": list(config.shares),
        "seeds": list(config.study.seeds),
    }
    return Made(
        {
            "name": data.name,
            "n_train": len(data.train),
            "n_measured": len(study.test(config.study.measure.limit)),
            "fingerprint": data.fingerprint,
            "profile": config.study.profile,
            "model": config.study.victim.model,
            "target": config.study.target,
            "steps": config.steps,
            "planned": planned,
        }
    )


def measure_victim(study: AttackStudy, attack: str, _: Path) -> Made:
    """What a victim answers before it is cleaned, image by image: what all methods start from."""
    found = _measure(study, study.victim("plain", attack), attack)
    file = f"models/{_OUTCOMES}-{attack}-{study.seed}{_SUFFIX}"
    save_checkpoint(
        study.space.path(file),
        kind=_OUTCOMES,
        config={},
        state=found._asdict(),
        metadata={"seed": study.seed, "attack": attack},
    )
    values = {"attack": attack, "measured": metrics_values(summarize(found))}
    return Made(values, (file,))


def scan_victim(
    study: AttackStudy, config: CleaningConfig, detector: str, attack: str, checkpoint: Path
) -> Made:
    """Scan a victim; keep the reversed triggers that something may be cleaned with."""
    report = _scan(study, config, detector, study.victim("plain", attack), checkpoint)
    values = scan_values(report)
    named, forced = named_labels(values), forced_label(study, values, attack)
    files = []
    for label in sorted({*named, forced} & set(report.triggers)):
        files.append(_reversed_file(study, detector, attack, label))
        save_reversed(report.triggers[label].cpu(), study.space.path(files[-1]))
    values |= {
        "attack": attack,
        "defence": detector,
        "true_target": None if attack == CLEAN else study.config.target,
        "named": named,
        "forced_label": forced,
        "n_images": config.images,
    }
    return Made(values, files)


def clean_victim(study: AttackStudy, mitigator: Mitigator, job: Job, _: Path) -> Made:
    """Clean a victim, or say why not, and measure what is left on the same images as before."""
    before = _outcomes_before(study, job.attack)
    mine = _defender(study, job.share)
    used, why, triggers = _told(study, job)
    values: dict[str, Any] = {
        "attack": job.attack,
        "method": job.method,
        "share": job.share,
        "forced": job.forced,
        "images": len(mine),
        "labels": used,
        "why": why,
        "cleaned": triggers is None or bool(triggers),
    }
    backdoored, files = job.attack != CLEAN, []
    if not values["cleaned"]:
        same = cleaning_values(before, before, backdoored=backdoored)
        return Made(values | same | {"steps": 0, "log": {}})
    repaired = mitigator.repair(
        study.victim("plain", job.attack),
        mine.images,
        mine.labels,
        triggers=triggers,
        seed=study.seed,
        progress=study.progress,
    )
    if job.method in RESCANNED and not job.forced:
        files.append(job.model(study.seed))
        metadata = {"seed": study.seed, "attack": job.attack, "method": job.method}
        save_classifier(repaired.model.cpu(), study.space.path(files[0]), metadata)
    after = _measure(study, repaired.model.to(study.device), job.attack)
    values |= {
        "steps": repaired.log.get("steps", getattr(mitigator, "steps", 0)),
        "log": dict(repaired.log),
    }
    return Made(values | cleaning_values(before, after, backdoored=backdoored), files)


def rescan_cleaned(study: AttackStudy, config: CleaningConfig, job: Job, checkpoint: Path) -> Made:
    """Scan what was cleaned as the victim was scanned: does the verdict agree that it is clean?"""
    detector = SCANNED_BY[job.method]
    model = load_classifier(study.space.path(job.model(study.seed))).to(study.device).eval()
    values = scan_values(_scan(study, config, detector, model, checkpoint))
    first = study.space.record(f"scan-{detector}-{job.attack}-{study.seed}").values
    return Made(
        values
        | {
            "attack": job.attack,
            "method": job.method,
            "share": job.share,
            "defence": detector,
            "named": named_labels(values),
            "named_before": first["named"],
            "verdict_before": first["verdict"],
            "agrees": values["verdict"] == Verdict.CLEAN.value,
        }
    )


def named_labels(scan: Mapping[str, Any]) -> list[int]:
    """The labels that a scan says are backdoor targets: none, unless its verdict says so."""
    return list(scan["suspected"]) if scan["verdict"] == Verdict.BACKDOORED.value else []


def forced_label(study: AttackStudy, scan: Mapping[str, Any], attack: str) -> int:
    """Whose trigger is unlearned by force: the true target's, or the nearest one's if clean."""
    if attack != CLEAN:
        return study.config.target
    return int(
        min(scan["labels"], key=lambda x: (not x["converged"], x["ratio"], x["label"]))["label"]
    )


def forces(scan: Mapping[str, Any]) -> bool:
    """Is there something to force: did the scan leave the true target out, or name nothing?"""
    return scan["forced_label"] not in scan["named"]


def _told(study: AttackStudy, job: Job) -> tuple[list[int], str, dict[int, nn.Module] | None]:
    """Labels, why these, and their triggers: None for a blind method, none if nothing is named."""
    detector = SCANNED_BY.get(job.method)
    if detector is None:
        return [], "blind: needs no scan", None
    scan = study.space.record(f"scan-{detector}-{job.attack}-{study.seed}").values
    if job.forced:
        what = "the nearest label" if job.attack == CLEAN else "the true target"
        labels, why = [int(scan["forced_label"])], f"forced: {what}, which the scan did not name"
    elif scan["named"]:
        labels = [int(label) for label in scan["named"]]
        why = f"the scan named {', '.join(map(str, labels))}"
    else:
        return [], f"nothing named: not cleaned ({scan['verdict']})", {}
    files = {label: _reversed_file(study, detector, job.attack, label) for label in labels}
    for label, file in files.items():
        if file not in scan["files"]:
            raise ValueError(f"expected a reversed trigger of label {label}, the scan kept none")
    triggers = {
        label: load_reversed(study.space.path(file)).to(study.device)
        for label, file in files.items()
    }
    return labels, why, triggers


def _scan(
    study: AttackStudy, config: CleaningConfig, detector: str, model: nn.Module, checkpoint: Path
) -> ScanReport:
    train = study.data.train
    mine = defender_subset(train, count=min(config.images, len(train)), seed=study.seed)
    mine = mine.to(study.device)
    settings: Any = find_detector(detector, alpha=config.alpha)
    report: ScanReport = replace(settings, config=getattr(config, detector)).scan(
        model,
        mine.images,
        labels=mine.labels,
        seed=study.seed,
        progress=study.progress,
        checkpoint=checkpoint,
    )
    return report


def _defender(study: AttackStudy, share: float) -> ImageSet:
    return defender_subset(study.data.train, share=share, seed=study.seed).to(study.device)


def _measure(study: AttackStudy, model: nn.Module, attack: str) -> Outcomes:
    clean = attack == CLEAN
    trigger: Callable[..., Any] = NoTrigger() if clean else study.trigger(attack, "plain")
    return outcomes(
        model,
        trigger,
        study.test(study.config.measure.limit),
        target=study.config.target,
        corruptions={"none": study.corruptions["none"]},
        seed=study.seed,
        label_map="all-to-one" if clean else study.attack(attack).label_map,
    )["none"]


def _outcomes_before(study: AttackStudy, attack: str) -> Outcomes:
    file = study.space.path(f"models/{_OUTCOMES}-{attack}-{study.seed}{_SUFFIX}")
    return Outcomes(**load_checkpoint(file, kind=_OUTCOMES).state)


def _reversed_file(study: AttackStudy, detector: str, attack: str, label: int) -> str:
    return f"models/reversed-{detector}-{attack}-{study.seed}-{label}{_SUFFIX}"


__all__ = [
    "Job",
    "clean_victim",
    "describe",
    "forced_label",
    "forces",
    "measure_victim",
    "named_labels",
    "rescan_cleaned",
    "scan_victim",
]
