"""What a study does, one function a stage: from the first image to the repaired classifier.

Each reads what it needs from the files and records of the stages before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defense_nc import ScanReport, Verdict
from defense_nc.protocols import Mitigator
from defense_reverse import detection_case
from defense_reverse.closeness import compare_images
from wm_eval.adaptive import fix_head
from wm_eval.audit.conclusion import conclude
from wm_eval.audit.scan import reversed_triggers
from wm_eval.detectors import DETECTORS
from wm_eval.effectiveness import mitigation_values
from wm_eval.engine import Result, Store
from wm_eval.measure import (
    mark_values,
    metrics_values,
    parameters,
    scan_values,
    stealth_values,
)
from wm_eval.methods import detectors_of
from wm_eval.numbers import named
from wm_eval.pictures import amplified, residual_gain, reversed_picture, save_picture
from wm_eval.population import shipped_report
from wm_eval.records import Key
from wm_eval.robustness import Aim, Outcomes, aim_of, compare, outcomes, summarize
from wm_eval.titles import CLEAN, MAPPED
from wm_eval.trial import BLENDED, Trial, batch_sizes, file_name, save_reversed
from wm_eval.watermark_attacks import blend_watermark, fit_watermark
from wm_extract import Corruption, UNetExtractor, extract
from wm_inject import (
    PoisonPlan,
    WatermarkTrigger,
    load_checkpoint,
    psnr,
    quantize,
    save_checkpoint,
    save_trigger,
    to_onnx,
    to_torchscript,
)
from wm_inject.core.images import resized
from wm_victim import ImageSet, load_classifier, predict, save_classifier, train_classifier
from wm_victim.attack_setup import AttackSetup, fit_attack, remove_parts
from wm_victim.metrics import triggered_images

LEARNED = 0.9  # a backdoor counts as learned from this attack success on held-out images on
TOLERANCE = 1e-4  # of exports: absolute on images in [0, 1]; relative to the largest logit
_EXAMPLES = 5  # exports are compared on one image and on this many
_SHOWN_IMAGES = 64  # a reversed trigger without a mask is shown as its mean change over these
_SHOWN_LABELS = 10  # of more labels a figure shows the first, and the target


class NoTrigger(nn.Module):
    """Changes nothing."""

    def forward(
        self, images: Tensor, *, ids: Tensor | None = None, target: Tensor | None = None
    ) -> Tensor:
        """The images as they are."""
        return images


def describe_images(trial: Trial, store: Store, _: Path) -> Result:
    """What the images are."""
    data = trial.data
    return Result(
        {
            "name": data.name,
            "n_train": len(data.train),
            "n_test": len(data.test),
            "n_measured": len(trial.test_images(store, trial.study.measure.limit)),
            "n_corrupted": len(trial.test_images(store, trial.corrupted_limit)),
            "classes": list(data.classes),
            "channels": data.channels,
            "image_size": data.image_size,
            "fingerprint": data.fingerprint,
        }
    )


def fit_trigger(trial: Trial, store: Store, checkpoint: Path) -> Result:
    """Make the trigger of an attack from clean training images.

    A search on a clean classifier uses the study's clean victim, as the benchmark's does.
    """
    study, metadata = trial.study, {"seed": trial.seed, "data": trial.fingerprint}
    files = [trial.trigger_file]
    if trial.attack == BLENDED or trial.watermark is not None:
        made = blend_watermark(study.watermark, trial.train_images(store))
        if trial.watermark is not None:
            made = fit_watermark(
                trial.watermark,
                trial.train_images(store),
                seed=trial.seed,
                checkpoint=checkpoint,
                progress=store.progress,
            )
        if made.extractor is not None:
            files.append(trial.extractor_file)
            save_checkpoint(
                store.path(files[-1]),
                kind=UNetExtractor.kind,
                config=made.extractor.config,
                state=made.extractor.state_dict(),
                metadata=metadata,
            )
        trigger, facts = made.trigger, made.facts
    else:
        trigger, facts = fit_attack(
            trial.definition,
            trial.data,
            config=trial.train_config(),
            build=trial.fresh,
            checkpoint=checkpoint,
            target=study.target,
            clean=partial(trial.surrogate.load_victim, store),
            device=store.device,
            progress=store.progress,
            deadline=store.deadline,
        )
        remove_parts(checkpoint)
    save_trigger(trigger.cpu(), store.path(files[0]), metadata)
    return Result({"facts": facts}, files)


def train_victim(trial: Trial, store: Store, checkpoint: Path) -> Result:
    """Train a victim, and watch the backdoor being learned."""
    setup, model, study = trial.attack_setup(store), trial.fresh(), trial.study
    if trial.adaptation is not None:
        fix_head(model, length=trial.adaptation.length, seed=trial.seed)
    watched = trial.test_images(store, study.measure.watched)
    aim = aim_of(watched.labels, study.target, trial.label_map, trial.data.num_classes)
    history = train_classifier(
        model,
        trial.train_images(store),
        config=trial.train_config(),
        checkpoint=checkpoint,
        device=torch.device(store.device),
        progress=store.progress,
        corrupt=trial.train_corruptions,
        watch=partial(_watch, setup, watched, aim),
        deadline=store.deadline,
        **setup.arguments,
    )
    metadata = {"seed": trial.seed, "data": trial.fingerprint, "attack": trial.attack}
    files = [trial.victim_file]
    save_classifier(model.cpu(), store.path(files[0]), metadata)
    if setup.plan is not None and setup.plan.mode == "per_batch":
        files.append(trial.trained_trigger_file)
        save_trigger(setup.trained_trigger.cpu().eval(), store.path(files[1]), metadata)
    values = {"parameters": parameters(model)}
    return Result(values | _exposures(trial, setup.plan, history.to_dict()), files)


@torch.no_grad()
def _watch(
    setup: AttackSetup, test: ImageSet, aim: Aim, epoch: int, model: nn.Module
) -> dict[str, float]:
    """Clean accuracy, attack success, and the loss on poisoned images alone, all held out."""
    rates = {"cda": float((predict(model, test.images).argmax(1) == test.labels).float().mean())}
    trigger = setup.trained_trigger
    if trigger is None:
        return rates
    training = [module for module in trigger.modules() if module.training]
    # Where the label depends on the image, the trigger does not: these are static attacks.
    target, wanted = int(aim.targets[0]), aim.targets[aim.counted]
    images = triggered_images(trigger.eval(), test.subset(aim.counted), target=target)
    logits = predict(model, images)
    for module in training:
        module.training = True
    success = float((logits.argmax(1) == wanted).float().mean())
    return rates | {"asr": success, "poison_loss": float(F.cross_entropy(logits, wanted))}


def _exposures(trial: Trial, plan: PoisonPlan | None, history: Mapping[str, Any]) -> dict[str, Any]:
    """How often the victim has seen the trigger, and from when on the backdoor was there."""
    labels = trial.data.train.labels
    sizes = batch_sizes(len(labels), trial.train_config().batch_size)
    poisoned, of_target = 0, None
    if plan is not None and plan.mode == "per_batch":
        poisoned = sum(int((plan.ratio or 0.0) * size) for size in sizes)
    elif plan is not None:
        poisoned = int(plan.choose(labels).sum())
    if plan is not None and plan.label_map == "clean-label":
        of_target = poisoned / int((labels == plan.target).sum())
    rates = [row.get("asr", 0.0) for row in history["watched"]]
    epoch = next((i for i, rate in enumerate(rates, start=1) if rate >= LEARNED), None)
    return {
        "history": dict(history),
        "steps": len(sizes) * len(history["losses"]),
        "poisoned": poisoned,
        "poisoned_of_target": of_target,
        "learned": None if epoch is None else {"epoch": epoch, "exposures": epoch * poisoned},
    }


def measure_rates(trial: Trial, store: Store, _: Path) -> Result:
    """A victim's rates under every corruption, and its accuracy beside the clean victim's."""
    rows = _outcomes(trial, store, trial.load_victim(store))
    values = _rates(trial, rows)
    if trial.attack != CLEAN:
        clean = _load_outcomes(trial.clean, store)
        values["cda_gap"] = {
            name: compare(row.correct, clean[name].correct)._asdict() for name, row in rows.items()
        }
    file = file_name("outcomes", trial.victim_key)
    state = {f"{name}.{part}": x for name, row in rows.items() for part, x in row._asdict().items()}
    save_checkpoint(store.path(file), kind="outcomes", config={}, state=state, metadata={})
    return Result(values, (file,))


def measure_baseline(trial: Trial, store: Store, _: Path) -> Result:
    """The rates of the clean victim that is shown an attack's trigger."""
    return Result(_rates(trial, _outcomes(trial, store, trial.clean.load_victim(store))))


def _rates(trial: Trial, rows: Mapping[str, Outcomes]) -> dict[str, Any]:
    return {
        "target": trial.study.target,
        "label_map": None if trial.attack == CLEAN else trial.label_map,
        "corruptions": {name: metrics_values(summarize(row)) for name, row in rows.items()},
    }


def _outcomes(
    trial: Trial, store: Store, model: nn.Module, *, only_none: bool = False
) -> dict[str, Outcomes]:
    rows: dict[str, Outcomes] = {}
    trigger = NoTrigger() if trial.attack == CLEAN else trial.load_trigger(store)
    by_limit: dict[int | None, dict[str, Corruption]] = {}
    for name, corruption in trial.test_corruptions.items():
        limit = trial.study.measure.limit if name == "none" else trial.corrupted_limit
        if name == "none" or not only_none:
            by_limit.setdefault(limit, {})[name] = corruption
    for limit, corruptions in by_limit.items():
        rows |= outcomes(
            model,
            trigger,
            trial.test_images(store, limit),
            target=trial.study.target,
            corruptions=corruptions,
            seed=trial.seed,
            label_map=trial.label_map,
        )
    return rows


def _load_outcomes(trial: Trial, store: Store) -> dict[str, Outcomes]:
    path = store.path(file_name("outcomes", trial.victim_key))
    return _rows(load_checkpoint(path, kind="outcomes").state)


def _rows(state: Mapping[str, Tensor]) -> dict[str, Outcomes]:
    rows: dict[str, dict[str, Tensor]] = {}
    for name, column in state.items():
        corruption, _, part = name.rpartition(".")
        rows.setdefault(corruption, {})[part] = column
    return {name: Outcomes(**columns) for name, columns in rows.items()}


def measure_stealth(trial: Trial, store: Store, _: Path) -> Result:
    """How far triggered images are from the originals."""
    test = trial.test_images(store, trial.study.measure.stealth)
    poisoned = triggered_images(_shown(trial, store), test, target=trial.study.target)
    return Result({"n": len(test), "stealth": stealth_values(poisoned, quantize(test.images))})


def _shown(trial: Trial, store: Store) -> nn.Module:
    """The trigger as it was fitted, unless only the training of the victim finishes it."""
    return trial.load_trigger(store, fitted=trial.definition.needs != "victim")


def measure_mark(trial: Trial, store: Store, _: Path) -> Result:
    """What is read back from marked images, and whether they are told from others."""
    measure, trigger = trial.study.measure, _watermark(trial, store)
    test = trial.test_images(store, measure.limit)
    values = mark_values(
        trial.load_extractor(store),
        trigger.watermark,
        quantize(test.images),
        triggered_images(trigger, test),
        corruptions=trial.test_corruptions,
        false_positive_rate=measure.false_positive_rate,
        seed=trial.seed,
    )
    return Result(values)


def _watermark(trial: Trial, store: Store) -> WatermarkTrigger:
    trigger = trial.load_trigger(store)
    if not isinstance(trigger, WatermarkTrigger):
        raise ValueError(f"expected a watermark trigger, got {type(trigger).__name__}")
    return trigger


def draw_tiles(trial: Trial, store: Store, _: Path) -> Result:
    """Original, poisoned and amplified change of a few test images; what the extractor reads."""
    test, target = trial.test_images(store), trial.study.target
    first = [int((test.labels == k).nonzero()[0]) for k in test.labels.unique() if k != target]
    shown = test.subset(torch.tensor(first[: trial.study.measure.pictures]))
    images, trigger = quantize(shown.images), _shown(trial, store)
    poisoned = triggered_images(trigger, shown, target=target)
    gain = residual_gain(poisoned - images)
    kinds = {
        "original": (images, "original"),
        "poisoned": (poisoned, "poisoned, as stored in 8 bits"),
        "residual": (amplified(poisoned - images, gain), f"change, x {gain}"),
    }
    folder, prefix = store.folder / "pictures", f"tiles-{trial.attack}-{trial.seed}"
    values: dict[str, Any] = {"gain": gain}
    if isinstance(trigger, WatermarkTrigger):
        extractor, mark = trial.load_extractor(store), trigger.watermark
        both, (height, width) = torch.cat([poisoned, images]), images.shape[2:]
        # Read at the watermark's size, shown at the images'.
        maps = resized(extract(extractor, both, side=mark.shape[-1]), (height, width)).clamp(0, 1)
        marks, blanks = maps.chunk(2)
        kinds["extracted"] = (marks, "watermark read from the poisoned image")
        kinds["extracted-clean"] = (blanks, "watermark read from the original")
        values["watermark"] = save_picture(folder, f"{prefix}-watermark", mark, "the watermark")
    values["tiles"] = [
        {
            kind: save_picture(folder, f"{prefix}-{i}-{kind}", batch[i], caption)
            for kind, (batch, caption) in kinds.items()
        }
        for i in range(len(shown))
    ]
    return Result(values, _pictures(values))


def scan_victim(trial: Trial, detector: str, store: Store, checkpoint: Path) -> Result:
    """One detector's look at one victim; the triggers that it reversed, but for populations."""
    report = _scan(trial, detector, trial.load_victim(store), store, checkpoint)
    values = scan_values(report)
    target = None if trial.attack == CLEAN else trial.study.target
    names = named(values)
    values |= {
        "preset": trial.study.detectors[detector].get("preset", "fast"),
        "model": trial.study.victim.model,
        "data": trial.data.name,
        "true_target": target,
        "named": names,
        "oracle_label": _oracle_label(values) if target is None else target,
        "n_images": len(trial.defender_images(store)),
    }
    if trial.attack in MAPPED:
        classes = torch.arange(trial.data.num_classes)
        targets, works = aim_of(classes, trial.study.target, trial.label_map, len(classes))
        values["true_pairs"] = [[int(k), int(targets[k])] for k in works.nonzero()]
    if target is not None:
        values["case"] = detection_case(names, target)
        values["paper_case"] = detection_case(report.paper_flagged, target)
    files = []
    if not trial.setting and DETECTORS[detector].inverts:
        for label, trigger in sorted(report.triggers.items()):
            files.append(trial.reversed_file(detector, label))
            save_reversed(trigger.cpu(), store.path(files[-1]))
    return Result(values, files)


def _scan(
    trial: Trial, detector: str, model: nn.Module, store: Store, checkpoint: Path
) -> ScanReport:
    images = trial.defender_images(store)
    return trial.detector(detector).scan(
        model,
        images.images,
        labels=images.labels,
        seed=trial.seed,
        progress=store.progress,
        checkpoint=checkpoint,
    )


def _oracle_label(scan: Mapping[str, Any]) -> int:
    """Of a clean model, the label that is nearest to being one."""
    nearest = min(scan["labels"], key=lambda x: (not x["converged"], x["ratio"], x["label"]))
    return int(nearest["label"])


def draw_reversed(trial: Trial, detector: str, store: Store, _: Path) -> Result:
    """What the reversed trigger of every label looks like."""
    folder = store.folder / "pictures"
    images = trial.defender_images(store).images[:_SHOWN_IMAGES].cpu()
    prefix = "-".join((detector, trial.attack, str(trial.seed)))
    pictures = {
        str(label): reversed_picture(
            folder, f"{prefix}-{label}", trial.load_reversed(store, detector, label).cpu(), images
        )
        for label in _scanned(trial, detector, store)
    }
    return Result({"pictures": pictures}, _pictures(pictures))


def _scanned(trial: Trial, detector: str, store: Store) -> list[int]:
    """The labels whose reversed triggers a scan has kept."""
    scan = store.record("scan", {**trial.victim_key, "detector": detector}).values
    labels = [int(row["label"]) for row in scan["labels"]]
    files = scan.get("files", {})
    return [label for label in labels if trial.reversed_file(detector, label) in files]


def compare_triggers(trial: Trial, detector: str, store: Store, _: Path) -> Result:
    """How close the reversed images of the target come to the planted ones, with pictures.

    ``cosine``, ``psnr_planted`` and ``psnr_between`` are the ``cosine``, ``psnr_clean`` and
    ``psnr`` of `defense_reverse.closeness`; ``cosine_others`` is the cosine of the triggers of the
    other labels, which is what resembling nothing in particular amounts to.
    """
    target, test = trial.study.target, _others(trial, store)
    images = quantize(test.images)
    planted = triggered_images(trial.load_trigger(store), test, target=target)
    labels = _scanned(trial, detector, store)
    reversed_images = {
        label: triggered_images(trial.load_reversed(store, detector, label), test)
        for label in labels
    }
    near = {k: compare_images(x, planted, images) for k, x in reversed_images.items()}
    values = {
        "target": target,
        "n": len(test),
        "cosine": near[target].cosine,
        "cosine_others": fmean(near[label].cosine for label in labels if label != target),
        "psnr_planted": near[target].psnr_clean,
        "psnr_reversed": float(psnr(reversed_images[target], images).mean()),
        "psnr_between": near[target].psnr,
    }
    first = [label for label in labels if label != target][: _SHOWN_LABELS - 1]
    shown = {label: reversed_images[label] for label in sorted([target, *first])}
    values |= _draw_closeness(trial, detector, store, images, planted, shown)
    return Result(values, _pictures(values))


def _others(trial: Trial, store: Store) -> ImageSet:
    """Test images of other classes than the target: the n-th of every class before the next."""
    test = trial.test_images(store)
    rank = torch.zeros_like(test.labels)
    for label in test.labels.unique():
        same = test.labels == label
        rank[same] = torch.arange(int(same.sum()), device=rank.device)
    order = rank.argsort(stable=True)
    chosen = order[test.labels[order] != trial.study.target]
    return test.subset(chosen[: trial.study.measure.compared].cpu())


def _draw_closeness(
    trial: Trial,
    detector: str,
    store: Store,
    images: Tensor,
    planted: Tensor,
    triggered: Mapping[int, Tensor],
) -> dict[str, Any]:
    """A few images with both triggers, and the first one with the trigger of every label."""
    count, folder = trial.study.measure.pictures, store.folder / "pictures"
    prefix = f"closeness-{detector}-{trial.attack}-{trial.seed}"
    of_target = triggered[trial.study.target]
    # One factor each for all pictures that are to be compared.
    gain = residual_gain(torch.cat([planted - images, of_target - images])[: 2 * count])
    labels_gain = residual_gain(torch.stack([x[0] - images[0] for x in triggered.values()]))

    def saved(name: str, image: Tensor, caption: str) -> dict[str, Any]:
        return save_picture(folder, f"{prefix}-{name}", image, caption)

    def change(name: str, image: Tensor, factor: int) -> dict[str, Any]:
        return saved(f"{name}-change", amplified(image, factor), f"change, x {factor}")

    rows = [
        {
            "original": saved(f"{i}-original", images[i], "original"),
            "planted": saved(f"{i}-planted", planted[i], "with the planted trigger"),
            "planted-change": change(f"{i}-planted", planted[i] - images[i], gain),
            "reversed": saved(f"{i}-reversed", of_target[i], "with the reversed trigger"),
            "reversed-change": change(f"{i}-reversed", of_target[i] - images[i], gain),
        }
        for i in range(min(count, len(images)))
    ]
    labels = {
        str(label): {
            "reversed": saved(f"label-{label}", x[0], f"reversed for label {label}"),
            "change": change(f"label-{label}", x[0] - images[0], labels_gain),
        }
        for label, x in triggered.items()
    }
    return {"gain": gain, "labels_gain": labels_gain, "rows": rows, "labels": labels}


def mitigate(
    trial: Trial,
    mitigator: Mitigator,
    key: Key,
    control: Key | None,
    keep: bool,
    store: Store,
    _: Path,
) -> Result:
    """Repair a victim, or say why not, and measure what is left on the same images as before."""
    method, fraction = str(key["method"]), float(key["fraction"])
    before = _load_outcomes(trial, store)["none"]
    images = trial.defender_images(store, fraction)
    detectors = detectors_of(method)
    labels, why, triggers = _unlearned(trial, detectors, bool(key["oracle_label"]), store)
    values: dict[str, Any] = {"n_images": len(images), "labels": labels, "why": why}
    backdoored = trial.attack != CLEAN
    values["done"] = not detectors or bool(labels)
    if not values["done"]:
        same = mitigation_values(before, before, backdoored=backdoored)
        return Result(values | same | {"steps": 0, "log": {}})
    repaired = mitigator.repair(
        trial.load_victim(store),
        images.images,
        images.labels,
        triggers=triggers if detectors else None,
        seed=trial.seed,
        progress=store.progress,
    )
    files = []
    if keep:
        files.append(file_name("repaired", key))
        save_classifier(repaired.model.cpu(), store.path(files[0]), {"seed": trial.seed})
    after = _outcomes(trial, store, repaired.model.to(store.device), only_none=True)["none"]
    log = dict(repaired.log)
    values |= {"steps": log.get("steps", getattr(mitigator, "steps", 0)), "log": log}
    values |= mitigation_values(before, after, backdoored=backdoored)
    file = file_name("outcomes", key)
    state = {f"none.{part}": column for part, column in after._asdict().items()}
    save_checkpoint(store.path(file), kind="outcomes", config={}, state=state, metadata={})
    if control is not None and backdoored:
        path = store.path(file_name("outcomes", control))
        other, counted = _rows(load_checkpoint(path, kind="outcomes").state)["none"], after.attacked
        difference = compare(after.opened[counted], other.opened[counted])
        values["asr_against_control"] = difference._asdict()
    return Result(values, [*files, file])


def _unlearned(
    trial: Trial, detectors: Sequence[str], oracle_label: bool, store: Store
) -> tuple[list[int], str, dict[int, nn.Module]]:
    """The labels that a method gets from these detectors, why these, and a trigger of each."""
    if not detectors:
        return [], "needs no scan", {}
    if len(detectors) > 1:
        return _unlearned_together(trial, detectors, store)
    (detector,) = detectors
    scan = store.record("scan", {**trial.victim_key, "detector": detector}).values
    labels = list(scan["named"])
    why = f"the scan named {_listing(labels)}" if labels else _nobody("scan", scan["verdict"])
    if oracle_label:
        labels = [int(scan["oracle_label"])]
        what = "nearest label" if trial.attack == CLEAN else "true target"
        why = f"the {what}, which the scan did not name"
    # Of a detector that reverses none the labels alone are known.
    inverts = DETECTORS[detector].inverts
    return (
        labels,
        why,
        {k: trial.load_reversed(store, detector, k) if inverts else NoTrigger() for k in labels},
    )


def _unlearned_together(
    trial: Trial, detectors: Sequence[str], store: Store
) -> tuple[list[int], str, dict[int, nn.Module]]:
    """As `_unlearned`: the labels that the detectors accuse together, as far as one has a trigger.

    Each trigger is that of the detector that is surest of the label.
    """
    reports = {}
    for name in detectors:
        scan = store.record("scan", {**trial.victim_key, "detector": name})
        report = shipped_report(scan, trial.study.defender.alpha / len(detectors))
        labels = _scanned(trial, name, store)
        reports[name] = replace(
            report, triggers={k: trial.load_reversed(store, name, k) for k in labels}
        )
    audit = conclude(reports, {}, trial.study.defender.alpha)
    triggers = {k: one.trigger for k, one in reversed_triggers(audit, audit.suspected).items()}
    if not audit.suspected:
        return [], _nobody("audit", audit.verdict), {}
    why = f"the audit named {_listing(audit.suspected)}"
    if missing := sorted({*audit.suspected} - {*triggers}):
        why += f"; no detector reversed a trigger of {_listing(missing)}"
    return list(triggers), why, triggers


def _listing(labels: Iterable[int]) -> str:
    return ", ".join(map(str, labels))


def _nobody(what: str, verdict: str) -> str:
    return f"the {what} named no label ({verdict})"


def rescan(trial: Trial, detector: str, mitigation: Key, store: Store, checkpoint: Path) -> Result:
    """Scan what was repaired as the victim was scanned: does the verdict agree that it is clean?"""
    model = load_classifier(store.path(file_name("repaired", mitigation))).to(store.device).eval()
    values = scan_values(_scan(trial, detector, model, store, checkpoint))
    first = store.record("scan", {**trial.victim_key, "detector": detector}).values
    values |= {
        "named": named(values),
        "named_before": first["named"],
        "verdict_before": first["verdict"],
        "agrees": values["verdict"] == Verdict.CLEAN.value,
    }
    return Result(values)


def reactivate(
    trial: Trial,
    tuning: Mitigator,
    mitigation: Key | None,
    fraction: float,
    store: Store,
    _: Path,
) -> Result:
    """Is a backdoor that was removed soon back? Fine-tune with a few poisoned images and measure.

    What was repaired, or the clean victim where there is no ``mitigation``: what a network learns
    that never had the backdoor. The poisoned images are of those that the victim was trained on.
    """
    counts = trial.study.defender.reactivation
    clean = trial.defender_images(store, fraction)
    poisoned, labels = _poisoned(trial, store, max(counts))
    file = trial.clean.victim_file if mitigation is None else file_name("repaired", mitigation)
    rows = []
    for count in counts:
        tuned = tuning.repair(
            load_classifier(store.path(file)).to(store.device).eval(),
            torch.cat([clean.images, poisoned[:count]]),
            torch.cat([clean.labels, labels[:count]]),
            seed=trial.seed,
            progress=store.progress,
        )
        after = _outcomes(trial, store, tuned.model, only_none=True)["none"]
        rows.append({"poisoned": count, **metrics_values(summarize(after))})
    return Result({"n_images": len(clean), "steps": trial.steps(fraction), "rows": rows})


def _poisoned(trial: Trial, store: Store, count: int) -> tuple[Tensor, Tensor]:
    """So many of the victim's poisoned training images, and the labels that they got.

    Raises:
        ValueError: It had fewer, but for those of the target class, which teach nothing.
    """
    train = trial.train_images(store)
    plan = trial.definition.plan(
        trial.data.train.labels, target=trial.study.target, ratio=trial.ratio, seed=trial.seed
    )
    relabelled = plan.relabel(train.labels, trial.data.num_classes)
    mask = plan.choose(train.labels)
    if plan.label_map != "clean-label":
        mask &= relabelled != train.labels
    chosen = mask.nonzero().flatten().cpu()
    if len(chosen) < count:
        raise ValueError(f"expected reactivation of at most {len(chosen)} images, got {count}")
    order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(trial.seed))
    rows = chosen[order[:count]]
    images = triggered_images(
        trial.load_trigger(store), train.subset(rows), target=trial.study.target
    )
    return images, relabelled[rows.to(relabelled.device)]


def export_models(trial: Trial, store: Store, _: Path) -> Result:
    """Injector, extractor, classifier and reversed generator as ONNX and TorchScript, compared.

    The generator is that of the label that the reverse-generator scan named; where it named none,
    the reason stands in its place.

    Raises:
        ParityError: An exported model answers differently from the one it came from.
    """
    images = trial.test_images(store, _EXAMPLES).images.cpu()
    models: dict[str, nn.Module] = {
        "injector": trial.load_trigger(store).cpu(),
        "extractor": trial.load_extractor(store).cpu(),
        "classifier": trial.load_victim(store).cpu(),
    }
    absent = {}
    why = "no scan with reverse generators"
    labels: list[int] = []
    if "reverse" in trial.study.detectors:
        labels, why, triggers = _unlearned(trial, ("reverse",), False, store)
    if labels:
        models["generator"] = triggers[labels[0]].cpu()
    else:
        absent["generator"] = why
    rows = {name: _exported(trial, name, model, images, store) for name, model in models.items()}
    files = [row["file"] for forms in rows.values() for row in forms.values()]
    return Result({"tolerance": TOLERANCE, "models": rows, "absent": absent}, files)


def _exported(
    trial: Trial, name: str, model: nn.Module, images: Tensor, store: Store
) -> dict[str, Any]:
    rows, relative = {}, name == "classifier"
    for form, suffix, export in (("onnx", "onnx", to_onnx), ("torchscript", "pt", to_torchscript)):
        file = f"exports/{name}.{suffix}"
        parity = export(
            model,
            images,
            store.path(file),
            tolerance=TOLERANCE,
            relative=relative,
            metadata={"study": trial.study.name, "data": trial.fingerprint},
        )
        rows[form] = {"file": file, "relative": relative, **parity._asdict()}
        rows[form]["batches"] = list(parity.batches)
    return rows


def _pictures(values: Any) -> list[str]:
    """The files of all pictures in a record's values."""
    if isinstance(values, Mapping):
        if {"file", "caption"} <= set(values):
            return [f"pictures/{values['file']}"]
        values = list(values.values())
    if not isinstance(values, list):
        return []
    return sorted({file for value in values for file in _pictures(value)})
