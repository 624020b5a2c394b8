"""What an audit found, for machines and for people: JSON, SARIF, and a page of HTML."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from defense_nc import ScanReport, Verdict
from wm_eval.__about__ import __version__
from wm_eval.audit.checks import Check
from wm_eval.audit.conclusion import Audit, panel_title
from wm_eval.audit.scan import reversed_triggers
from wm_eval.detectors import DETECTORS
from wm_eval.render import template
from wm_eval.titles import detector_title
from wm_inject.core.files import write_text
from wm_inject.core.image_size import describe_size

SARIF_SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
_LEVELS = {Verdict.BACKDOORED: "error", Verdict.INCONCLUSIVE: "warning", Verdict.CLEAN: "note"}
_GAIN = 8  # how much a reversed trigger's change is amplified in pictures
_PICTURES = 6  # images that a reversed trigger is shown on


@dataclass
class About:
    """What is known of an audited model, for every output; filled in while it becomes known.

    Args:
        file: The model's file name.
        sha256: Of that file.
        model: How it was opened: its source, architecture, image size and so on.
        images: How many there were, how many were skipped, and why.
        checks: What the checks found.
        notes: Remarks of opening and reading, one line each.
    """

    file: str
    sha256: str = ""
    model: Mapping[str, Any] = field(default_factory=dict)
    images: Mapping[str, Any] = field(default_factory=lambda: {"used": 0, "skipped": []})
    checks: tuple[Check, ...] = ()
    notes: tuple[str, ...] = ()


def to_json(about: About, audit: Audit) -> dict[str, Any]:
    """Everything, ready for JSON."""
    return {
        "format": "wm-audit-1",
        "version": __version__,
        "file": about.file,
        "sha256": about.sha256,
        "model": dict(about.model),
        "images": dict(about.images),
        "checks": [asdict(check) for check in about.checks],
        "notes": list(about.notes),
        **audit.to_dict(),
    }


def to_sarif(about: About, audit: Audit) -> dict[str, Any]:
    """A SARIF 2.1.0 log with a result for each label that is accused or stands out.

    One result without a label if nothing stands out and the verdict is not "clean"; none if it is,
    or if nothing was scanned.
    """
    place = {"physicalLocation": {"artifactLocation": {"uri": about.file}}}
    scanned, results = audit.verdict is not Verdict.NOT_SCANNED, []
    accused = audit.verdict is Verdict.BACKDOORED
    if scanned and audit.verdict is not Verdict.CLEAN:
        for label in audit.targets or (None,):
            about_label = "is suspected" if accused else "stands out at face value"
            text = audit.reason if label is None else f"Label {label} {about_label}. {audit.reason}"
            results.append(
                {
                    "ruleId": "backdoor",
                    "level": _LEVELS.get(audit.verdict, "warning"),
                    "message": {"text": text},
                    "locations": [place],
                    "properties": {"label": label, "verdict": audit.verdict},
                }
            )
    failed = [] if scanned else [{"level": "error", "message": {"text": audit.reason}}]
    rule = {
        "id": "backdoor",
        "name": "BackdooredClassifier",
        "shortDescription": {"text": "A label of the classifier stands out from the others."},
    }
    driver = {"name": "wm-eval", "version": __version__, "rules": [rule]}
    artifact: dict[str, Any] = {"location": {"uri": about.file}}
    if about.sha256:
        artifact["hashes"] = {"sha-256": about.sha256}
    run = {
        "tool": {"driver": driver},
        "artifacts": [artifact],
        "invocations": [{"executionSuccessful": scanned, "toolExecutionNotifications": failed}],
        "results": results,
    }
    return {"$schema": SARIF_SCHEMA, "version": "2.1.0", "runs": [run]}


def write_html(path: Path, about: About, audit: Audit, images: Tensor | None) -> None:
    """Write one page that needs nothing beside itself; all text in it is escaped.

    Args:
        path: The page.
        about: What was audited.
        audit: What was found.
        images: The defender's images, for pictures of reversed triggers; None if none were read.
    """
    together = {panel_title(names): joint for names, joint in audit.together.items()}
    in_panels = {name for names in audit.together for name in names}
    scans = [
        {"title": detector_title(name), "report": report, "alone": name not in in_panels}
        for name, report in audit.reports.items()
    ]
    pictures = {}
    if images is not None:
        for label, one in reversed_triggers(audit).items():
            pictures[label] = _shown(one.trigger, images[:_PICTURES])
    model = dict(about.model)
    if "image_size" in model:
        model["image_size"] = describe_size(model["image_size"])
    page = template("audit.html").render(
        about=about,
        model=model,
        audit=audit,
        scans=scans,
        together=together,
        silent=audit.silent,
        pictures=pictures,
        gain=_GAIN,
        version=__version__,
    )
    write_text(path, page)


def _shown(trigger: Any, images: Tensor) -> list[dict[str, str]]:
    """Pictures of images with a reversed trigger in them, and of what it changed."""
    import torch

    with torch.no_grad():
        changed = trigger.cpu()(images)
    rows = []
    for before, after in zip(images, changed, strict=True):
        change = (0.5 + _GAIN * (after - before) / 2).clamp(0, 1)
        rows.append({"image": _data(after), "change": _data(change)})
    return rows


def _data(image: Tensor) -> str:
    """A picture ``(C, H, W)`` in [0, 1] as a data URI."""
    pixels: Any = image.mul(255).round().byte().permute(1, 2, 0).numpy()
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels.squeeze())).save(stream, format="PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def model_line(about: About) -> str:
    """How the model was opened, for the terminal."""
    model = about.model
    size = f"{describe_size(model['image_size'])} pixels, {model['channels']} channels"
    text = f"{model['source']}, {model['arch']}, {size}, {model['num_classes']} classes"
    return f"{about.file}: {text}"


def check_line(check: Check) -> str:
    """What a check found, for the terminal."""
    return f"{'ok' if check.passed else '!!'}  {check.name}: {check.detail}"


def verdict_lines(audit: Audit) -> list[str]:
    """What every detector found, and the verdict, for the terminal."""
    lines = []
    in_panels = {name for names in audit.together for name in names}
    for name, report in audit.reports.items():
        # What one detector says of several that are judged together is no verdict.
        sure = report.verdict in (Verdict.CLEAN, Verdict.BACKDOORED)
        verdict = "" if name in in_panels and sure else f"{report.verdict}, "
        figures = f"p {report.p_value:.2g} for label {report.nearest}"
        if report.finding is not None:
            figures = f"whatever the p-values are ({report.p_value:.2g} at least)"
        lines.append(f"{detector_title(name)}: {verdict}{figures}")
        lines += _nearest_lines(name, report)
        lines += [f"note: {note}" for note in report.notes]
    for names, joint in audit.together.items():
        figures = f"p {joint.p_value:.2g} for label {joint.nearest}"
        lines.append(f"{panel_title(names)}: {joint.verdict}, {figures}")
    lines += [f"{title}: {why}" for title, why in audit.silent.items()]
    return [*lines, f"verdict: {audit.verdict}. {audit.reason}"]


def _nearest_lines(name: str, report: ScanReport) -> list[str]:
    """The label that is easiest to reach and the next one, with what their scores mean."""
    nearest = sorted(report.labels, key=lambda label: label.score)[:2]
    return [f"  label {label.label}: {DETECTORS[name].meaning(label)}" for label in nearest]
