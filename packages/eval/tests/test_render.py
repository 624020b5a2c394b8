"""Pages as Markdown, CSV, LaTeX and HTML."""

from __future__ import annotations

import csv
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from wm_eval.numbers import Number, spread
from wm_eval.render import (
    FORMATS,
    Page,
    Table,
    count_range,
    decimal,
    html_page,
    label_list,
    latex,
    markdown,
    percent,
    plus_minus,
    points,
    tidy_csv,
    with_interval,
    write_files,
)
from wm_eval.titles import attack_title, method_title, short_attack_title

NASTY = 'a <b>"x"</b> & 50 % of $y_1^2 {z} ~ #3 \\end | [c]\nnew line that is very, very long'
PAGE = Page(
    "page",
    "Title",
    "About.",
    (
        Table(
            "one", "One", ("attack", "source", "x"), (("A", "measured", "33.3 ± 0.0"),), "A note."
        ),
        Table("two", "Two", ("attack", "source", "reason"), (("A", "paper", NASTY),)),
    ),
    (
        Number("cda", {"attack": 'my "own", name', "seed": 0}, 1 / 3),
        Number("cda", {"attack": "a", "corruption": "none"}, 0.915, "paper"),
    ),
)


class Reader(HTMLParser):
    """The cells of a page, what is open at its end, and what it loads."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        if tag not in ("meta", "br"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        self.loads += [v for k, v in attrs if k in ("src", "href", "action")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def test_numbers_as_text() -> None:
    assert percent(0.97312) == "97.3 %" and percent(None) == "–"
    assert percent(0.97312, digits=2) == "97.31 %"
    assert with_interval(0.973, (0.957, 0.983)) == "97.3 % (95.7 to 98.3)"
    assert points({"value": -0.005, "low": -0.017, "high": 0.007}) == "-0.5 (-1.7 to +0.7)"
    assert decimal(None) == "–" and decimal(1.234) == "1.23" and decimal(0.0) == "0.00"
    assert decimal(4.9e-6, digits=4) == "4.9e-06"
    assert plus_minus(None) == "–" and plus_minus(spread([2.0])) == "2.00"
    assert plus_minus(spread([0.90, 0.92]), factor=100, digits=1) == "91.0 ± 1.4"
    assert plus_minus(spread([0.01]), factor=100, digits=1, sign=True) == "+1.0"
    assert count_range([]) == "–" and count_range([3, 3]) == "3"
    assert count_range([12, 3, 7]) == "3 to 12"
    assert label_list([0, 3]) == "0, 3" and label_list([]) == "–"


def test_files_are_written_and_repeat(tmp_path: Path) -> None:
    paths = write_files(tmp_path, PAGE, FORMATS)
    assert [path.name for path in paths] == [f"page.{name}" for name in FORMATS]
    first = [path.read_bytes() for path in paths]
    assert [path.read_bytes() for path in write_files(tmp_path, PAGE, FORMATS)] == first
    (only,) = write_files(tmp_path, PAGE._replace(numbers=()))
    assert only.suffix == ".md"
    with pytest.raises(ValueError, match="formats in md, csv, tex, html, got doc"):
        write_files(tmp_path, PAGE, ("doc",))


def test_the_csv_has_a_row_for_every_number_in_full() -> None:
    rows = list(csv.DictReader(io.StringIO(tidy_csv(PAGE))))
    assert rows == [
        {
            "source": "measured",
            "attack": 'my "own", name',
            "seed": "0",
            "corruption": "",
            "measure": "cda",
            "value": repr(1 / 3),
        },
        {
            "source": "paper",
            "attack": "a",
            "seed": "",
            "corruption": "none",
            "measure": "cda",
            "value": "0.915",
        },
    ]


def test_markdown_keeps_a_reason_in_its_cell_and_its_tags_as_text() -> None:
    text = markdown(PAGE)
    assert text.startswith("## Title\n\nAbout.\n\n### One\n\n| attack | source | x |")
    line = next(line for line in text.splitlines() if "&lt;b>" in line)
    assert "&amp; 50 %" in line and "\\| [c] new line" in line
    for block in text.split("### ")[1:]:
        rows = [line for line in block.splitlines() if line.startswith("|")]
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1


def test_latex_has_rules_of_booktabs_and_escapes() -> None:
    text = latex(PAGE)
    assert text.count(r"\toprule") == text.count(r"\bottomrule") == len(PAGE.tables)
    assert text.isascii() and r"33.3 $\pm$ 0.0" in text
    rows = [line for line in text.splitlines() if line.endswith(r" \\")]
    lengths = [len(t.headers) for t in PAGE.tables for _ in range(1 + len(t.rows))]
    assert [len(re.split(r"(?<!\\)&", line)) for line in rows] == lengths
    assert (
        r"a \textless{}b\textgreater{}\textquotedbl{}x\textquotedbl{}\textless{}/b\textgreater{} "
        r"\& 50 \% of \$y\_1\textasciicircum{}2 \{z\} \textasciitilde{} \#3 "
        r"\textbackslash{}end \textbar{} {[}c{]} new line"
    ) in text
    # Columns of numbers to the right, of sentences in lines of their own.
    assert r"\begin{tabular}{llr}" in text and r"\begin{tabular}{llp{0.3\linewidth}}" in text


def test_the_html_page_escapes_loads_nothing_and_follows_the_light() -> None:
    text, reader = html_page(PAGE), Reader()
    reader.feed(text)
    assert reader.open == [] and reader.loads == []
    assert "http" not in text and "<script" not in text and "@import" not in text
    assert '<html lang="en">' in text and "prefers-color-scheme: dark" in text
    assert reader.rows == [list(c) for t in PAGE.tables for c in (t.headers, *t.rows)]
    assert "<b>" not in text and text.count('<tr class="paper">') == 1


def test_titles() -> None:
    assert attack_title("badnets") == "BadNets" and attack_title("watermark") == "Spy-Watermark"
    assert attack_title("input-aware") == "Input-aware (not in the paper)"
    assert short_attack_title("input-aware") == "Input-aware" and attack_title("zebra") == "zebra"
    assert attack_title("clean") == "No attack (clean victim)"
    assert method_title("nad", oracle_label=True) == "NAD, oracle label"
