from __future__ import annotations

from tools.render_results import RESULTS, render


def test_the_results_page_says_what_the_records_say() -> None:
    assert (RESULTS / "README.md").read_text(encoding="utf-8") == render(RESULTS)
