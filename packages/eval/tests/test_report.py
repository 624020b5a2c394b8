"""The report and the story of a made-up study."""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from wm_eval.pages import page_text, study_pages, write_page
from wm_eval.pages.report import render_report
from wm_eval.pages.story import corruptions_in_order
from wm_eval.pages.story_text import headline, story_lines
from wm_eval.records import Record, read_records, read_study

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


def edit(study: Path, change: Callable[[Record], Record | None]) -> None:
    """Change or drop records of a study."""
    records = [change(record) for record in read_records(study).values()]
    text = "".join(record.line for record in records if record is not None)
    (study / "records.jsonl").write_text(text, encoding="utf-8")


def without(study: Path, kind: str, **key: Any) -> None:
    edit(study, lambda record: None if record.has(kind, **key) else record)


def with_values(study: Path, kind: str, values: dict[str, Any], **key: Any) -> None:
    def change(record: Record) -> Record:
        if not record.has(kind, **key):
            return record
        return replace(record, values={**record.values, **values})

    edit(study, change)


@pytest.mark.integration
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
        "wm-eval page FOLDER",
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
    first = ("images", "stealth", "mark", "tiles")
    edit(study, lambda record: record if record.kind in first else None)
    text, page = read(study)
    assert "The watermark" in page.text and "What the defences find" not in page.text
    assert "<svg" not in text


def test_an_attack_that_failed_is_not_called_planted(study: Path) -> None:
    none = read_study(study).select("rates", attack="watermark")[0].values["corruptions"]["none"]
    low = {"asr": 0.085, "asr_interval": [0.05, 0.13], "ftr": 0.06, "ftr_interval": [0.03, 0.1]}
    with_values(study, "rates", {"corruptions": {"none": none | low}}, attack="watermark")
    assert headline(read_study(study))[0].startswith("Not planted")


def test_what_was_not_scanned_or_cleaned_is_left_out(study: Path) -> None:
    without(study, "scan", detector="nc", attack="watermark")
    without(study, "mitigation", method="unlearning-reverse")
    text = read(study)[1].text
    assert "Neural Cleanse, clean victim" in text
    assert "Not cleaned" in headline(read_study(study))[-1]


@pytest.mark.parametrize("file", ["gone.png", "../records.jsonl"])
def test_a_picture_that_is_missing_or_elsewhere_is_refused(study: Path, file: str) -> None:
    with_values(study, "tiles", {"watermark": {"file": file, "caption": "", "size": [8, 8]}})
    with pytest.raises(ValueError, match="picture"):
        render_report(study)


def test_no_records_and_records_of_two_studies_are_refused(tmp_path: Path, study: Path) -> None:
    with pytest.raises(ValueError, match=r"records\.jsonl"):
        render_report(tmp_path / "nowhere")
    edit(study, lambda r: replace(r, data="other") if r.kind == "mark" else r)
    with pytest.raises(ValueError, match="data set"):
        render_report(study)


def test_tables_have_counts_and_intervals(study: Path) -> None:
    (page,) = study_pages(read_study(study))
    text = page_text(study)
    assert "96.5 % (94.5 to 98.5)" in text and "0 of 298" in text and "538" in text
    assert "not cleaned: the scan named no label" in text
    assert len({table.name for table in page.tables}) == len(page.tables) == 11
    assert all(len(row) == len(t.headers) for t in page.tables for row in t.rows)


def test_the_story_takes_about_a_dozen_lines(study: Path) -> None:
    records = read_study(study)
    assert 10 <= len(story_lines(records)) <= 15
    assert len(headline(records)) == 3


def test_corruptions_are_in_the_order_of_the_papers() -> None:
    names = ["rotation", "zzz", "none", "jpeg"]
    assert corruptions_in_order(names) == ["none", "rotation", "jpeg", "zzz"]


def test_a_page_has_the_figures_of_every_study_in_a_folder(study: Path) -> None:
    page = write_page(study)
    assert page.read_text().count("![") == 3
    both = write_page(study.parent)
    assert both.read_text().count("![") == 3 and "(study/figures/watermark.png)" in both.read_text()
    assert page_text(study.parent) == both.read_text()
    with pytest.raises(ValueError, match=r"records\.jsonl"):
        page_text(study / "figures")


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
