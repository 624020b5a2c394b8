"""Which images carry a watermark or act like a trigger? For people and for spreadsheets."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from wm_inject.core import files
from wm_inject.core.image_files import ImageFiles, LeftOut
from wm_inject.core.text import escape
from wm_inject.runtime import ScannedFile, Scanner, providers_for


def inspect_folder(
    folder: str | Path | ImageFiles,
    detectors: Sequence[Path],
    *,
    device: str = "auto",
    batch_size: int = 64,
) -> tuple[Scanner, list[ScannedFile]]:
    """Judge every image of a folder with exported detectors.

    Args:
        folder: The images, or what `find_images` found there; sub-folders are searched.
        detectors: ``.onnx`` files of ``wm-extract export`` or of a scan's ``--filter``.
        device: As for ``--device``.

    Raises:
        ValueError: No images, or files that are no detectors.
        RuntimeError: ONNX Runtime is not there, or not on that device.
    """
    scanner = Scanner(*detectors, providers=providers_for(device))
    return scanner, list(scanner.folder(folder, batch_size=batch_size))


def write_csv(path: Path, scanner: Scanner, rows: Sequence[ScannedFile]) -> None:
    """Write one row a file: whether it is flagged, every score, and why it could not be read.

    Names of files are escaped, as they may hold anything but "/".
    """
    names = list(scanner.detectors)
    header = ["file", "flagged", *(f"score_{name}" for name in names), "error"]
    cells = [
        [
            _cell(escape(row.file)),
            int(row.flagged),
            *(row.scores.get(name, "") for name in names),
            _cell(row.error or ""),
        ]
        for row in rows
    ]
    files.write_csv(path, header, cells)


def write_page(
    path: Path,
    scanner: Scanner,
    rows: Sequence[ScannedFile],
    title: str,
    left_out: Sequence[LeftOut] = (),
) -> None:
    """Write one page that needs nothing beside itself; file names in it are escaped."""
    flagged = [row for row in rows if row.flagged]
    unread = [row for row in rows if row.error is not None]
    names = list(scanner.detectors)
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    body = "\n".join(
        f"<tr><td>{html.escape(escape(row.file))}</td>"
        + "".join(f"<td>{row.scores[name]:.3g}</td>" for name in names)
        + "</tr>"
        for row in flagged
    )
    reasons = [f"{row.file}: {row.error}" for row in unread]
    reasons += [f"{file}: not looked at, {reason}" for file, reason in left_out]
    told = "".join(
        f"<li>{html.escape(name)} looks for {html.escape(one.looks_for)}, threshold "
        f"{one.threshold:.4g}, false-positive rate {one.false_positive_rate:g}</li>"
        for name, one in scanner.detectors.items()
    )
    files.write_text(
        path,
        _PAGE.format(
            title=html.escape(title),
            told=told,
            count=len(rows) - len(unread),
            flagged=len(flagged),
            rate=f"{scanner.false_positive_rate:g}",
            head=head,
            body=body,
            unread=len(unread),
            left_out=len(left_out),
            lost="\n".join(f"<li>{html.escape(escape(line))}</li>" for line in reasons),
        ),
    )


def _cell(text: str) -> str:
    """A cell that no spreadsheet takes for a formula."""
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
* {{ box-sizing: border-box; }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 0 auto;
  padding: 2rem 1.25rem; overflow-wrap: anywhere; }}
h1 {{ font-size: 1.6rem; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: left; vertical-align: top; padding: .25rem .9rem .25rem 0; min-width: 5rem; }}
th:first-child, td:first-child {{ min-width: 12rem; }}
td {{ border-bottom: 1px solid #8884; }}
</style></head><body>
<h1>{title}</h1>
<ul>{told}</ul>
<p>{flagged} of {count} images are flagged; of clean ones, a share of at most {rate} is.</p>
<div class="scroll" tabindex="0" role="region" aria-label="flagged images">
<table><thead><tr><th>file</th>{head}</tr></thead><tbody>
{body}
</tbody></table></div>
<p>{unread} images could not be read, {left_out} files or folders were not looked at.</p>
<ul>{lost}</ul>
</body></html>
"""
