from __future__ import annotations

import re
from pathlib import Path

import pytest
from tools.render_results import RESULTS, render


@pytest.fixture(scope="module")
def pages() -> dict[Path, str]:
    return dict(render(RESULTS))


@pytest.mark.integration
def test_pages_and_tables_agree_with_the_records(pages: dict[Path, str]) -> None:
    stale = [
        str(name)
        for name, text in pages.items()
        if (RESULTS / name).read_text(encoding="utf-8") != text
    ]
    assert stale == [], "run python tools/render_results.py"


def test_links_and_pictures_of_the_pages_exist(pages: dict[Path, str]) -> None:
    links = [
        (name, target)
        for name, text in pages.items()
        for target in re.findall(r"\]\(([^)#]+)\)", text)
    ]
    assert [link for link in links if not ((RESULTS / link[0]).parent / link[1]).exists()] == []
