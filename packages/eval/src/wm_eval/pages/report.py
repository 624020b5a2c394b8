"""One self-contained HTML page of a study of one attack, from its records and pictures."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from wm_eval.pages.report_figures import mitigation_figure, robustness_figure, scores_figure
from wm_eval.pages.story import VICTIMS, Story, labels_table, story_page
from wm_eval.pages.story_text import headline
from wm_eval.records import StudyRecords, read_study
from wm_eval.render import template
from wm_eval.sheets import picture_path
from wm_eval.titles import detector_title
from wm_inject.core.files import write_text

KINDS = ("original", "poisoned", "residual", "extracted", "extracted-clean")
OF_THE_DATA = ("original", "poisoned")  # pictures that show images of the data set


def render_report(folder: str | Path, *, dataset_images: bool = True) -> Path:
    """Write ``report.html`` from the records and pictures of a study, finished or not.

    Args:
        folder: The study's folder.
        dataset_images: False leaves out the pictures that show images of the data set, for data
            that may not be passed on.

    Returns:
        The page. The same records give the same bytes.

    Raises:
        ValueError: No records, records of several seeds or data sets, or a missing picture.
    """
    folder = Path(folder)
    study = read_study(folder)
    kinds = tuple(k for k in KINDS if dataset_images or k not in OF_THE_DATA)
    content = _content(study, folder / "pictures", kinds) | _script()
    write_text(folder / "report.html", template("report.html").render(**content))
    return folder / "report.html"


def _script() -> dict[str, Any]:
    """The page's script, and the hash by which the page allows it and no other."""
    from markupsafe import Markup

    text = resources.files(__package__).joinpath("report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return {"script": Markup(text), "script_hash": f"sha256-{digest}"}


def _content(study: StudyRecords, pictures: Path, kinds: Sequence[str]) -> dict[str, Any]:
    from markupsafe import Markup

    story, page = Story(study), story_page(study)
    first = study.records[0]
    tiles = story.get("tiles")
    robustness = robustness_figure(story) if story.rates else None
    mitigation = mitigation_figure(story)
    settings = {record.id: record.settings for record in study.records}
    seed = next((r.key["seed"] for r in study.records if "seed" in r.key), 0)
    name = next((r.settings["name"] for r in study.records if "name" in r.settings), "STUDY")
    return {
        "title": page.title,
        "subtitle": f"Seed {seed}. Data {first.data[:12]}. Everything here was measured by one "
        "run; nothing was typed.",
        "headline": headline(study),
        "gain": tiles["gain"] if tiles else 1,
        "kinds": kinds,
        "rows": [
            [
                _picture(pictures, row[kind], f"image {i + 1}, {row[kind]['caption']}")
                for kind in kinds
                if kind in row
            ]
            for i, row in enumerate(tiles["tiles"] if tiles else [])
        ],
        "watermark": _picture(pictures, tiles["watermark"], "the watermark")
        if tiles and "watermark" in tiles
        else None,
        "tables": {table.name: table for table in page.tables},
        "figures": {
            "robustness": Markup(robustness) if robustness else None,
            "mitigation": Markup(mitigation) if mitigation else None,
        },
        "scans": [_scan(story, detector, pictures) for detector in story.detectors],
        "command": f"wm-eval run {name} --seed {seed}",
        "settings": json.dumps(settings, indent=2, sort_keys=True),
        "versions": json.dumps(dict(first.versions) | {"data": first.data}, indent=2),
    }


def _scan(story: Story, detector: str, pictures: Path) -> dict[str, Any]:
    from markupsafe import Markup

    scans = {v: scan for v in VICTIMS if (scan := story.scan(detector, v)) is not None}
    return {
        "title": detector_title(detector),
        "figure": Markup(scores_figure(story, detector)),
        "victims": [
            {
                "name": victim,
                "pictures": _reversed(story, detector, victim, pictures),
                "table": labels_table(scan, detector, victim),
            }
            for victim, scan in scans.items()
        ],
    }


def _reversed(story: Story, detector: str, victim: str, pictures: Path) -> list[dict[str, Any]]:
    """One picture a label; the caption says which labels the scan named."""
    record, scan = (
        story.victims("reversed", victim, detector=detector),
        story.scan(detector, victim),
    )
    if record is None or scan is None:
        return []
    shown = []
    for label, picture in sorted(record.values["pictures"].items(), key=lambda p: int(p[0])):
        named = int(label) in scan["suspected"]
        text = f"label {label}" + (", named" if named else "")
        alt = f"reversed trigger of {text}: {picture['caption']}"
        shown.append({**_picture(pictures, picture, alt), "caption": text, "named": named})
    return shown


def _picture(folder: Path, picture: Mapping[str, Any], alt: str) -> dict[str, Any]:
    data = base64.b64encode(picture_path(folder, picture).read_bytes()).decode()
    height, width = picture["size"]
    return {
        "src": f"data:image/png;base64,{data}",
        "alt": alt,
        "caption": picture["caption"],
        "width": width,
        "height": height,
    }
