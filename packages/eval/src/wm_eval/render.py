"""Tables as Markdown, CSV, LaTeX and HTML, and numbers as the text of a cell."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from wm_inject.core.files import write_text

if TYPE_CHECKING:
    from wm_eval.numbers import Number, Spread

ABSENT = "–"
FORMATS = ("md", "csv", "tex", "html")
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
        # Behind the end of a row, a bracket would be read as the distance to the next row.
        "[": "{[}",
        "]": "{]}",
        "±": r"$\pm$",
        "–": "--",
    }
)
_NUMERIC = re.compile(r"[-+\d–]")  # how a cell with a number begins
_LONG = 45  # characters from which on a LaTeX column breaks its lines


class Table(NamedTuple):
    """A table of text."""

    name: str  # a short identifier, unique on its page
    title: str
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


class Page(NamedTuple):
    """Tables that share a file, with the numbers that they show."""

    name: str  # of the file, without its suffix
    title: str
    about: str  # what everything on it was measured on
    tables: tuple[Table, ...]
    numbers: tuple[Number, ...] = ()


def split_headers(text: str) -> tuple[str, ...]:
    """Headers of a table from one line, "attack | seeds"."""
    return tuple(text.split(" | "))


def percent(rate: float | None, *, digits: int = 1) -> str:
    """A rate as text: 0.9731 is "97.3 %", None a dash."""
    return ABSENT if rate is None else f"{100 * rate:.{digits}f} %"


def points(difference: Mapping[str, Any]) -> str:
    """A difference of two rates with its interval, in points: "-0.5 (-1.7 to +0.7)"."""
    value, low, high = (100 * difference[name] for name in ("value", "low", "high"))
    return f"{value:+.1f} ({low:+.1f} to {high:+.1f})"


def with_interval(rate: float, interval: Sequence[float]) -> str:
    """A rate with its interval: "97.3 % (95.7 to 98.3)"."""
    return f"{100 * rate:.1f} % ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})"


def decimal(value: float | None, *, digits: int = 2) -> str:
    """A number as text, None a dash; very small ones in powers of ten."""
    if value is None:
        return ABSENT
    return f"{value:.1e}" if 0 < abs(value) < 10**-digits else f"{value:.{digits}f}"


def plus_minus(
    spread: Spread | None, *, factor: float = 1, digits: int = 2, sign: bool = False
) -> str:
    """A mean with its standard deviation: "91.5 ± 0.3"; without one for one value; None a dash."""
    if spread is None:
        return ABSENT
    text = f"{factor * spread.mean:{'+' if sign else ''}.{digits}f}"
    return text if spread.sd is None else f"{text} ± {factor * spread.sd:.{digits}f}"


def count_range(counts: Iterable[int]) -> str:
    """Counts that may differ from row to row: "3", or "2 to 3"; none a dash."""
    values = sorted(set(counts))
    if not values:
        return ABSENT
    return str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"


def label_list(labels: Sequence[int], *, none: str = ABSENT) -> str:
    """Class labels, separated by commas."""
    return ", ".join(map(str, labels)) or none


def to_markdown(table: Table, *, level: int = 3) -> str:
    """A table with its heading and note."""
    lines = [f"{'#' * level} {_escape(table.title)}", "", _row(table.headers)]
    lines += [_row(("---",) * len(table.headers)), *map(_row, table.rows)]
    note = "\n\n".join(_escape(paragraph) for paragraph in table.note.split("\n\n"))
    return "\n".join(lines + (["", note] if note else [])) + "\n"


def markdown(page: Page, *, level: int = 2) -> str:
    """A page whose heading is of this level."""
    head = f"{'#' * level} {_escape(page.title)}\n\n"
    head += f"{_escape(page.about)}\n\n" if page.about else ""
    return head + "\n".join(to_markdown(table, level=level + 1) for table in page.tables)


def tidy_csv(page: Page) -> str:
    """The numbers of a page, one a row and none rounded; rates are fractions."""
    keys = list(dict.fromkeys(name for number in page.numbers for name in number.key))
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(("source", *keys, "measure", "value"))
    for number in page.numbers:
        cells = (number.key.get(name, "") for name in keys)
        writer.writerow((number.source, *cells, number.measure, repr(number.value)))
    return buffer.getvalue()


def latex(page: Page) -> str:
    """A ``table*`` with booktabs rules for each table."""
    head = (
        "% Rendered from records. Needs \\usepackage{booktabs} and \\usepackage[T1]{fontenc}.\n"
        f"% {_latex(page.title)}. {_latex(page.about)}\n"
    )
    return head + "\n".join(_latex_table(table) for table in page.tables)


def html_page(page: Page) -> str:
    """A page that loads nothing and follows the reader's light or dark setting."""
    text: str = template("tables.html").render(page=page)
    return text + "\n"


def template(name: str) -> Any:
    """A Jinja template of this package.

    Raises:
        RuntimeError: Jinja is not installed.
    """
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        raise RuntimeError("expected jinja2 for pages: pip install wm-eval") from error
    source = resources.files("wm_eval.pages").joinpath(name).read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(source)


_RENDER = {"md": markdown, "csv": tidy_csv, "tex": latex, "html": html_page}


def write_files(folder: Path, page: Page, formats: Sequence[str] = ("md", "csv")) -> list[Path]:
    """Write a page as ``folder/NAME.FORMAT``, a CSV only where it has numbers.

    Raises:
        ValueError: A format that is not one of FORMATS.
    """
    if unknown := set(formats) - set(FORMATS):
        raise ValueError(f"expected formats in {', '.join(FORMATS)}, got {', '.join(unknown)}")
    paths = []
    for name in formats:
        if name != "csv" or page.numbers:
            paths.append(folder / f"{page.name}.{name}")
            folder.mkdir(parents=True, exist_ok=True)
            write_text(paths[-1], _RENDER[name](page))
    return paths


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
    columns = []
    for cells in zip(table.headers, *table.rows, strict=True):
        if max(map(len, cells)) > _LONG:
            columns.append(r"p{0.3\linewidth}")
        else:
            columns.append("r" if all(_NUMERIC.match(cell) for cell in cells[1:]) else "l")
    return "".join(columns)


def _latex_row(cells: Sequence[str]) -> str:
    return " & ".join(map(_latex, cells)) + r" \\"


def _latex(text: str) -> str:
    return " ".join(text.split()).translate(_TEX)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_escape(cell).replace("|", "\\|") for cell in cells) + " |"


def _escape(text: str) -> str:
    """One line of Markdown, in which a tag stays text."""
    return " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
