"""Pages of a study: its tables and figures, and what they were measured on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from wm_eval.numbers import keys
from wm_eval.records import RECORDS, StudyRecords, read_study
from wm_eval.render import Page, markdown, write_files
from wm_eval.titles import CLEAN
from wm_inject.core.files import write_text

_SHOWN = 5  # failures that a page names


def study_pages(study: StudyRecords) -> list[Page]:
    """Every page that the records of a study have something for.

    Raises:
        ValueError: Nothing that a table could show, or records of several studies.
    """
    from wm_eval.pages.attacks import attack_pages
    from wm_eval.pages.calibration import calibration_page
    from wm_eval.pages.detection import detection_page, index_page
    from wm_eval.pages.mitigation import mitigation_page, paper_page
    from wm_eval.pages.story import story_page

    if study.select(kind="mark"):
        return [story_page(study)]
    if keys(study, "scan", "split"):
        return [calibration_page(study)]
    pages = []
    mitigations = study.select(kind="mitigation")
    scanned = set(keys(study, "scan", "attack")) - {CLEAN}
    kinds = ["stealth", "tiles"] + ([] if mitigations or scanned else ["rates", "victim"])
    if any(e.kind in kinds for e in study.records) or any(f.kind in kinds for f in study.failures):
        pages += attack_pages(study)
    if len(scanned) > 2:
        pages += [index_page(study, name) for name in keys(study, "scan", "detector")]
    elif scanned and CLEAN in keys(study, "scan", "attack"):
        pages.append(detection_page(study))
        pages += [paper_page(study)] if mitigations else []
    if any("cda_change" in record.values for record in mitigations):
        pages.append(mitigation_page(study))
    if not pages:
        raise ValueError("expected records that a table shows, got none")
    return pages


def write_tables(folder: str | Path, formats: Sequence[str] = ("md", "csv")) -> list[Path]:
    """Write the tables of a study's records to its folder's ``tables/``.

    Args:
        folder: With ``records.jsonl``. The same records give the same bytes.
        formats: Out of `wm_eval.render.FORMATS`.

    Raises:
        ValueError: No records, nothing that a table shows, or another format.
    """
    folder = Path(folder)
    pages = study_pages(read_study(folder))
    return [path for page in pages for path in write_files(folder / "tables", page, formats)]


def write_page(folder: str | Path) -> Path:
    """Draw the figures of a study, or of every study in a folder, and write ``README.md``.

    Raises:
        ValueError: No records there.
    """
    from wm_eval.figures import draw_figures

    folder, skipped = Path(folder), {}
    for one in _studies(folder):
        try:
            skipped[one] = draw_figures(one).skipped
        except (ValueError, RuntimeError) as error:
            skipped[one] = (str(error),)
    write_text(folder / "README.md", page_text(folder, skipped=skipped))
    return folder / "README.md"


def page_text(
    folder: Path, *, title: str | None = None, skipped: Mapping[Path, Sequence[str]] | None = None
) -> str:
    """Tables, figures and failures of every study in a folder, in Markdown.

    Args:
        folder: With ``records.jsonl``, or with folders that have it.
        title: Of the page; the folder's name if None.
        skipped: By study, why figures were not drawn.

    Raises:
        ValueError: No records there.
    """
    studies = _studies(folder)
    lines = [f"# {title or folder.resolve().name}", "", "Every number comes from a record.", ""]
    several = studies != [folder]
    if several:
        lines += ["| study | failed stages |", "| --- | --- |"]
        lines += [f"| {one.name} | {len(read_study(one).failures)} |" for one in studies]
        lines.append("")
    for one in studies:
        lines += [f"## {one.name}", ""] if several else []
        lines += _section(one, folder, (skipped or {}).get(one, ()), level=3 if several else 2)
    return "\n".join(lines).rstrip("\n") + "\n"


def _studies(folder: Path) -> list[Path]:
    studies = sorted(path.parent for path in folder.rglob(RECORDS))
    if not studies:
        raise ValueError(f"expected {RECORDS} in {folder}, got none")
    return studies


def _section(folder: Path, base: Path, skipped: Sequence[str], *, level: int) -> list[str]:
    study = read_study(folder)
    where = folder.relative_to(base)
    lines, notes = [f"[Records]({(where / RECORDS).as_posix()})", ""], list(skipped)
    try:
        lines += [markdown(page, level=level) for page in study_pages(study)]
    except (ValueError, KeyError) as error:
        notes.append(f"no table yet: {error}")
    for path in sorted((folder / "figures").glob("*")):
        lines += [f"![{path.stem}]({path.relative_to(base).as_posix()})", ""]
    lines += [f"- Not here: {' '.join(note.split())}" for note in notes]
    # Where a stage failed because another did, the other one is named.
    failures = [f for f in study.failures if " failed: " not in f.reason]
    lines += [f"- Failed: `{f.id}`: {' '.join(f.reason.split())}" for f in failures[:_SHOWN]]
    lines += [f"- And {len(failures) - _SHOWN} more."] if len(failures) > _SHOWN else []
    return [*lines, ""]


__all__ = ["page_text", "study_pages", "write_page", "write_tables"]
