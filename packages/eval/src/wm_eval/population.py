"""Many models, judged by detectors that are calibrated on one split and tested on the other.

Nothing is scanned anew. A detector's null distribution is fitted to the clean models of the
calibration split, one for each number of classes, and every model of the test split is judged by it
from its recorded scores. Models of the unseen split are judged by the clean ones of that split that
are of another kind of network, whatever their classes. Several detectors are also judged together,
as an audit does.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from defense_nc import (
    Calibration,
    CleanModel,
    Finding,
    ModelInfo,
    ScanReport,
    Verdict,
    auroc,
    clean_model,
    fit_calibration,
    judge,
)
from defense_nc.verdict import load_calibration
from wm_eval.audit.conclusion import conclude
from wm_eval.intervals import Interval, exact_interval
from wm_eval.numbers import victim_asr
from wm_eval.records import Record, StudyRecords, read_study
from wm_eval.titles import ATTACKS, AUDIT, CALIBRATED, CLEAN, EVERY_LABEL, PAPERS

ALL_SETTINGS = "all"
ANY_CLASSES = 0  # stands for the number of classes of a null distribution for all of them
COMBINED = "all"  # the detectors of `together` as one
MIN_MODELS = 5  # clean models of the calibration split, or a detector is not judged
_INFINITE = 1e9  # stands in for an infinite index


class Judged(NamedTuple):
    """A model of the test or the unseen split, judged by the calibration."""

    record: Record
    verdict: Verdict
    suspected: tuple[int, ...]
    p_value: float
    paper_index: float | None  # None for several detectors combined
    paper_flagged: tuple[int, ...]
    pairs: tuple[tuple[int, int], ...] = ()  # of the suspected labels, each with its source

    @property
    def backdoored(self) -> bool:
        """Whether the verdict says so."""
        return self.verdict is Verdict.BACKDOORED

    @property
    def correct(self) -> bool:
        """Whether it does and names the true target, or each class with its own.

        Where every label is a target, none is wrong, and none need be named.
        """
        values = self.record.values
        if self.record.key["attack"] in EVERY_LABEL:
            return self.backdoored
        if pairs := values.get("true_pairs"):
            return self.backdoored and {tuple(pair) for pair in pairs} <= set(self.pairs)
        return self.backdoored and values["true_target"] in self.suspected


class Rate(NamedTuple):
    """A count with its exact 95 % interval."""

    hits: int
    n: int

    @property
    def interval(self) -> Interval:
        """Clopper and Pearson's."""
        return exact_interval(self.hits, self.n)


class Row(NamedTuple):
    """One detector and one kind of model; rates are None where there is no such model."""

    detector: str
    attack: str
    setting: str  # data set and network, the network alone if it is unseen, or "all"
    trained: int
    judged: int  # of them, backdoored ones whose attack success reached the floor
    asr_min: float | None
    flagged: Rate | None  # verdict "backdoored"
    named: Rate | None  # with the true target among the suspected labels
    inconclusive: int
    paper_flagged: Rate | None  # index above 2
    paper_named: Rate | None
    auroc: float | None  # of the smallest p-value, against the clean models of these settings
    auroc_interval: tuple[float, float] | None
    paper_auroc: float | None  # of the papers' index


class Population(NamedTuple):
    """Everything that is said of a population."""

    # By detector and number of classes; `ANY_CLASSES` for the unseen split: from all its clean
    # models, as it would ship.
    calibrations: Mapping[tuple[str, int], Calibration]
    judged: Mapping[str, tuple[Judged, ...]]  # by detector
    rows: tuple[Row, ...]
    left_out: Mapping[tuple[str, int], int]  # number of clean models where they are too few


def population_scans(study: StudyRecords) -> list[Record]:
    """The scans that belong to a split, by setting, each with the attack success of its victim.

    Where the study's name is known, they have it too: models of several studies have one name else.

    Raises:
        ValueError: There are none.
    """
    scans = [r for r in study.select(kind="scan") if "split" in r.key]
    if not scans:
        raise ValueError("expected scans with a split, got none")
    plan = study.one("study")
    name = {"study": plan.key["study"]} if plan else {}
    scans = [replace(r, values={**r.values, **name, "asr": victim_asr(study, r)}) for r in scans]
    return sorted(scans, key=lambda r: str(r.key.get("setting", "")))


def calibrate(scans: Sequence[Record]) -> Calibration:
    """The null distribution of one detector, from clean models of the calibration or unseen split.

    Args:
        scans: Of one of them; those of the calibration split are of models with as many classes.

    Raises:
        ValueError: Fewer than five such models, or scans with different settings or numbers of
            images in the two splits.
    """
    models = _clean_models(scans)
    if len(models) < MIN_MODELS:
        raise _too_few(len(models))
    return _fit([model for _, model in models], models[0][0])


def calibrations_of(folder: Path, *others: Path) -> list[Calibration]:
    """What a study's clean models calibrate, as it ships, from its records.

    Models have their study's name before their own: no other study has the same ones.

    Args:
        others: Studies whose clean models join, as for `summarise`.

    Raises:
        ValueError: As `population_scans` and `summarise`.
    """

    def scans(folder: Path) -> list[Record]:
        every = population_scans(read_study(folder))
        return [replace(r, values={**r.values, "study": folder.name}) for r in every]

    beside = [record for other in others for record in scans(other)]
    return [*summarise(scans(folder), beside=beside).calibrations.values()]


def summarise(
    scans: Sequence[Record],
    *,
    floor: float = 0.9,
    alpha: float = 0.05,
    beside: Sequence[Record] = (),
) -> Population:
    """Judge the test split and count.

    Detectors need not have seen the same models. Scans for whose number of classes a detector
    cannot be calibrated are left out. Those of `together` are judged on the models that all have
    seen.

    Args:
        scans: Of `population_scans`, both splits.
        floor: Attack success that a backdoored model must have to be judged.
        alpha: Share of clean models that may be called backdoored.
        beside: Scans of other studies: clean models of the unseen split that a detector with the
            same settings has seen join its null distribution, and none is judged.

    Raises:
        ValueError: No scans, a rate out of range, no detector with five clean models in the
            calibration split, or one with different settings or numbers of images in the splits.
    """
    if not 0 < floor <= 1 or not 0 < alpha < 1:
        raise ValueError(f"expected floor in (0, 1] and alpha in (0, 1), got {floor}, {alpha}")
    if not scans:
        raise ValueError("expected at least one scan of a population, got none")
    calibrations: dict[tuple[str, int], Calibration] = {}
    groups: dict[str, list[_Group]] = {}
    judged: dict[str, tuple[Judged, ...]] = {}
    left_out: dict[tuple[str, int], int] = {}
    by_detector = {
        name: [r for r in scans if r.key["detector"] == name] for name in detectors_in_order(scans)
    }
    for detector, every in by_detector.items():
        joining = [r for r in beside if _joins(r, every[0])]
        for classes, same in _groups(every).items():
            reference = [*same, *joining] if classes == ANY_CLASSES else same
            if (count := len(_clean_models(reference))) < MIN_MODELS:
                left_out[detector, classes] = count
            else:
                calibrations[detector, classes] = calibrate(reference)
        if any(name == detector for name, _ in calibrations):
            groups[detector] = list(_calibrated(every, joining))
            judged[detector] = tuple(_judge_all(groups[detector], alpha))
    if not judged:
        raise _too_few(max(left_out.values()))
    if names := together(judged):
        pairs = {
            name: [(r, calibration) for models, calibration in groups[name] for r in models]
            for name in names
        }
        first = {name: judged[name] for name in names}
        judged = {**first, COMBINED: _combined(pairs, alpha), **judged}
    rows = [
        row
        for detector, results in judged.items()
        for attack in (CLEAN, *(name for name in ATTACKS if name != CLEAN))
        for row in _count(detector, attack, results, floor)
    ]
    return Population(calibrations, judged, tuple(rows), left_out)


def judge_shipped(study: StudyRecords, *, alpha: float = 0.05) -> dict[str, tuple[Judged, ...]]:
    """A study's scans by detector, judged by the calibrations that ship for their settings.

    `COMBINED` are the models that all detectors of `together` have seen. Scans whose settings have
    no calibration are left out, and so is the unseen split: it may be what was shipped.
    """
    by_detector: dict[str, list[tuple[Record, Calibration]]] = {}
    for r in study.select(kind="scan"):
        if r.key.get("split") == "unseen" or r.settings.get("detector") is None:
            continue
        if (calibration := _shipped(r)) is not None:
            record = replace(r, values={**r.values, "asr": victim_asr(study, r)})
            by_detector.setdefault(str(r.key["detector"]), []).append((record, calibration))

    def judged(name: str, alpha: float) -> tuple[Judged, ...]:
        return tuple(_judge(record, own, alpha) for record, own in by_detector[name])

    judged_by = {name: judged(name, alpha) for name in CALIBRATED if name in by_detector}
    if names := together(by_detector):
        judged_by[COMBINED] = _combined({name: by_detector[name] for name in names}, alpha)
    return judged_by


def shipped_report(record: Record, alpha: float) -> ScanReport:
    """A recorded scan, judged by the calibration that ships for its settings, if any.

    It has no triggers.
    """
    return _report(record, _shipped(record), alpha)


def together(names: Collection[str]) -> tuple[str, ...]:
    """The detectors that are judged as one: of an audit's those at hand, else the papers', or none.

    One alone is none.
    """
    every = (tuple(name for name in group if name in names) for group in (AUDIT, PAPERS))
    return next((group for group in every if len(group) > 1), ())


def detectors_in_order(scans: Iterable[Record]) -> list[str]:
    """The different detectors, the calibrated ones before all others."""
    names = {str(r.key["detector"]) for r in scans}
    return sorted(names, key=lambda name: (name not in CALIBRATED, name))


def auroc_interval(
    scores: torch.Tensor, truths: torch.Tensor, *, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """A 95 % bootstrap interval of `defense_nc.auroc`, over the models of either kind.

    Where the models are perfectly separated it is a point, however few they are.

    Args:
        scores: Float ``(N,)``, larger for models held to be backdoored.
        truths: bool ``(N,)``, both kinds.
        draws: Bootstrap samples.
        seed: Of the samples.

    Raises:
        ValueError: As `defense_nc.auroc`, or no draws.
    """
    if draws < 1:
        raise ValueError(f"expected draws >= 1, got {draws}")
    auroc(scores, truths)  # refuses what cannot be compared
    generator = torch.Generator().manual_seed(seed)
    low, high = scores[~truths].double(), scores[truths].double()
    wins = (high[:, None] > low[None]).double() + 0.5 * (high[:, None] == low[None]).double()
    weights_high, weights_low = (_draws(len(x), draws, generator) for x in (high, low))
    samples = ((weights_high @ wins) * weights_low).sum(1) / wins.numel()
    bounds = samples.quantile(torch.tensor([0.025, 0.975]).double())
    return float(bounds[0]), float(bounds[1])


def _count(detector: str, attack: str, test: Sequence[Judged], floor: float) -> Iterator[Row]:
    """A row for every setting that has such models, and one for all if there are several."""
    models = [j for j in test if j.record.key["attack"] == attack]
    clean = [j for j in test if j.record.key["attack"] == CLEAN]
    settings = sorted({_setting(j) for j in models})
    for setting in [*settings, ALL_SETTINGS] if len(settings) > 1 else settings:
        selected = [j for j in models if setting in (ALL_SETTINGS, _setting(j))]
        peers = [j for j in clean if _setting(j) in {_setting(h) for h in selected}]
        yield _row(detector, attack, setting, selected, peers, floor)


def _row(
    detector: str,
    attack: str,
    setting: str,
    models: Sequence[Judged],
    clean: Sequence[Judged],
    floor: float,
) -> Row:
    attacked = attack != CLEAN
    rates = [float(j.record.values["asr"] or 0.0) for j in models]
    judged = [j for j, asr in zip(models, rates, strict=True) if not attacked or asr >= floor]
    n, paper = len(judged), all(j.paper_index is not None for j in judged)
    paper_right = sum(j.record.values["true_target"] in j.paper_flagged for j in judged)
    compared = attacked and bool(judged) and bool(clean)
    truths = torch.tensor([False] * len(clean) + [True] * n)
    # Smaller p-values are more suspicious.
    scores = torch.tensor([-j.p_value for j in (*clean, *judged)], dtype=torch.float64)
    index = torch.tensor([min(j.paper_index or 0.0, _INFINITE) for j in (*clean, *judged)]).double()
    return Row(
        detector,
        attack,
        setting,
        trained=len(models),
        judged=n,
        asr_min=min((asr for asr in rates if asr >= floor), default=None) if attacked else None,
        flagged=Rate(sum(j.backdoored for j in judged), n) if n else None,
        named=Rate(sum(j.correct for j in judged), n) if n and attacked else None,
        inconclusive=sum(j.verdict is Verdict.INCONCLUSIVE for j in judged),
        paper_flagged=Rate(sum(bool(j.paper_flagged) for j in judged), n) if n and paper else None,
        paper_named=Rate(paper_right, n) if n and attacked and paper else None,
        auroc=auroc(scores, truths) if compared else None,
        auroc_interval=auroc_interval(scores, truths) if compared else None,
        paper_auroc=auroc(index, truths) if compared and paper else None,
    )


def _fit(models: Collection[CleanModel], like: Record) -> Calibration:
    """The calibration of the detector that made a scan."""
    return fit_calibration(
        tuple(models),
        detector=like.values["detector"],
        preset=like.values["preset"],
        settings=like.settings["detector"],
        versions=dict(like.versions),
    )


def _clean_models(scans: Sequence[Record]) -> list[tuple[Record, CleanModel]]:
    """What one detector can be calibrated on, by scan, from scans that were all made alike."""
    if any(r.settings["detector"] != scans[0].settings["detector"] for r in scans):
        raise ValueError("expected one set of detector settings in both splits, got more")
    images = sorted({r.settings["images"] for r in scans})
    if len(images) > 1:
        got = ", ".join(map(str, images))
        raise ValueError(f"expected one number of the defender's images in both splits, got {got}")
    return [(r, model) for r in scans if _clean_of(r) and (model := _clean(r)) is not None]


def _clean(record: Record) -> CleanModel | None:
    key, values = record.key, record.values
    name = f"{key.get('setting')}/{key['attack']}-{key['seed']}"
    return clean_model(
        _column(record, "score"),
        _column(record, "success_rate"),
        floor=values["floor"],
        subject=ModelInfo(**values["subject"]),
        dataset=values["data"],
        arch=values["model"],
        name=f"{values['study']}/{name}" if "study" in values else name,
        works=_works(record),
    )


def _judge(record: Record, calibration: Calibration, alpha: float) -> Judged:
    report = _report(record, calibration, alpha)
    return Judged(
        record,
        report.verdict,
        report.suspected,
        report.p_value if report.finding is None else 0.0,  # it comes before every p-value
        report.paper_index,
        report.paper_flagged,
        _pairs(report),
    )


def _pairs(report: ScanReport) -> tuple[tuple[int, int], ...]:
    sources = ((label, report.labels[label].source) for label in report.suspected)
    return tuple((source, label) for label, source in sources if source is not None)


def _shipped(record: Record) -> Calibration | None:
    return load_calibration(
        record.values["detector"],
        settings=record.settings["detector"],
        classes=_classes(record),
    )


def _report(record: Record, calibration: Calibration | None, alpha: float) -> ScanReport:
    """A recorded scan, judged anew."""
    finding = record.values.get("finding")
    return judge(
        record.values["detector"],
        _column(record, "score"),
        _column(record, "success_rate"),
        floor=record.values["floor"],
        works=_works(record),
        alpha=alpha,
        calibration=calibration,
        subject=ModelInfo(**record.values["subject"]),
        seed=int(record.key["seed"]),
        sources=[label.get("source") for label in record.values["labels"]],
        finding=finding and Finding(tuple(finding["labels"]), finding["reason"]),
    )


def _groups(scans: Sequence[Record]) -> dict[int, list[Record]]:
    """One detector's scans by number of classes; those of the unseen split under `ANY_CLASSES`."""
    groups: dict[int, list[Record]] = {}
    for record in scans:
        unseen = record.key["split"] == "unseen"
        groups.setdefault(ANY_CLASSES if unseen else _classes(record), []).append(record)
    return dict(sorted(groups.items()))


class _Group(NamedTuple):
    """Models that one calibration judges."""

    models: list[Record]
    calibration: Calibration


def _joins(record: Record, like: Record) -> bool:
    """Whether another study's scan is one of the unseen split that was made like this one."""
    alike = record.key["detector"] == like.key["detector"] and (
        record.settings["detector"] == like.settings["detector"]
    )
    return alike and record.key["split"] == "unseen"


def _calibrated(scans: Sequence[Record], joining: Sequence[Record]) -> Iterator[_Group]:
    """One detector's models of the test and unseen splits; none where the clean ones are too few.

    Those of the unseen split are judged, kind by kind, by the clean ones of the other kinds, those
    that are joining among them.
    """
    for classes, same in _groups(scans).items():
        every = [*same, *joining] if classes == ANY_CLASSES else same
        clean = _clean_models(every)
        if classes != ANY_CLASSES:
            parts = [([r for r in same if r.key["split"] == "test"], [model for _, model in clean])]
        else:
            parts = [
                (
                    [r for r in same if _kind(r) == kind],
                    [model for r, model in clean if _kind(r) != kind],
                )
                for kind in sorted({_kind(r) for r in same})
            ]
        for models, reference in parts:
            if len(reference) >= MIN_MODELS:
                yield _Group(models, _fit(reference, same[0]))


def _judge_all(groups: Iterable[_Group], alpha: float) -> Iterator[Judged]:
    for models, calibration in groups:
        yield from (_judge(r, calibration, alpha) for r in models)


def _combined(
    scans: Mapping[str, Sequence[tuple[Record, Calibration]]], alpha: float
) -> tuple[Judged, ...]:
    """Several detectors as one, on the models that all have seen, as an audit concludes.

    Args:
        scans: By detector: every scan with what it is judged by.
        alpha: Of all detectors together.
    """
    by_model: dict[tuple[str, ...], dict[str, tuple[Record, Calibration]]] = {}
    for detector, every in scans.items():
        for record, calibration in every:
            key = record.key
            model = tuple(str(key[name]) for name in sorted(key) if name != "detector")
            by_model.setdefault(model, {})[detector] = record, calibration
    combined = []
    for same in by_model.values():
        if len(same) < len(scans):
            continue  # not every detector has seen it yet
        reports = {name: _report(*one, alpha / len(scans)) for name, one in same.items()}
        audit = conclude(reports, {}, alpha)
        record = next(iter(same.values()))[0]
        combined.append(Judged(record, audit.verdict, audit.suspected, audit.p_value, None, ()))
    return tuple(combined)


def _draws(count: int, draws: int, generator: torch.Generator) -> torch.Tensor:
    """How often each of ``count`` models is in each sample, float64 ``(draws, count)``."""
    drawn = torch.randint(count, (draws, count), generator=generator)
    ones = torch.ones(draws, count, dtype=torch.float64)
    return torch.zeros_like(ones).scatter_add_(1, drawn, ones)


def _column(record: Record, name: str) -> torch.Tensor:
    return torch.tensor([label[name] for label in record.values["labels"]], dtype=torch.float64)


def _classes(record: Record) -> int:
    return int(record.values["subject"]["classes"])


def _clean_of(record: Record) -> bool:
    """Whether null distributions may be fitted to this model."""
    return record.key["attack"] == CLEAN and record.key["split"] in ("calibration", "unseen")


def _kind(record: Record) -> str:
    return str(record.values["model"])


def _works(record: Record) -> float:
    """Success rate below which a detector suspects no label."""
    return float(record.settings["detector"].get("works", 0.0))


def _setting(judged: Judged) -> str:
    record = judged.record
    return _kind(record) if record.key["split"] == "unseen" else str(record.key.get("setting", ""))


def _too_few(count: int) -> ValueError:
    return ValueError(f"expected at least {MIN_MODELS} clean models to calibrate on, got {count}")
