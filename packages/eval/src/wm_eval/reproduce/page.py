"""The page of a reproduction: every table and figure that there are records for, paper beside ours.

Nothing is computed here: pages come from the studies' own renderers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from wm_eval.attacks.config import RECIPES
from wm_eval.attacks.figure import draw_figure
from wm_eval.attacks.gather import read_study
from wm_eval.attacks.learning import learning
from wm_eval.attacks.render import Page, markdown, write_page
from wm_eval.attacks.tables import table1, table2
from wm_eval.cleaning.gather import read_cleaning
from wm_eval.cleaning.tables import cleaning_page
from wm_eval.paper2.figures import write_figures
from wm_eval.paper2.index_figure import index_page, write_index_figure
from wm_eval.paper2.tables import pages as detect_pages
from wm_eval.population.tables import write_population
from wm_eval.records import write_text
from wm_eval.reproduce.plan import Part, Scale
from wm_eval.reproduce.run import Told

_SHOWN = 5  # failed stages that a section names


def write_readme(out: Path, scale: Scale, told: Sequence[Told]) -> Path:
    """Write ``OUT/README.md`` and the tables and figures that it shows.

    Args:
        out: The folder of the parts.
        scale: The profile.
        told: What became of every part so far.
    """
    head = [
        "# Both papers, as far as they were run here",
        "",
        f"`python tools/reproduce.py --profile {scale}` makes this page. Every number comes from a "
        "record in the folder of its section; the papers' own figures stand beside ours. Why a "
        "setting is not a paper's is told in docs/recipes.md.",
        "",
        "| part | what became of it |",
        "|---|---|",
        *(f"| {each.part.name} | {each.why or 'done'} |" for each in told),
        "",
    ]
    sections = [line for each in told for line in _section(out, each.part)]
    write_text(out / "README.md", "\n".join([*head, *sections]))
    return out / "README.md"


def _section(out: Path, part: Part) -> list[str]:
    folder = out / part.name
    if not any(folder.rglob("records/[!.]*.json")):
        return []
    lines = [f"## {part.title}", "", f"[Records]({part.name}).", ""]
    missing: list[str] = []
    try:
        lines += _BODIES[part.kind](folder, missing)
    except (ValueError, KeyError) as error:
        missing.append(f"no table yet: {' '.join(str(error).split())}")
    lines += [f"- Not here: {reason}" for reason in dict.fromkeys(missing)]
    return [*lines, *_failures(folder), ""]


def _attacks(folder: Path, missing: list[str]) -> list[str]:
    study = read_study(folder)
    pages = [table1(study, recipe) for recipe in RECIPES if study.started(recipe)]
    lines = _pages(folder, [*pages, table2(study), learning(study)], missing)
    return [*lines, *_drawn(folder, lambda: [draw_figure(folder)], missing)]


def _figure3(folder: Path, missing: list[str]) -> list[str]:
    lines = _pages(folder, [index_page(folder)], missing)
    return [*lines, *_drawn(folder, lambda: write_index_figure(folder)[:1], missing)]


def _detect(folder: Path, missing: list[str]) -> list[str]:
    lines = _pages(folder, detect_pages(folder), missing)

    def draw() -> list[Path]:
        figures = write_figures(folder)
        missing.extend(figures.skipped)
        return list(figures.drawn)

    return [*lines, *_drawn(folder, draw, missing)]


def _cleaning(folder: Path, missing: list[str]) -> list[str]:
    return _pages(folder, [cleaning_page(read_cleaning(folder))], missing)


def _population(folder: Path, missing: list[str]) -> list[str]:
    return [write_population(folder)[0].read_text(encoding="utf-8")]


_BODIES: dict[str, Callable[[Path, list[str]], list[str]]] = {
    "attacks": _attacks,
    "figure3": _figure3,
    "detect": _detect,
    "cleaning": _cleaning,
    "population": _population,
}


def _pages(folder: Path, pages: Sequence[Page], missing: list[str]) -> list[str]:
    """Pages in Markdown, a level down; their other forms go beside the records."""
    lines = []
    for page in pages:
        try:
            write_page(folder / "tables", page)
        except (RuntimeError, ImportError) as error:
            missing.append(f"tables in HTML: {error}")  # the other forms are written by then
        lines += [
            f"#{line}" if line.startswith("#") else line for line in markdown(page).split("\n")
        ]
    return lines


def _drawn(folder: Path, draw: Callable[[], list[Path]], missing: list[str]) -> list[str]:
    try:
        paths = draw()
    except (ValueError, RuntimeError, ImportError) as error:
        missing.append(f"figures: {' '.join(str(error).split())}")
        return []
    here = [path.relative_to(folder.parent).as_posix() for path in paths]
    return [line for path in here for line in (f"![{Path(path).stem}]({path})", "")]


def _failures(folder: Path) -> list[str]:
    """The first stages that failed by themselves, each with its reason."""
    failed = []
    for path in sorted(folder.rglob("failures/[!.]*.json")):
        reason = json.loads(path.read_text(encoding="utf-8"))["reason"]
        if " failed: " not in reason:  # else another stage is the cause, and is named
            failed.append(f"- Failed: `{path.stem}`: {reason}")
    more = [f"- And {len(failed) - _SHOWN} more."] if len(failed) > _SHOWN else []
    return [*failed[:_SHOWN], *more]


__all__ = ["write_readme"]
