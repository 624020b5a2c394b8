"""Victims of an attack study, taken over into another folder."""

from __future__ import annotations

import shutil
from pathlib import Path, PurePosixPath

from wm_eval.records import read_records

_KINDS = ("trigger-", "victim-plain-")


def take_victims(source: str | Path, out: str | Path) -> list[str]:
    """Copy the victims and triggers of an attack study, where they are not there already.

    Only their records and files: whether a victim is one of the study that is to be run is for its
    record to say. The folder they come from is only read.

    Args:
        source: An attack study's folder.
        out: The folder to copy into.

    Returns:
        The names of the records copied.

    Raises:
        ValueError: No records there, no victim among them, or a file outside the folder.
    """
    source, out = Path(source), Path(out)
    found = {n: r for n, r in read_records(source / "records").items() if n.startswith(_KINDS)}
    if not any(name.startswith("victim-plain-") for name in found):
        raise ValueError(f"expected victims of an attack study in {source}, found none")
    copied = []
    for name, record in found.items():
        files = list(record.values.get("files", {}))
        for file in files:
            place = PurePosixPath(file)
            if place.is_absolute() or ".." in place.parts:
                raise ValueError(f"expected files inside the study in {name}, got {file}")
        here = out / "records" / f"{name}.json"
        if here.exists() or not all((source / file).is_file() for file in files):
            continue
        # The record comes last: without it, nothing else counts as done.
        for file in (*files, f"records/{name}.env.json", f"records/{name}.json"):
            if (source / file).is_file():
                (out / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / file, out / file)
        copied.append(name)
    return copied


__all__ = ["take_victims"]
