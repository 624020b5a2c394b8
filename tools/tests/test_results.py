from __future__ import annotations

from pathlib import Path

import pytest
from tools.render_results import ATTACKS, RESULTS, render

from wm_eval.attacks.tables import write_tables


def test_the_results_page_says_what_the_records_say() -> None:
    assert (RESULTS / "README.md").read_text(encoding="utf-8") == render(RESULTS)


@pytest.mark.parametrize("name", ATTACKS)
def test_the_tables_of_attacks_say_what_the_records_say(name: str, tmp_path: Path) -> None:
    for part in ("records", "failures"):
        if (RESULTS / name / part).is_dir():
            (tmp_path / part).symlink_to(RESULTS / name / part)
    for path in write_tables(tmp_path):
        assert (RESULTS / name / "tables" / path.name).read_bytes() == path.read_bytes()
