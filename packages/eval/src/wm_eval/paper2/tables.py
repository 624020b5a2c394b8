"""Both tables of the experiment as files, rendered from records and from nothing else."""

from __future__ import annotations

from pathlib import Path

from wm_eval.attacks.render import Page, write_page
from wm_eval.paper2.summary import read_detection
from wm_eval.paper2.table1 import detection_page
from wm_eval.paper2.table2 import cleaning_page


def write_tables(out: str | Path) -> list[Path]:
    """Write ``OUT/tables/{detection,cleaning}.{md,tex,csv,html}``, as far as there are records.

    Args:
        out: The experiment's folder. The same records give the same bytes.

    Raises:
        ValueError: No records of this experiment.
    """
    return [path for page in pages(out) for path in write_page(Path(out) / "tables", page)]


def pages(out: str | Path) -> list[Page]:
    """What `write_tables` writes.

    Raises:
        ValueError: No records of this experiment.
    """
    records = read_detection(out)
    found = [detection_page([records])] if records.scans else []
    if records.cleanings:
        found.append(cleaning_page([records]))
    return found


__all__ = ["cleaning_page", "detection_page", "pages", "write_tables"]
