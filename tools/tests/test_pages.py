"""What the documentation says about code and records is so, and the site builds."""

from __future__ import annotations

import ast
import importlib
import logging
import re
from pathlib import Path

import pytest
from tools import release
from tools.docs_site import OUTSIDE, site_links
from tools.page_tables import joined, pick, without_repeats
from tools.render_pages import (
    ATTACK_PAGES,
    DOCS,
    MARK,
    METHOD_PAGES,
    RESULTS,
    render_pages,
    settings_table,
    with_tail,
)

from wm_eval.render import Table
from wm_eval.titles import METHODS
from wm_inject import ATTACKS

ROOT = release.ROOT
PAGES = sorted(DOCS.rglob("*.md"))
NAV = re.compile(r"^ +- (?:.+: )?(\S+\.md)$", re.MULTILINE)


@pytest.fixture(scope="module")
def rendered() -> dict[Path, str]:
    return dict(render_pages(RESULTS))


@pytest.mark.integration
def test_pages_say_what_code_and_records_say(rendered: dict[Path, str]) -> None:
    stale = [
        str(name)
        for name, tail in rendered.items()
        if (page := (DOCS / name).read_text(encoding="utf-8")) != with_tail(page, tail)
    ]
    assert stale == [], "run python tools/render_pages.py"


def test_every_attack_and_every_method_has_a_page(rendered: dict[Path, str]) -> None:
    assert set(ATTACK_PAGES) == set(ATTACKS)
    shown = {name for names, _ in METHOD_PAGES.values() for name in names}
    assert shown == {name for name in METHODS if not name.endswith("-lpips")}
    for name, tail in rendered.items():
        head = (DOCS / name).read_text(encoding="utf-8").partition(MARK)[0]
        for part in ("```text\n", "- **Source**: ", "- **Code**: ", "- **Needs**: ", "## Pitfalls"):
            assert part in head, f"{name} lacks {part!r}"
        assert "| --- |" in tail


def test_figures_stand_below_the_marker_only() -> None:
    for name in ATTACK_PAGES:
        head = (DOCS / "attacks" / f"{name}.md").read_text(encoding="utf-8").partition(MARK)[0]
        assert not re.search(r"\d\.\d ?%|\d dB", head.replace("34.3 dB", "")), name


def test_a_page_without_its_marker_is_refused() -> None:
    with pytest.raises(ValueError, match="one line"):
        with_tail("# Title\n", "tail")


def test_picked_rows_keep_a_column_that_tells_them_apart() -> None:
    table = Table("t", "T", ("who", "what"), (("a", "1"), ("b", "2"), ("c", "3")))
    (one,) = pick([table], "who", {"a"})
    assert one.headers == ("what",) and one.rows == (("1",),)
    (two,) = pick([table], "who", {"a", "b"})
    assert two.rows == (("a", "1"), ("b", "2"))
    assert pick([table], "who", {"z"}) == [] and pick([table], "else", {"a"}) == []


def test_tables_that_differ_in_rows_alone_are_one_table() -> None:
    first, other = Table("a", "T", ("x",), (("1",),), "n"), Table("c", "T", ("y",), (("3",),), "n")
    (one, two) = joined([first, other, Table("b", "T", ("x",), (("2",),), "n")])
    assert one.rows == (("1",), ("2",)) and two == other


def test_a_paragraph_stands_once_on_a_page() -> None:
    notes = ["over 9\n\nwhat it is", "over 5\n\nwhat it is", "over 5\n\nwhat it is", ""]
    tables = without_repeats(Table("t", "T", ("x",), (), note) for note in notes)
    assert [table.note for table in tables] == [notes[0], "over 5", "", ""]


def test_a_table_of_settings_shows_presets_or_defaults() -> None:
    table = settings_table(ATTACK_PAGES["badnets"][0])
    assert ("`image_size`", "required") in table.rows and ("`margin`", "`0`") in table.rows
    assert settings_table(ATTACK_PAGES["lf"][1]).headers == ("setting", "tiny", "small", "paper")


def defined_in(path: Path) -> set[str]:
    kinds = (ast.FunctionDef, ast.ClassDef)
    return {n.name for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, kinds)}


def source(name: str) -> Path | None:
    found = list(ROOT.glob(f"packages/*/src/{name}"))
    return found[0] if found else None


def walks() -> list[list[str]]:
    """The steps of every walk in docs/walk.md, each from its number on."""
    parts = re.split(r"^## ", (DOCS / "walk.md").read_text(), flags=re.MULTILINE)[1:]
    return [re.split(r"^#### ", part, flags=re.MULTILINE)[1:] for part in parts]


def test_a_walk_names_what_is_there_and_visits_each_file_once(subtests: pytest.Subtests) -> None:
    for steps in walks():
        files = [re.match(r"\d+\. `([a-z_0-9/]+\.py)`\n", step) for step in steps]
        names = [match[1] for match in files if match]
        assert len(names) == len(steps) >= 10 and len(set(names)) == len(names)
        for name, step in zip(names, steps, strict=True):
            with subtests.test(file=name):
                path = source(name)
                assert path, f"{name} is gone"
                assert set(re.findall(r"`(\w+)\(\)`", step)) - defined_in(path) == set()


def test_a_walk_looks_back_only() -> None:
    for steps in walks():
        for number, step in enumerate(steps, start=1):
            assert step.startswith(f"{number}. ")
            body = step.partition("\n### ")[0]
            named = re.findall(r"steps? (\d+)(?: to (\d+))?", body)
            assert all(int(one) < number for pair in named for one in pair if one), step


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_a_page_names_files_and_imports_that_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"`((?:wm|defense)_[a-z]+/[a-z_0-9/]+\.(?:py|json))`", text)
    assert [name for name in named if source(name) is None] == []
    for block in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module:
                module = importlib.import_module(node.module)
                for alias in node.names:
                    known = hasattr(module, alias.name)
                    assert known or source(f"{node.module.replace('.', '/')}/{alias.name}.py")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    uri = page.relative_to(DOCS).as_posix()
    site_links(page.read_text(encoding="utf-8"), uri, lambda name: True)


def test_every_page_is_in_the_menu() -> None:
    menu = NAV.findall((ROOT / "mkdocs.yml").read_text())
    pages = {page.relative_to(DOCS).as_posix() for page in PAGES}
    assert set(menu) == pages | set(OUTSIDE) and len(menu) == len(set(menu))


def test_links_are_led_to_the_site_or_dropped() -> None:
    def led(text: str, uri: str) -> str:
        pages = {"results/README.md", "architecture.md", "README.md"}
        return site_links(text, uri, pages.__contains__)

    assert led("[r](../results/README.md#a)", "architecture.md") == "[r](results/README.md#a)"
    assert led("[h](docs/architecture.md)", "README.md") == "[h](architecture.md)"
    assert led("[p](packages) and [s](docs/responsible-use.md)", "README.md") == "p and s"
    assert led("[x](#here) [y](https://example.org)", "README.md").count("](") == 2
    assert led("```\n[p](packages)\n```\n", "README.md") == "```\n[p](packages)\n```\n"
    with pytest.raises(ValueError, match="which is not there"):
        led("[x](gone.md)", "architecture.md")


@pytest.mark.integration
def test_the_site_builds_strictly_and_fetches_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("mkdocs", reason="the site's generator is not installed")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    with caplog.at_level(logging.WARNING):
        build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path), strict=True))
    assert (tmp_path / "walk.html").is_file()
    for package in release.packages():
        text = (tmp_path / "api" / f"{package.name}.html").read_text(encoding="utf-8")
        told = set(re.findall(r'<h3 id="([\w.]+)"', text))
        module = importlib.import_module(package.module)
        for name in module.__all__:
            value = getattr(module, name)
            home = getattr(value, "__module__", "")
            if callable(value) and home.startswith(f"{package.module}."):
                assert told & {f"{package.module}.{name}", f"{home}.{name}"}, f"{name} is untold"
    outside = re.compile(r"""<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=["']?(https?:|//)""")
    for page in tmp_path.rglob("*.html"):
        found = outside.search(page.read_text(encoding="utf-8"))
        assert found is None, f"{page.name} fetches {found}"
