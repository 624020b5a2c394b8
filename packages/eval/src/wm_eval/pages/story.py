"""One watermark from the first image to the last verdict: tables and plain sentences."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

from wm_eval.records import Record, StudyRecords
from wm_eval.render import (
    ABSENT,
    Page,
    Table,
    decimal,
    label_list,
    percent,
    points,
    split_headers,
    with_interval,
)
from wm_eval.titles import CLEAN, DETECTORS, PAPERS, detector_title, in_order
from wm_extract import EXTRA_CORRUPTIONS, PAPER_CORRUPTIONS

VICTIMS = ("clean", "backdoored")


class Story:
    """The records of a study of one attack, by what a page says about them."""

    def __init__(self, study: StudyRecords) -> None:
        """Take the records apart.

        Raises:
            ValueError: Records of several seeds, data sets or attacks.
        """
        data = {r.data for r in study.records}
        seeds = {r.key["seed"] for r in study.records if "seed" in r.key}
        for what, values in (("data set", data), ("seed", seeds)):
            if len(values) > 1:
                raise ValueError(f"expected the records of one {what}, got {len(values)}")
        self.study = study

    def get(self, kind: str, **key: Any) -> Mapping[str, Any] | None:
        """The values of the only such record."""
        record = self.study.one(kind, **key)
        return None if record is None else record.values

    def victims(self, kind: str, victim: str, **key: Any) -> Record | None:
        """The record of one victim, "clean" or "backdoored"."""
        for record in self.study.select(kind=kind, **key):
            if (record.key["attack"] == CLEAN) == (victim == "clean"):
                return record
        return None

    @cached_property
    def rates(self) -> dict[str, Mapping[str, Any]]:
        """The rates of both victims under every corruption, and the difference; all or nothing."""
        clean, bad = (self.victims("rates", victim) for victim in VICTIMS)
        if clean is None or bad is None:
            return {}
        return {
            "clean": clean.values["corruptions"],
            "backdoored": bad.values["corruptions"],
            "gap": bad.values["cda_gap"],
        }

    @property
    def detectors(self) -> list[str]:
        """The detectors that scanned either victim."""
        return in_order([str(r.key["detector"]) for r in self.study.select(kind="scan")], DETECTORS)

    def scan(self, detector: str, victim: str) -> Mapping[str, Any] | None:
        """What a detector says of a victim."""
        record = self.victims("scan", victim, detector=detector)
        return None if record is None else record.values

    def mitigations(self) -> list[tuple[str, Mapping[str, Any], Mapping[str, Any] | None]]:
        """Detector, unlearning with its triggers, and the control without triggers."""
        controls = {"nc": "control-nc", "reverse": "control"}
        entries = []
        for detector in PAPERS:
            values = self.get("mitigation", method=f"unlearning-{detector}", oracle_label=False)
            if values is not None:
                control = self.get("mitigation", method=controls[detector])
                entries.append((detector, values, control))
        return entries


def corruptions_in_order(names: Iterable[str]) -> list[str]:
    """Corruptions in the order of the papers' tables."""
    return in_order(names, [*PAPER_CORRUPTIONS, *EXTRA_CORRUPTIONS])


def story_page(study: StudyRecords) -> Page:
    """Every table that the records have the numbers for, in the order of the story.

    Raises:
        ValueError: Records of several seeds or data sets.
    """
    story = Story(study)
    tables = []
    if (stealth := story.get("stealth")) is not None:
        tables.append(_stealth_table(stealth))
    if (mark := story.get("mark")) is not None:
        tables += [_bits_table(mark), _marked_table(mark)]
    if story.rates:
        tables.append(_robustness_table(story))
    if story.detectors:
        tables.append(_verdict_table(story))
        tables += [
            labels_table(scan, detector, victim)
            for detector in story.detectors
            for victim in VICTIMS
            if (scan := story.scan(detector, victim)) is not None
        ]
    if story.mitigations():
        tables.append(_mitigation_table(story))
    if (exports := story.get("exports")) is not None:
        tables.append(_exports_table(exports))
    images = story.get("images")
    title = "Plant, find and remove an invisible backdoor"
    title += f": {images['name']}" if images else ""
    return Page("story", title, "", tuple(tables))


def _stealth_table(values: Mapping[str, Any]) -> Table:
    units = {"psnr": "PSNR (dB)", "ssim": "SSIM", "linf": "largest change (of 1)", "lpips": "LPIPS"}
    rows: list[tuple[str, ...]] = []
    for name, label in units.items():
        stealth = values["stealth"].get(name)
        if stealth is None:
            rows.append((label, f"absent: {values['stealth'][name + '_absent']}", ABSENT, ABSENT))
        else:
            digits = 2 if name == "psnr" else 4
            cells = (decimal(stealth[key], digits=digits) for key in ("mean", "p05", "p95"))
            rows.append((label, *cells))
    note = f"Over {values['n']} held-out images, each clamped and rounded to 8 bits first."
    headers = ("measure", "mean", "5th percentile", "95th percentile")
    return Table("stealth", "How visible the watermark is", headers, tuple(rows), note)


def _bits_table(values: Mapping[str, Any]) -> Table:
    rows = tuple(
        (
            name,
            percent(bits["marked"]),
            percent(bits["unmarked"]),
            percent(values["constant_score"]),
            f"{bits['false_positives']} of {bits['false_n']}",
            f"{bits['true_positives']} of {bits['false_n']}",
        )
        for name in corruptions_in_order(values["bits"])
        for bits in (values["bits"][name],)
    )
    headers = split_headers(
        "corruption | marked images | unmarked images | constant output | unmarked taken for "
        "marked | marked taken for marked"
    )
    note = (
        f"Balanced bit accuracy over {values['n']} held-out images of each kind. The mark is one "
        "fixed picture, so this says how surely its presence shows, not how many bits could be "
        "sent. The last two columns use the threshold of the detection table, on its second half."
    )
    return Table("bits", "What the extractor reads", headers, rows, note)


def _marked_table(values: Mapping[str, Any]) -> Table:
    """Rates on images that chose no threshold."""
    d = values["detection"]
    rows = (
        (
            "marked, found",
            f"{d['true_positives']} of {d['n']}",
            percent(d["tpr"]),
            f"at least {percent(d['tpr_lower'], digits=2)}",
        ),
        (
            "unmarked, taken for marked",
            f"{d['false_positives']} of {d['n']}",
            percent(d["fpr"]),
            f"at most {percent(d['fpr_upper'], digits=2)}",
        ),
    )
    note = (
        f"The threshold ({d['threshold']:.4g}) was chosen on {d['n_calibration']} other images for "
        f"at most {percent(d['aimed_fpr'])} false positives. Bounds: exact (Clopper-Pearson), "
        "one-sided, 95 %."
    )
    headers = ("images", "count", "rate", "95 % bound")
    return Table("detection", "Is this image marked?", headers, rows, note)


def _robustness_table(story: Story) -> Table:
    rows = []
    for name in corruptions_in_order(story.rates["clean"]):
        clean, bad = story.rates["clean"][name], story.rates["backdoored"][name]
        rows.append(
            (
                name,
                with_interval(clean["cda"], clean["cda_interval"]),
                with_interval(bad["cda"], bad["cda_interval"]),
                points(story.rates["gap"][name]),
                with_interval(bad["asr"], bad["asr_interval"]),
                percent(bad["ftr"]),
                percent(clean["asr"]),
            )
        )
    first = next(iter(story.rates["clean"].values()))
    headers = split_headers(
        "corruption | CDA, clean victim | CDA, backdoored victim | difference (points) | ASR, "
        "backdoored victim | false triggers | ASR, clean victim"
    )
    note = (
        f"CDA over {first['n_clean']} test images; ASR and false triggers over the "
        f"{first['n_attack']} that count for the attack. Intervals: Wilson, 95 %; the "
        "difference is paired by image (Bonett and Price's adjusted Wald interval). Order: "
        "trigger, 8 bits, corruption, classifier."
    )
    return Table("robustness", "Accuracy and attack success", headers, tuple(rows), note)


def _verdict_table(story: Story) -> Table:
    """By the default rule and by the paper's."""
    rows = tuple(
        (
            detector_title(detector),
            victim,
            scan["verdict"],
            label_list(scan["suspected"], none="none"),
            decimal(scan["p_value"], digits=4),
            decimal(scan["paper_index"]),
            label_list(scan["paper_flagged"], none="none"),
        )
        for detector in story.detectors
        for victim in VICTIMS
        if (scan := story.scan(detector, victim)) is not None
    )
    headers = split_headers(
        "defence | victim | verdict | labels named | p-value | paper's index | labels by the "
        "paper's rule"
    )
    note = (
        "The default rule names a label whose score stands out from the other labels' (p at most "
        "alpha, corrected for the number of labels) and lies well below their median. The paper's "
        "rule, printed as measured, names every label more than 2 median deviations below the "
        "median; on ten labels it does so for about a third of clean classifiers by chance alone."
    )
    return Table("verdicts", "What the defences say", headers, rows, note)


def labels_table(scan: Mapping[str, Any], detector: str, victim: str) -> Table:
    """A detector's score for every label of one victim."""
    rows = tuple(
        (
            str(label["label"]),
            decimal(label["score"], digits=4),
            decimal(label["ratio"]),
            percent(label["success_rate"]),
            "yes" if label["converged"] else "no",
            decimal(label["p_value"], digits=4),
            decimal(label["paper_index"]),
        )
        for label in scan["labels"]
    )
    headers = split_headers(
        "label | score | score / median | success | reached the floor | p-value | paper's index"
    )
    title = f"{detector_title(detector)}, {victim} victim, label by label"
    return Table(f"labels-{detector}-{victim}", title, headers, rows, scan["reason"])


def _mitigation_table(story: Story) -> Table:
    """Before and after, or why nothing was cleaned."""
    rows = []
    for detector, values, control in story.mitigations():
        title = detector_title(detector)
        if not values["done"]:
            rows.append((title, f"not cleaned: {values['why']}", *(ABSENT,) * 6))
            continue
        before, after = values["before"], values["after"]
        rows.append(
            (
                title,
                f"label {label_list(values['labels'])}",
                with_interval(before["cda"], before["cda_interval"]),
                with_interval(after["cda"], after["cda_interval"]),
                points(values["cda_change"]),
                with_interval(before["asr"], before["asr_interval"]),
                with_interval(after["asr"], after["asr_interval"]),
                with_interval(control["after"]["asr"], control["after"]["asr_interval"])
                if control
                else ABSENT,
            )
        )
    headers = split_headers(
        "defence | cleaned with | CDA before | CDA after | change (points) | ASR before | ASR "
        "after | ASR, control"
    )
    note = (
        "ASR is that of the true trigger. Only a label that the scan named is ever used. The "
        "control is fine-tuned on the same images for as many steps, without the reversed trigger: "
        "what it removes, the defence did not need the label for."
    )
    return Table("mitigation", "Before and after cleaning", headers, tuple(rows), note)


def _exports_table(values: Mapping[str, Any]) -> Table:
    """How closely each exported model answers like the one it came from."""
    rows = [
        (
            model,
            {"onnx": "ONNX Runtime", "torchscript": "TorchScript"}[form],
            f"{parity['max_abs']:.1e}",
            f"{parity['max_rel']:.1e}" if parity["relative"] else ABSENT,
            ", ".join(map(str, parity["batches"])),
        )
        for model, forms in values["models"].items()
        for form, parity in forms.items()
    ]
    rows += [
        (model, f"not exported: {why}", *(ABSENT,) * 3) for model, why in values["absent"].items()
    ]
    headers = ("model", "form", "largest difference", "relative to the largest", "batch sizes")
    note = (
        f"Reloaded from the file and compared on test images; {values['tolerance']:g} is allowed, "
        "absolute on images in [0, 1] and relative on logits."
    )
    return Table("exports", "Exported models against the trained ones", headers, tuple(rows), note)
