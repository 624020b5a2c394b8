"""What an audit found, for machines and for people: JSON, SARIF, and a page of HTML."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from defense_nc import Verdict
from wm_eval.__about__ import __version__
from wm_eval.audit.checks import Check
from wm_eval.audit.scan import Audit, reversed_triggers
from wm_eval.render import template
from wm_eval.titles import detector_title
from wm_inject.core.files import write_text

SARIF_SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
_LEVELS = {Verdict.BACKDOORED: "error", Verdict.INCONCLUSIVE: "warning", Verdict.CLEAN: "note"}
_GAIN = 8  # how much a reversed trigger's change is amplified in pictures
_PICTURES = 6  # images that a reversed trigger is shown on


@dataclass(frozen=True)
class About:
    """What was audited, for every output.

    Args:
        file: The model's file name.
        sha256: Of that file.
        model: How it was opened: its source, architecture, image size and so on.
        images: How many there were, how many were skipped, and why.
        checks: What the checks found.
        notes: Remarks of opening and checking, one line each.
    """

    file: str
    sha256: str
    model: Mapping[str, Any]
    images: Mapping[str, Any]
    checks: tuple[Check, ...]
    notes: tuple[str, ...]


def to_json(about: About, audit: Audit | None, reason: str | None = None) -> dict[str, Any]:
    """Everything, ready for JSON; without an audit, why there is none."""
    verdict = {
        "verdict": Verdict.NOT_SCANNED.value,
        "exit_code": Verdict.NOT_SCANNED.exit_code,
        "reason": reason,
    }
    return {
        "format": "wm-audit-1",
        "version": __version__,
        "file": about.file,
        "sha256": about.sha256,
        "model": dict(about.model),
        "images": dict(about.images),
        "checks": [asdict(check) for check in about.checks],
        "notes": list(about.notes),
        **(verdict if audit is None else audit.to_dict()),
    }


def to_sarif(about: About, audit: Audit | None, reason: str | None = None) -> dict[str, Any]:
    """A SARIF 2.1.0 log with one result a suspected label; none where nothing was found."""
    place = {"physicalLocation": {"artifactLocation": {"uri": about.file}}}
    results = []
    if audit is not None and audit.verdict is not Verdict.CLEAN:
        for label in audit.suspected or (None,):
            said = audit.reason if label is None else f"Label {label} is suspected. {audit.reason}"
            results.append(
                {
                    "ruleId": "backdoor",
                    "level": _LEVELS.get(audit.verdict, "warning"),
                    "message": {"text": said},
                    "locations": [place],
                    "properties": {"label": label, "verdict": audit.verdict},
                }
            )
    scanned = audit is not None and audit.verdict is not Verdict.NOT_SCANNED
    why = reason if audit is None else audit.reason
    failed = [] if scanned else [{"level": "error", "message": {"text": why or "not scanned"}}]
    rule = {
        "id": "backdoor",
        "name": "BackdooredClassifier",
        "shortDescription": {"text": "A label of the classifier is unusually easy to reach."},
    }
    driver = {"name": "wm-eval", "version": __version__, "rules": [rule]}
    run = {
        "tool": {"driver": driver},
        "artifacts": [{"location": {"uri": about.file}, "hashes": {"sha-256": about.sha256}}],
        "invocations": [{"executionSuccessful": scanned, "toolExecutionNotifications": failed}],
        "results": results,
    }
    return {"$schema": SARIF_SCHEMA, "version": "2.1.0", "runs": [run]}


def write_html(path: Path, about: About, audit: Audit, images: Tensor) -> None:
    """Write one page that needs nothing beside itself; all text in it is escaped.

    Args:
        path: The page.
        about: What was audited.
        audit: What was found.
        images: The defender's images, for pictures of reversed triggers.
    """
    scans = [
        {"title": detector_title(name), "report": report} for name, report in audit.reports.items()
    ]
    failures = {detector_title(name): why for name, why in audit.failures.items()}
    pictures = {
        label: _shown(trigger, images[:_PICTURES])
        for label, trigger in reversed_triggers(audit).items()
    }
    page = template("audit.html").render(
        about=about,
        audit=audit,
        scans=scans,
        failures=failures,
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


def told(about: About, audit: Audit) -> str:
    """An audit for the terminal."""
    lines: list[str] = [f"{about.file}: {_said(about.model)}"]
    lines += [
        f"{'ok' if check.passed else '!!'}  {check.name}: {check.detail}" for check in about.checks
    ]
    lines += [f"note: {note}" for note in about.notes]
    for name, report in audit.reports.items():
        named = ", ".join(map(str, report.suspected)) or "no label"
        lines.append(
            f"{detector_title(name)}: {report.verdict}, p {report.p_value:.2g}, names {named}"
        )
    lines += [f"{detector_title(name)}: {why}" for name, why in audit.failures.items()]
    return "\n".join([*lines, f"verdict: {audit.verdict}. {audit.reason}"])


def _said(model: Mapping[str, Any]) -> str:
    size = f"{model['image_size']} pixels, {model['channels']} channels"
    return f"{model['source']}, {model['arch']}, {size}, {model['num_classes']} classes"
