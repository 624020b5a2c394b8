"""Records: where numbers live. Tables and reports are rendered from them, never typed.

A record is a JSON file of what was measured, with which settings, seed, data and versions. It is
canonical (sorted keys, floats to nine significant digits, a newline at the end), so that a run that
was resumed leaves the same bytes. Wall time and hardware, which differ from run to run, stand in a
sibling ``NAME.env.json``.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from wm_inject.core.files import atomic_path

PACKAGES = ("wm-inject", "wm-extract", "wm-victim", "defense-nc", "defense-reverse", "wm-eval")
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")


def versions() -> dict[str, str]:
    """The versions a number depends on: Python, torch, numpy and the six packages."""
    found = {"python": platform.python_version()}
    found |= {name: metadata.version(name) for name in ("torch", "numpy")}
    for name in PACKAGES:  # from their source, which need not be installed
        found[name] = import_module(f"{name.replace('-', '_')}.__about__").__version__
    return found


@dataclass(frozen=True)
class Record:
    """One measured thing.

    Args:
        what: What was measured, a short lower-case name such as "victim-clean".
        config: Every setting that the values depend on, JSON-ready.
        seed: The seed of the run.
        data: The fingerprint of the data set.
        values: The figures, JSON-ready. None says "absent".
        versions: Filled in by itself.

    Raises:
        ValueError: A name that is no file name, a negative seed, or content that JSON cannot hold
            (NaN and infinity included).
    """

    what: str
    config: Mapping[str, Any]
    seed: int
    data: str
    values: Mapping[str, Any]
    versions: Mapping[str, str] = field(default_factory=versions)

    def __post_init__(self) -> None:
        if not isinstance(self.what, str) or not _NAME.fullmatch(self.what):
            raise ValueError(f"expected a lower-case record name, got {self.what!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"expected a seed >= 0, got {self.seed!r}")
        canonical_json(asdict(self))

    @property
    def key(self) -> str:
        """What identifies the measurement before it is made: everything but the values."""
        return record_key(self.what, self.config, self.seed, self.data, self.versions)


def record_key(
    what: str, config: Mapping[str, Any], seed: int, data: str, versions: Mapping[str, str]
) -> str:
    """Sixteen hex digits over everything that decides a record's values.

    Raises:
        ValueError: Content that JSON cannot hold.
    """
    whole = {"what": what, "config": config, "seed": seed, "data": data, "versions": versions}
    return hashlib.sha256(canonical_json(whole).encode()).hexdigest()[:16]


def canonical_json(value: Any) -> str:
    """The one text of a JSON value: sorted keys, two spaces, nine digits, a newline at the end.

    Raises:
        ValueError: Something in it is not JSON, is NaN or infinite, or has a key that is no text.
    """
    return json.dumps(_plain(value, "record"), sort_keys=True, indent=2, ensure_ascii=False) + "\n"


def write_record(
    path: str | Path, record: Record, *, environment: Mapping[str, Any] | None = None
) -> None:
    """Write a record, and what it ran on beside it, each atomically; the record comes last.

    Args:
        path: ``NAME.json``.
        record: What to write.
        environment: Wall time, hardware and the like, for ``NAME.env.json``; not written if None.

    Raises:
        ValueError: A path that does not end in ``.json``, or ends in ``.env.json``.
    """
    path = Path(path)
    if path.suffix != ".json" or path.name.endswith(".env.json"):
        raise ValueError(f"expected a path NAME.json for a record, got {path.name}")
    if environment is not None:
        write_text(path.with_suffix(".env.json"), canonical_json(environment))
    write_text(path, canonical_json(asdict(record)))


def read_record(path: str | Path) -> Record:
    """Read one record.

    Raises:
        ValueError: No such file, not JSON, or not the fields of a record.
    """
    path = Path(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"expected a record at {path}, found none") from error
    except ValueError as error:
        raise ValueError(f"{path.name} is not a record: {error}") from error
    names = {f.name for f in fields(Record)}
    if not isinstance(found, dict) or set(found) != names:
        got = ", ".join(sorted(found)) if isinstance(found, dict) else type(found).__name__
        raise ValueError(
            f"{path.name} is not a record: expected {', '.join(sorted(names))}; got {got}"
        )
    return Record(**found)


def read_records(folder: str | Path) -> dict[str, Record]:
    """Read every record of a folder, by name, in the order of the names.

    Raises:
        ValueError: No such folder, no record in it, or a file in it that is none.
    """
    folder = Path(folder)
    # What begins with a dot was being written when a run was killed.
    paths = sorted(p for p in folder.glob("[!.]*.json") if not p.name.endswith(".env.json"))
    if not paths:
        raise ValueError(f"expected records (*.json) in {folder}, found none")
    return {path.stem: read_record(path) for path in paths}


def hardware(device: str = "cpu") -> dict[str, Any]:
    """What this machine is, for ``NAME.env.json``.

    Raises:
        ValueError: A device that is neither "cpu" nor a cuda device.
    """
    import torch

    if device != "cpu" and not re.fullmatch(r"cuda(:\d+)?", str(device)):
        raise ValueError(f"expected device cpu or cuda, got {device!r}")
    found: dict[str, Any] = {
        "device": str(device),
        "machine": platform.machine(),
        "system": platform.system(),
        "cpu": _cpu_name(),
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
    }
    if str(device) != "cpu" and torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def write_text(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old one or the new one, never half of it."""
    with atomic_path(path) as part:
        part.write_text(text, encoding="utf-8", newline="\n")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _plain(value: Any, where: str) -> Any:
    """The value as JSON knows it, floats rounded to nine significant digits."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"expected finite numbers in a record, got {value} at {where}")
        return float(f"{value:.9g}")
    if isinstance(value, Mapping):
        for name in value:
            if not isinstance(name, str):
                raise ValueError(f"expected names as keys in a record, got {name!r} at {where}")
        return {name: _plain(item, f"{where}.{name}") for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    raise ValueError(f"expected JSON values in a record, got {type(value).__name__} at {where}")
