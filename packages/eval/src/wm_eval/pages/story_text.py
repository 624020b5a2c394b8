"""What happened in a study of one watermark, in plain sentences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wm_eval.pages.story import VICTIMS, Story
from wm_eval.records import StudyRecords
from wm_eval.render import decimal, label_list, percent, points, with_interval
from wm_eval.titles import detector_title


def headline(study: StudyRecords) -> list[str]:
    """Three sentences: was it planted, was it detected, was it removed."""
    story = Story(study)
    parts = (_planted(story), _detected(story), _removed(story))
    return [sentence for sentence in parts if sentence]


def story_lines(study: StudyRecords) -> list[str]:
    """The study from the first image to the last verdict, a line a step."""
    story = Story(study)
    lines = []
    if (v := story.get("images")) is not None:
        classes = len(v["classes"]) if "classes" in v else v["num_classes"]
        lines.append(
            f"data        {v['name']}: {v['n_train']} training and {v['n_test']} test images, "
            f"{classes} classes, {v['image_size']} px"
        )
    stealth, mark = story.get("stealth"), story.get("mark")
    if stealth is not None and mark is not None:
        lines += _watermark_lines(stealth, mark)
    if story.rates:
        lines += _victim_lines(story)
    lines += [
        f"scan        {detector_title(detector)} on the {victim} victim: {_verdict(v)} "
        f"(p {decimal(v['p_value'], digits=4)}; paper's index {decimal(v['paper_index'])}, "
        f"its rule names {_labels(v['paper_flagged'])})"
        for detector in story.detectors
        for victim in VICTIMS
        if (v := story.scan(detector, victim)) is not None
    ]
    return lines + [f"cleaning    {_mitigated(*entry)}" for entry in story.mitigations()]


def _watermark_lines(stealth: Mapping[str, Any], mark: Mapping[str, Any]) -> list[str]:
    s, bits, d = stealth["stealth"], mark["bits"], mark["detection"]
    none = bits.get("none", next(iter(bits.values())))
    lpips = f"LPIPS {s['lpips']['mean']:.4f}" if s.get("lpips") else "LPIPS absent"
    worst = min(bits, key=lambda name: bits[name]["marked"])
    return [
        f"watermark   PSNR {s['psnr']['mean']:.2f} dB, SSIM {s['ssim']['mean']:.4f}, "
        f"{lpips} over {stealth['n']} 8-bit images",
        f"extractor   {percent(none['marked'])} of the (fixed) mark read back, worst "
        f"{percent(bits[worst]['marked'])} under {worst}; a constant output scores "
        f"{percent(mark['constant_score'])}",
        f"marked?     {d['true_positives']} of {d['n']} marked images found "
        f"({percent(d['tpr'])}), {d['false_positives']} of {d['n']} unmarked taken for marked "
        f"(at most {percent(d['fpr_upper'], digits=2)}, 95 %)",
    ]


def _uncorrupted(story: Story) -> tuple[Mapping[str, Any], Mapping[str, Any], Mapping[str, Any]]:
    """The rates of the clean and the backdoored victim and their difference."""
    clean = story.rates["clean"]
    name = "none" if "none" in clean else next(iter(clean))
    return clean[name], story.rates["backdoored"][name], story.rates["gap"][name]


def _victim_lines(story: Story) -> list[str]:
    clean, bad, gap = _uncorrupted(story)
    return [
        f"clean       CDA {with_interval(clean['cda'], clean['cda_interval'])}; "
        f"the trigger moves {percent(clean['asr'])} of its images to the target",
        f"backdoored  CDA {with_interval(bad['cda'], bad['cda_interval'])}, "
        f"{points(gap)} points against the clean victim",
        f"attack      ASR {with_interval(bad['asr'], bad['asr_interval'])} of {bad['n_attack']} "
        f"images, without the trigger {percent(bad['ftr'])}",
    ]


def _verdict(scan: Mapping[str, Any]) -> str:
    suspected = scan["suspected"]
    text = str(scan["verdict"])
    return f"{text}, names {_labels(suspected)}" if suspected else text


def _labels(labels: list[int]) -> str:
    return f"label{'s' * (len(labels) > 1)} {label_list(labels)}" if labels else "no label"


def _mitigated(detector: str, v: Mapping[str, Any], control: Mapping[str, Any] | None) -> str:
    title = detector_title(detector)
    if not v["done"]:
        return f"{title}: not cleaned, {v['why'].rstrip('.')}"
    before, after = v["before"], v["after"]
    alone = f" (fine-tuning alone {percent(control['after']['asr'])})" if control else ""
    return (
        f"{title}, {_labels(v['labels'])}: ASR {percent(before['asr'])} to {percent(after['asr'])}"
        f"{alone}, CDA {percent(before['cda'])} to {percent(after['cda'])}"
    )


def _planted(story: Story) -> str:
    stealth = story.get("stealth")
    if not story.rates or stealth is None:
        return ""
    _, bad, gap = _uncorrupted(story)
    opens = bad["asr_interval"][0] > bad["ftr_interval"][1]
    return (
        f"{'Planted' if opens else 'Not planted'}: with a watermark at "
        f"{stealth['stealth']['psnr']['mean']:.1f} dB, {percent(bad['asr'])} of {bad['n_attack']} "
        f"test images get the target label, without it {percent(bad['ftr'])}; clean accuracy "
        f"changes by {points(gap)} points."
    )


def _detected(story: Story) -> str:
    parts, target = [], None
    for detector in story.detectors:
        clean, bad = (story.scan(detector, victim) for victim in VICTIMS)
        if clean is not None and bad is not None:
            target = bad["true_target"]
            parts.append(
                f"{detector_title(detector)} says {_verdict(bad)} (clean victim: {_verdict(clean)})"
            )
    return f"Looked for: {'; '.join(parts)}. The true target is label {target}." if parts else ""


def _removed(story: Story) -> str:
    entries = story.mitigations()
    if entries and not any(values["done"] for _, values, _ in entries):
        return "Not cleaned: no scan named a label."
    return f"Cleaned: {'; '.join(_mitigated(*e) for e in entries)}." if entries else ""
