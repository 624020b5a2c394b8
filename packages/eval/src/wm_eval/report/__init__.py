"""One self-contained HTML page that tells a whole study, drawn from its records and pictures."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from wm_eval.records import Record, read_records, write_text
from wm_eval.report.figures import cleaning_figure, robustness_figure, scores_figure
from wm_eval.summary import headline
from wm_eval.tables import DEFENCES, VICTIMS, Table, labels_table, study_tables

__all__ = ["KINDS", "render_report"]

KINDS = ("original", "poisoned", "residual", "extracted", "extracted-clean")
OF_THE_DATA = ("original", "poisoned")  # pictures that show images of the data set


def render_report(folder: str | Path, *, dataset_images: bool = True) -> Path:
    """Write ``report.html`` from the records and pictures of a study.

    Args:
        folder: The study's folder, with ``records/`` and ``pictures/``. A study that is not
            finished gives a page of what is there.
        dataset_images: False leaves out the pictures that show images of the data set, for data
            that may not be passed on.

    Returns:
        The page. The same records give the same bytes.

    Raises:
        ValueError: No records, records of different studies, or a picture that is missing.
    """
    folder = Path(folder)
    records = read_records(folder / "records")
    page = folder / "report.html"
    kinds = tuple(k for k in KINDS if dataset_images or k not in OF_THE_DATA)
    content = _content(records, folder / "pictures", kinds) | _script()
    write_text(page, _template().render(**content))
    return page


def _template() -> Any:
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        raise RuntimeError("expected jinja2 for reports: pip install wm-eval") from error
    source = resources.files(__package__).joinpath("template.html").read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(source)


def _script() -> dict[str, Any]:
    """The page's script, and the hash by which the page allows it and no other."""
    from markupsafe import Markup

    text = resources.files(__package__).joinpath("report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return {"script": Markup(text), "script_hash": f"sha256-{digest}"}


def _content(records: Mapping[str, Record], pictures: Path, kinds: Sequence[str]) -> dict[str, Any]:
    tables = {table.name: table for table in study_tables(records)}
    first = next(iter(records.values()))
    name = records["data"].values["name"] if "data" in records else "images"
    mark = records["watermark"].values["pictures"] if "watermark" in records else None
    study = records["data"].config["settings"] if "data" in records else first.config["settings"]
    return {
        "title": f"Plant, find and remove an invisible backdoor: {name}",
        "subtitle": f"Seed {first.seed}. Data {first.data[:12]}. Everything here was measured by "
        "one run; nothing was typed.",
        "headline": headline(records),
        "gain": mark["gain"] if mark else 1,
        "kinds": kinds,
        "rows": _rows(mark, pictures, kinds) if mark else [],
        "watermark": _picture(pictures, mark["watermark"], "the watermark") if mark else None,
        "tables": tables,
        "figures": _figures(records),
        "scans": _scans(records, tables, pictures),
        "command": _command(study, first.seed),
        "settings": json.dumps(_settings(records), indent=2, sort_keys=True),
        "versions": json.dumps(dict(first.versions) | {"data": first.data}, indent=2),
    }


def _figures(records: Mapping[str, Record]) -> dict[str, Any]:
    from markupsafe import Markup

    robustness = robustness_figure(records["robustness"]) if "robustness" in records else None
    cleaning = cleaning_figure(records)
    return {
        "robustness": Markup(robustness) if robustness else None,
        "cleaning": Markup(cleaning) if cleaning else None,
    }


def _rows(
    mark: Mapping[str, Any], pictures: Path, kinds: Sequence[str]
) -> list[list[dict[str, Any]]]:
    return [
        [_picture(pictures, row[kind], f"image {i + 1}, {row[kind]['caption']}") for kind in kinds]
        for i, row in enumerate(mark["rows"])
    ]


def _scans(
    records: Mapping[str, Record], tables: Mapping[str, Table], pictures: Path
) -> list[dict[str, Any]]:
    from markupsafe import Markup

    scans = []
    for defence, title in DEFENCES.items():
        found = {v: records[n] for v in VICTIMS if (n := f"scan-{defence}-{v}") in records}
        if not found:
            continue
        victims = [
            {
                "name": victim,
                "pictures": _reversed(record, pictures),
                "table": labels_table(record, defence, victim),
            }
            for victim, record in found.items()
        ]
        figure = Markup(scores_figure(records, defence))
        scans.append({"title": title, "figure": figure, "victims": victims})
    return scans


def _reversed(record: Record, pictures: Path) -> list[dict[str, Any]]:
    """One picture a label; the caption says which labels the scan named."""
    shown = []
    for label, picture in record.values["pictures"].items():
        named = int(label) in record.values["suspected"]
        text = f"label {label}" + (", named" if named else "")
        alt = f"reversed trigger of {text}: {picture['caption']}"
        shown.append({**_picture(pictures, picture, alt), "caption": text, "named": named})
    return sorted(shown, key=lambda p: int(p["caption"].split()[1].rstrip(",")))


def _picture(folder: Path, picture: Mapping[str, Any], alt: str) -> dict[str, Any]:
    path = folder / picture["file"]
    # The name comes from a record, and a record may come from a stranger.
    if path.parent != folder or not path.is_file():
        raise ValueError(f"expected the picture {picture['file']} in {folder}, found none")
    data = base64.b64encode(path.read_bytes()).decode()
    height, width = picture["size"]
    return {
        "src": f"data:image/png;base64,{data}",
        "alt": alt,
        "caption": picture["caption"],
        "width": width,
        "height": height,
    }


def _command(study: Mapping[str, Any], seed: int) -> str:
    if study.get("name") in ("demo", "demo-pretrained"):
        how = "" if study["name"] == "demo" else " --pretrained"
        return f"wm-eval demo{how} --seed {seed} --out runs/{study['name']}"
    return f"wm-eval run study.toml --seed {seed} --out runs/{study.get('name', 'study')}"


def _settings(records: Mapping[str, Record]) -> dict[str, Any]:
    return {name: record.config["settings"] for name, record in records.items()}
