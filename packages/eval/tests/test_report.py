from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from wm_eval.records import read_records, write_text
from wm_eval.report import render_report
from wm_eval.summary import headline, story
from wm_eval.tables import in_order, number, percent, points, render_markdown, study_tables

VOID = {"meta", "img", "br", "link", "input"}


class Page(HTMLParser):
    """Collects what matters for a self-contained, accessible page."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.loads: list[str] = []
        self.images: list[dict] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list) -> None:
        found = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        self.ids += [found["id"]] if "id" in found else []
        self.loads += [v for k, v in attrs if k in ("src", "href", "xlink:href", "action") and v]
        self.images += [found] if tag == "img" else []

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read(study: Path) -> tuple[str, Page]:
    text = render_report(study).read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    assert page.open == []
    return text, page


def test_the_page_loads_nothing_from_anywhere(study: Path) -> None:
    text, page = read(study)
    assert page.loads
    assert all(src.startswith(("data:image/png;base64,", "#")) for src in page.loads)
    assert "http://" not in text and "https://" not in text
    assert "@import" not in text
    assert all(url.startswith("url(#") for url in re.findall(r"url\([^)]*", text))


def test_only_the_pages_own_script_may_run(study: Path) -> None:
    """The one that ships, by its hash: whatever a record smuggled in would not run."""
    text, _ = read(study)
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert text.count("<script") == 1
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy is not None
    assert (
        policy[1].startswith("default-src 'none'") and f"script-src 'sha256-{digest}'" in policy[1]
    )
    for word in ("fetch(", "XMLHttpRequest", "eval(", "innerHTML", "http"):
        assert word not in script


def test_the_slider_is_there_only_with_the_images_it_needs(study: Path) -> None:
    assert 'id="gain"' in read(study)[0]
    assert 'id="gain"' not in render_report(study, dataset_images=False).read_text()


def test_the_page_is_accessible_and_follows_the_light(study: Path) -> None:
    text, page = read(study)
    assert all(image.get("alt") for image in page.images)
    assert text.count("<svg") == text.count('<svg role="img" aria-label=')
    assert '<html lang="en">' in text and "prefers-color-scheme: dark" in text
    assert len(page.ids) == len(set(page.ids))
    # Matplotlib's stand-in colours must all have become the page's own.
    assert not re.search(r"#0[1-6]0[1-6]0[1-6]", text)


def test_every_part_of_the_story_is_there(study: Path) -> None:
    _, page = read(study)
    for part in (
        "Planted: with a watermark at 40.0 dB",
        "change is multiplied by 10",
        "Is this image marked?",
        "absent: no weights",
        "What the defences find",
        "named no label",
        "What this is for",
        "wm-eval report FOLDER",
        "label 0, named",
        "a <made-up> picture",
    ):
        assert part in page.text
    assert len([i for i in page.images if i["alt"].startswith("image ")]) == 2 * 5
    assert len([i for i in page.images if "reversed trigger" in i["alt"]]) == 4 * 4


def test_the_same_records_draw_the_same_bytes(study: Path) -> None:
    first = render_report(study).read_bytes()
    assert render_report(study).read_bytes() == first


def test_an_unfinished_study_has_a_page_too(study: Path) -> None:
    for path in (study / "records").glob("*.json"):
        if not path.name.startswith(("data", "watermark")):
            path.unlink()
    text, page = read(study)
    assert "The watermark" in page.text and "What the defences find" not in page.text
    assert "<svg" not in text


def test_an_attack_that_failed_is_not_called_planted(study: Path) -> None:
    path = study / "records" / "robustness.json"
    content = json.loads(path.read_text())
    none = content["values"]["victims"]["backdoored"]["none"]
    none |= {"asr": 0.085, "asr_interval": [0.05, 0.13], "ftr": 0.06, "ftr_interval": [0.03, 0.1]}
    write_text(path, json.dumps(content))
    _, page = read(study)
    assert "Not planted: with a watermark at 40.0 dB, 8.5 %" in page.text


def test_only_one_victim_scanned_is_drawn_too(study: Path) -> None:
    (study / "records" / "scan-nc-backdoored.json").unlink()
    assert "Neural Cleanse, clean victim" in read(study)[1].text


def test_nothing_cleaned_is_said_so(study: Path) -> None:
    (study / "records" / "cleaning-reverse.json").unlink()
    assert "Not cleaned: no scan named a label." in read(study)[1].text


@pytest.mark.parametrize("file", ["gone.png", "../records/data.json"])
def test_a_picture_that_is_missing_or_elsewhere_is_refused(study: Path, file: str) -> None:
    path = study / "records" / "watermark.json"
    content = json.loads(path.read_text())
    content["values"]["pictures"]["watermark"]["file"] = file
    write_text(path, json.dumps(content))
    with pytest.raises(ValueError, match=r"^expected the picture"):
        render_report(study)


def test_no_records_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="found none"):
        render_report(tmp_path)


def test_records_of_two_studies_are_refused(study: Path) -> None:
    path = study / "records" / "robustness.json"
    write_text(path, path.read_text().replace('"data": "abc"', '"data": "other"'))
    with pytest.raises(ValueError, match="records of one study"):
        render_report(study)


def test_tables_are_rendered_from_records_with_counts_and_intervals(study: Path) -> None:
    text = render_markdown(study / "records")
    assert "96.5 % (94.5 to 98.5)" in text and "0 of 298" in text and "538" in text
    assert "not cleaned: the scan named no label" in text
    tables = study_tables(read_records(study / "records"))
    assert len({table.name for table in tables}) == len(tables) == 11
    assert all(len(row) == len(t.headers) for t in tables for row in t.rows)


def test_the_story_takes_about_a_dozen_plain_lines(study: Path) -> None:
    records = read_records(study / "records")
    assert 10 <= len(story(records)) <= 15
    assert len(headline(records)) == 3


def test_numbers_as_text() -> None:
    assert percent(0.9731) == "97.3 %" and percent(None) == "–"
    assert points({"value": -0.005, "low": -0.017, "high": 0.007}) == "-0.5 (-1.7 to +0.7)"
    assert number(1.234) == "1.23" and number(None) == "–"
    assert number(0.0001, digits=2) == "1.0e-04" and number(0.0) == "0.00"
    assert in_order(["rotation", "zzz", "none", "jpeg"]) == ["none", "rotation", "jpeg", "zzz"]


def test_images_of_the_data_set_can_stay_out_of_the_page(tmp_path: Path, study: Path) -> None:
    whole = render_report(study).read_text(encoding="utf-8")
    without = render_report(study, dataset_images=False).read_text(encoding="utf-8")
    assert "image 1, " in whole
    assert without.count("<img") == whole.count("<img") - 2 * 2  # two rows, two kinds


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_a_browser_runs_the_pages_script_and_nothing_else(study: Path) -> None:
    page = render_report(study)
    text = page.read_text(encoding="utf-8")
    page.write_text(text.replace("</main>", "</main><script>document.title = 'taken'</script>"))
    browser = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    shown = subprocess.run(
        [*browser, page.as_uri()], capture_output=True, text=True, timeout=120, check=True
    ).stdout
    assert "<p hidden" in text and "<p hidden" not in shown  # the slider came to life
    assert 'role="button"' in shown and '<th scope="col"><button>' in shown
    assert "<title>taken" not in shown
