"""A page of tables in four forms: Markdown, LaTeX, HTML to look at, CSV to go on with."""

from __future__ import annotations

import csv
import html
import io
import re
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from wm_eval.attacks.gather import Number
from wm_eval.records import write_text
from wm_eval.tables import Table, to_markdown

_TEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "{": r"\{",
        "}": r"\}",
        "&": r"\&",
        "%": r"\%",
        "$": r"\$",
        "#": r"\#",
        "_": r"\_",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        '"': r"\textquotedbl{}",
        # Behind the end of a row, a bracket would be read as the row's distance to the next.
        "[": "{[}",
        "]": "{]}",
        "±": r"$\pm$",
        "–": "--",
    }
)
_NUMBER = re.compile(r"[-+\d–]")  # what a cell of figures begins with
_SENTENCE = 45  # letters from which on a LaTeX column breaks its lines


class Page(NamedTuple):
    """What one file holds."""

    name: str  # the file's, without its ending
    title: str
    about: str  # what everything on it was measured on
    tables: tuple[Table, ...]
    numbers: tuple[Number, ...]
    data: str  # the data set


def write_page(folder: Path, page: Page) -> list[Path]:
    """Write a page as ``folder/NAME.{md,tex,csv,html}``, each atomically."""
    forms = {"md": markdown, "tex": latex, "csv": tidy_csv, "html": html_page}
    paths = []
    for ending, render in forms.items():
        paths.append(folder / f"{page.name}.{ending}")
        write_text(paths[-1], render(page))
    return paths


def markdown(page: Page) -> str:
    """A page in Markdown."""
    safe = [
        Table(
            table.name,
            _html(table.title),
            tuple(map(_html, table.headers)),
            tuple(tuple(map(_html, row)) for row in table.rows),
            _html(table.note),
        )
        for table in page.tables
    ]
    head = f"## {_html(page.title)}\n\n{_html(page.about)}\n\n"
    return head + "\n".join(to_markdown(table) for table in safe)


def latex(page: Page) -> str:
    """A page in LaTeX: a ``table*`` with booktabs rules for each of its tables."""
    head = (
        "% Rendered from records. Needs \\usepackage{booktabs} and \\usepackage[T1]{fontenc}.\n"
        f"% {_latex(page.title)}. {_latex(page.about)}\n"
    )
    return head + "\n".join(_latex_table(table) for table in page.tables)


def tidy_csv(page: Page) -> str:
    """The numbers of a page, one a row and none rounded; rates are fractions."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(("table", "data", *Number._fields))
    for number in page.numbers:
        *names, seed, value = number
        writer.writerow((page.name, page.data, *names, "" if seed is None else seed, repr(value)))
    return buffer.getvalue()


def html_page(page: Page) -> str:
    """A page that loads nothing from anywhere and follows the reader's light or dark setting."""
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        raise RuntimeError("expected jinja2 for pages: pip install wm-eval") from error
    source = resources.files(__package__).joinpath("tables.html").read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    text: str = environment.from_string(source).render(page=page)
    return text + "\n"


def _latex_table(table: Table) -> str:
    lines = [
        r"\begin{table*}",
        r"\centering\scriptsize\setlength{\tabcolsep}{3pt}",
        rf"\caption{{{_latex(table.title)}}}",
        rf"\label{{tab:{table.name}}}",
        rf"\begin{{tabular}}{{{_alignment(table)}}}",
        r"\toprule",
        _latex_row(table.headers),
        r"\midrule",
        *(_latex_row(row) for row in table.rows),
        r"\bottomrule",
        r"\end{tabular}",
        *([rf"\par\smallskip\raggedright {_latex(table.note)}"] if table.note else []),
        r"\end{table*}",
    ]
    return "\n".join(lines) + "\n"


def _alignment(table: Table) -> str:
    """Numbers to the right, words to the left, sentences in lines of their own."""
    found = []
    for cells in zip(table.headers, *table.rows, strict=True):
        if max(map(len, cells)) > _SENTENCE:
            found.append(r"p{0.3\linewidth}")
        else:
            found.append("r" if all(_NUMBER.match(cell) for cell in cells[1:]) else "l")
    return "".join(found)


def _latex_row(cells: tuple[str, ...]) -> str:
    return " & ".join(map(_latex, cells)) + r" \\"


def _latex(text: str) -> str:
    return _line(text).translate(_TEX)


def _html(text: str) -> str:
    """Text for Markdown, where a tag in a reason would otherwise be one."""
    return html.escape(_line(text), quote=False)


def _line(text: str) -> str:
    return " ".join(text.split())


__all__ = ["Page", "html_page", "latex", "markdown", "tidy_csv", "write_page"]
