"""Every block of the tutorials, run in order in an empty folder, and what they say is printed."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from tools import release

DOCS = release.ROOT / "docs"
TUTORIALS = sorted(p for p in (DOCS / "tutorials").glob("*.md") if p.name != "index.md")
_BLOCK = re.compile(r"^```(sh|python|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")


def script_of(page: str) -> str:
    """The page as a shell script: its blocks in order, those in Python as here-documents."""
    parts = ["set -euo pipefail"]
    for language, code in _BLOCK.findall(page):
        if language == "python":
            parts.append(f"python - <<'PYTHON_BLOCK'\n{code}PYTHON_BLOCK")
        elif language == "sh":
            parts.append(code)
    return "\n".join(parts)


def shown_by(page: str) -> list[str]:
    """The lines that the page says are printed."""
    return [
        line
        for language, text in _BLOCK.findall(page)
        if language == "text"
        for line in text.splitlines()
    ]


def shape_of(line: str) -> str:
    """A line without its figures: they differ from machine to machine."""
    return " ".join(_NUMBER.sub("#", line).split())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment() -> dict[str, str]:
    """As a reader has it: no data sets but the bundled one; warnings are only told."""
    told = {k: v for k, v in os.environ.items() if k not in ("WM_DATA", "PYTHONWARNINGS")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{told['PATH']}"
    return told | {"PATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.integration
@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_a_tutorial_runs_and_prints_what_it_shows(page: Path, tmp_path: Path) -> None:
    text = page.read_text(encoding="utf-8")
    script = script_of(text).replace("8000", str(free_port()))
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=900,
    )
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed[-3000:]
    found = {shape_of(line) for line in printed.splitlines()}
    missing = [line for line in shown_by(text) if shape_of(line) not in found]
    assert missing == [], f"{page.name} shows lines that were not printed; it printed\n{printed}"


def test_the_index_leads_to_each_tutorial() -> None:
    index = (DOCS / "tutorials" / "index.md").read_text(encoding="utf-8")
    assert len(TUTORIALS) == 5
    assert all(f"]({page.name})" in index for page in TUTORIALS)


def test_a_block_that_fails_fails_the_page() -> None:
    page = "```sh\nfalse\n```\n```sh\ntrue\n```\n"
    assert subprocess.run(["bash", "-c", script_of(page)]).returncode != 0
    page = "```python\nraise SystemExit(3)\n```\n```sh\ntrue\n```\n"
    assert subprocess.run(["bash", "-c", script_of(page)], env=environment()).returncode == 3


def test_figures_may_differ_and_words_may_not() -> None:
    assert shape_of("p 0.0012 of  7") == shape_of("p 3.1e-05 of 12")
    assert shape_of("verdict: clean") != shape_of("verdict: backdoored")
