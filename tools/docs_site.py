"""What the documentation's generator is told beside mkdocs.yml: pages that lie outside docs/.

README, CONTRIBUTING, SECURITY and the pages of results stay where readers of the repository look
for them; the site has them too. Links are written for the repository. One that leads to a page of
the site is kept; of one that leads to a file that the site has not, only the text stays.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"
OUTSIDE = (
    "README.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    *(path.relative_to(ROOT).as_posix() for path in sorted(RESULTS.glob("*.md"))),
    "results/tiny/README.md",
)
FIGURES = tuple(path.relative_to(ROOT).as_posix() for path in sorted(RESULTS.glob("*/figures/*")))
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages and pictures that lie outside docs/. Called by MkDocs."""
    from mkdocs.structure.files import File

    for name in (*OUTSIDE, *FIGURES):
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Lead links to where their pages are on the site. Called by MkDocs."""
    uri = page.file.src_uri
    return site_links(markdown, uri, lambda name: files.get_file_from_path(name) is not None)


def repository_path(uri: str) -> str:
    """Where a page of the site lies in the repository."""
    return uri if uri in OUTSIDE else f"docs/{uri}"


def site_path(path: str) -> str:
    """Where a file of the repository would lie on the site."""
    return path.removeprefix("docs/")


def site_links(text: str, uri: str, has: Callable[[str], bool]) -> str:
    """A page's text with links that hold on the site.

    Args:
        text: Markdown, with links as they hold in the repository.
        uri: The page's place on the site.
        has: Whether the site has a file of this name.

    Raises:
        ValueError: A link to a file that the repository has not.
    """
    here = PurePosixPath(repository_path(uri)).parent

    def lead(found: re.Match[str]) -> str:
        picture, label, target = found.groups()
        place, mark, anchor = target.partition("#")
        if not place or re.match(r"[a-z]+:", target):
            return found[0]
        path = os.path.normpath(here / place)
        if not (ROOT / path).exists():
            raise ValueError(f"{repository_path(uri)} links to {target}, which is not there")
        goal = site_path(path)
        if not has(goal):
            return label
        there = os.path.relpath(goal, PurePosixPath(uri).parent)
        return f"{picture}[{label}]({there}{mark}{anchor})"

    return _outside_code(text, lambda part: _LINK.sub(lead, part))


def _outside_code(text: str, change: Callable[[str], str]) -> str:
    """Change what is no code block."""
    parts = re.split(r"(^```.*?^```$)", text, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if part.startswith("```") else change(part) for part in parts)
