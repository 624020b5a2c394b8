"""What happened in a study, in a dozen plain sentences made from its records."""

from __future__ import annotations

from collections.abc import Mapping

from wm_eval.records import Record
from wm_eval.tables import DEFENCES, VICTIMS, number, percent, points, with_interval

Records = Mapping[str, Record]


def headline(records: Records) -> list[str]:
    """The three sentences a reader must not miss: was it planted, was it found, was it removed."""
    parts = (_planted(records), _looked_for(records), _removed(records))
    return [sentence for sentence in parts if sentence]


def story(records: Records) -> list[str]:
    """The study from the first image to the last verdict, a line a step."""
    lines = []
    if "data" in records:
        v = records["data"].values
        lines.append(
            f"data        {v['name']}: {v['n_train']} training and {v['n_test']} test images, "
            f"{len(v['classes'])} classes, {v['image_size']} px"
        )
    if "watermark" in records:
        lines += _watermark_lines(records["watermark"])
    if "robustness" in records:
        lines += _victim_lines(records["robustness"])
    for defence, title in DEFENCES.items():
        lines += [
            line
            for victim in VICTIMS
            if (line := _scan_line(records, defence, victim, title)) is not None
        ]
    lines += [
        f"cleaning    {_cleaning(records[f'cleaning-{defence}'], title)}"
        for defence, title in DEFENCES.items()
        if f"cleaning-{defence}" in records
    ]
    return lines


def _watermark_lines(record: Record) -> list[str]:
    v = record.values
    stealth, none = v["stealth"], v["bits"].get("none", next(iter(v["bits"].values())))
    lpips = f"LPIPS {stealth['lpips']['mean']:.4f}" if stealth.get("lpips") else "LPIPS absent"
    worst = min(v["bits"], key=lambda name: v["bits"][name]["marked"])
    d = v["detection"]
    return [
        f"watermark   PSNR {stealth['psnr']['mean']:.2f} dB, SSIM {stealth['ssim']['mean']:.4f}, "
        f"{lpips} over {v['n']} 8-bit images",
        f"extractor   {percent(none['marked'])} of the (fixed) mark read back, worst "
        f"{percent(v['bits'][worst]['marked'])} under {worst}; a constant output scores "
        f"{percent(v['constant_score'])}",
        f"marked?     {d['true_positives']} of {d['n']} marked images found "
        f"({percent(d['tpr'])}), {d['false_positives']} of {d['n']} unmarked taken for marked "
        f"(at most {percent(d['fpr_upper'], digits=2)}, 95 %)",
    ]


def _victim_lines(record: Record) -> list[str]:
    names = record.values["victims"]["clean"]
    first = "none" if "none" in names else next(iter(names))
    clean, bad = (record.values["victims"][victim][first] for victim in VICTIMS)
    return [
        f"clean       CDA {with_interval(clean['cda'], clean['cda_interval'])}; "
        f"the trigger moves {percent(clean['asr'])} of its images to the target",
        f"backdoored  CDA {with_interval(bad['cda'], bad['cda_interval'])}, "
        f"{points(record.values['cda_gap'][first])} points against the clean victim",
        f"attack      ASR {with_interval(bad['asr'], bad['asr_interval'])} of {bad['n_attack']} "
        f"images, without the trigger {percent(bad['ftr'])}",
    ]


def _scan_line(records: Records, defence: str, victim: str, title: str) -> str | None:
    record = records.get(f"scan-{defence}-{victim}")
    if record is None:
        return None
    v = record.values
    return (
        f"scan        {title} on the {victim} victim: {_verdict(record)} "
        f"(p {number(v['p_value'], digits=4)}; paper's index {number(v['paper_index'])}, "
        f"its rule names {_names(v['paper_flagged'])})"
    )


def _verdict(record: Record) -> str:
    named = record.values["suspected"]
    return (
        f"{record.values['verdict']}, names {_names(named)}"
        if named
        else str(record.values["verdict"])
    )


def _names(labels: list[int]) -> str:
    if not labels:
        return "no label"
    return ("label " if len(labels) == 1 else "labels ") + ", ".join(map(str, labels))


def _cleaning(record: Record, title: str) -> str:
    v = record.values
    if not v["done"]:
        return f"{title}: not cleaned, {v['why'].rstrip('.')}"
    before, after, control = v["before"], v["after"], v["control"]
    return (
        f"{title}, label {v['label']}: ASR {percent(before['asr'])} to {percent(after['asr'])} "
        f"(fine-tuning alone {percent(control['asr'])}), CDA {percent(before['cda'])} to "
        f"{percent(after['cda'])}"
    )


def _planted(records: Records) -> str:
    if "robustness" not in records or "watermark" not in records:
        return ""
    found = records["robustness"].values
    first = "none" if "none" in found["victims"]["clean"] else next(iter(found["victims"]["clean"]))
    bad, psnr = (
        found["victims"]["backdoored"][first],
        records["watermark"].values["stealth"]["psnr"],
    )
    opens = bad["asr_interval"][0] > bad["ftr_interval"][1]
    verb = "Planted" if opens else "Not planted"
    return (
        f"{verb}: with a watermark at {psnr['mean']:.1f} dB, {percent(bad['asr'])} of "
        f"{bad['n_attack']} test images get the target label, without it {percent(bad['ftr'])}; "
        f"clean accuracy changes by {points(found['cda_gap'][first])} points."
    )


def _looked_for(records: Records) -> str:
    said = [
        f"{title} says {_verdict(records[bad])} (clean victim: {_verdict(records[clean])})"
        for defence, title in DEFENCES.items()
        if (bad := f"scan-{defence}-backdoored") in records
        and (clean := f"scan-{defence}-clean") in records
    ]
    if not said:
        return ""
    target = records[
        "scan-nc-backdoored" if "scan-nc-backdoored" in records else "scan-reverse-backdoored"
    ].values["true_target"]
    return f"Looked for: {'; '.join(said)}. The true target is label {target}."


def _removed(records: Records) -> str:
    found = [
        (t, records[f"cleaning-{d}"]) for d, t in DEFENCES.items() if f"cleaning-{d}" in records
    ]
    if not found:
        return ""
    if not any(record.values["done"] for _, record in found):
        return "Not cleaned: no scan named a label."
    return "Cleaned: " + "; ".join(_cleaning(record, title) for title, record in found) + "."
