"""Records of what was measured: one JSON line each, in ``records.jsonl`` of a study's folder.

A line is canonical (sorted keys, floats to nine significant digits), so that a run that was resumed
leaves the same bytes. What differs from run to run, wall time and hardware, is in
``environments.jsonl``; why a stage could not be done is in ``failures.jsonl``.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from wm_inject.core.files import disk_errors, write_text

PACKAGES = ("wm-inject", "wm-extract", "wm-victim", "defense-nc", "defense-reverse", "wm-eval")
RECORDS, ENVIRONMENTS, FAILURES = "records.jsonl", "environments.jsonl", "failures.jsonl"
Key = Mapping[str, str | int | float | bool]
_KIND = re.compile(r"[a-z][a-z0-9-]*")
_NAME = re.compile(r"[a-z][a-z0-9_]*")
_VALUE = re.compile(r"\S+")


def versions() -> dict[str, str]:
    """The versions that a number depends on: Python, torch, numpy and the six packages."""
    numbers = {"python": platform.python_version()}
    numbers |= {name: metadata.version(name) for name in ("torch", "numpy")}
    for name in PACKAGES:  # from their source, which need not be installed
        numbers[name] = import_module(f"{name.replace('-', '_')}.__about__").__version__
    return numbers


def stage_id(kind: str, key: Key) -> str:
    """The kind and the sorted key as one line, for messages and as an index.

    Examples:
        >>> stage_id("victim", {"seed": 0, "attack": "wanet"})
        'victim attack=wanet seed=0'
    """
    return " ".join([kind, *(f"{name}={_shown(key[name])}" for name in sorted(key))])


@dataclass(frozen=True)
class Record:
    """One measured thing.

    Args:
        kind: What was done, such as "victim" or "scan".
        key: What tells it from its siblings: attack, seed, detector ...
        settings: Everything that the values depend on, beside data and inputs.
        inputs: The digests of the records whose results it uses, by id.
        data: The fingerprint of the data set.
        values: The figures; None says "absent". ``files`` holds the digests of written files.
        versions: Filled in.

    Raises:
        ValueError: A bad kind or key.
    """

    kind: str
    key: Key
    settings: Mapping[str, Any]
    inputs: Mapping[str, str]
    data: str
    values: Mapping[str, Any]
    versions: Mapping[str, str] = field(default_factory=versions)

    def __post_init__(self) -> None:
        check_key(self.kind, self.key)

    @property
    def id(self) -> str:
        """Kind and key as text."""
        return stage_id(self.kind, self.key)

    @property
    def line(self) -> str:
        """The record as it is stored, with the newline.

        Raises:
            ValueError: Content that JSON cannot hold (NaN and infinity included).
        """
        return canonical_json(asdict(self)) + "\n"

    @property
    def digest(self) -> str:
        """SHA-256 of the line: what the records that build on this one name."""
        return hashlib.sha256(self.line.encode()).hexdigest()

    def has(self, kind: str | None = None, **key: Any) -> bool:
        """Whether it is of this kind and has these values in its key."""
        same = all(self.key.get(name) == value for name, value in key.items())
        return same and kind in (None, self.kind)


@dataclass(frozen=True)
class Failure:
    """Why a stage could not be done."""

    kind: str
    key: Key
    reason: str

    @property
    def id(self) -> str:
        """Kind and key as text."""
        return stage_id(self.kind, self.key)


@dataclass(frozen=True)
class StudyRecords:
    """What a study's folder holds."""

    records: tuple[Record, ...]
    failures: tuple[Failure, ...] = ()

    def select(self, kind: str | None = None, **key: Any) -> list[Record]:
        """The records of a kind with these values in their keys, in the order of their ids."""
        return [record for record in self.records if record.has(kind, **key)]

    def one(self, kind: str, **key: Any) -> Record | None:
        """The only such record; None if there is none.

        Raises:
            ValueError: There are several.
        """
        records = self.select(kind, **key)
        if len(records) > 1:
            raise ValueError(f"expected one {stage_id(kind, key)}, got {len(records)}")
        return records[0] if records else None


def check_key(kind: str, key: Key) -> None:
    """Refuse a kind or key that an id could not be made of.

    Raises:
        ValueError: Another form than lower-case names with strings, numbers and truth values.
    """
    if not isinstance(kind, str) or not _KIND.fullmatch(kind):
        raise ValueError(f"expected a lower-case kind of stage, got {kind!r}")
    for name, value in key.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(f"expected lower-case names in the key of {kind}, got {name!r}")
        if (
            not isinstance(value, str | int | float)
            or not str(value)
            or re.search(r"\s", str(value))
        ):
            raise ValueError(f"expected {name} without spaces in the key of {kind}, got {value!r}")


def canonical_json(value: Any, *, indent: int | None = None) -> str:
    """The one text of a JSON value: sorted keys, nine digits.

    Raises:
        ValueError: Something in it is not JSON, is NaN or infinite, or has a key that is no text.
    """
    separators = (",", ":") if indent is None else None
    return json.dumps(
        _plain(value, "record"),
        sort_keys=True,
        indent=indent,
        separators=separators,
        ensure_ascii=False,
    )


def read_study(folder: str | Path) -> StudyRecords:
    """Everything that a study's folder holds, in the order of the ids.

    Raises:
        ValueError: No records there, or a line that is none.
    """
    folder = Path(folder)
    if not (folder / RECORDS).is_file():
        raise ValueError(f"expected {RECORDS} in {folder}, found none")
    records, failures = read_records(folder), read_failures(folder)
    return StudyRecords(
        tuple(records[name] for name in sorted(records)),
        tuple(failures[name] for name in sorted(failures)),
    )


def read_records(folder: str | Path) -> dict[str, Record]:
    """The records of a folder by id, the last line of an id; none if there is no file.

    Raises:
        ValueError: A line, other than a last one that was cut off, that is no record.
    """
    names = {f.name for f in fields(Record)}
    records = {}
    for number, line in _lines(Path(folder) / RECORDS):
        if set(line) != names:
            raise ValueError(
                f"line {number} of {RECORDS} is not a record: expected {', '.join(sorted(names))}; "
                f"got {', '.join(sorted(line))}"
            )
        record = Record(**line)
        records[record.id] = record
    return records


def read_failures(folder: str | Path) -> dict[str, Failure]:
    """The failures of a folder by id.

    Raises:
        ValueError: A line that is none.
    """
    failures = [Failure(**line) for _, line in _lines(Path(folder) / FAILURES)]
    return {failure.id: failure for failure in failures}


def read_environments(folder: str | Path) -> dict[str, dict[str, Any]]:
    """By id of a record: the seconds that it took, and the machine that it was made on.

    Raises:
        ValueError: A line that is none.
    """
    machines: dict[str, dict[str, Any]] = {}
    runs: dict[str, dict[str, Any]] = {}
    for _, line in _lines(Path(folder) / ENVIRONMENTS):
        if "id" in line:
            runs[line["id"]] = line
        else:
            machines[line.pop("environment")] = line
    return {
        name: {"seconds": run["seconds"], **machines[run["environment"]]}
        for name, run in runs.items()
    }


def add_record(
    folder: Path, record: Record, environment: Mapping[str, Any], seconds: float
) -> None:
    """Append a record to a folder, with what it ran on; safe against kill -9 and other writers."""
    name = environment_id(environment)
    run = {"id": record.id, "environment": name, "seconds": seconds}
    with _locked(folder):
        known = {line.get("environment") for _, line in _lines(folder / ENVIRONMENTS)}
        if name not in known:
            _append(folder / ENVIRONMENTS, canonical_json({**environment, "environment": name}))
        _append(folder / ENVIRONMENTS, canonical_json(run))
        _append(folder / RECORDS, record.line.rstrip("\n"))


def compact(folder: Path) -> None:
    """Bring the lines of a folder in the order of their ids, the last of each id alone."""
    with _locked(folder):
        records = read_records(folder)
        if records:
            write_text(folder / RECORDS, "".join(records[name].line for name in sorted(records)))
        lines = [line for _, line in _lines(folder / ENVIRONMENTS)]
        runs = {line["id"]: line for line in lines if line.get("id") in records}
        used = {run["environment"] for run in runs.values()}
        machines = {
            x["environment"]: x for x in lines if "id" not in x and x["environment"] in used
        }
        kept = [machines[name] for name in sorted(used)] + [runs[name] for name in sorted(runs)]
        if kept:
            text = "".join(canonical_json(line) + "\n" for line in kept)
            write_text(folder / ENVIRONMENTS, text)


def write_failures(folder: Path, failures: Mapping[str, Failure]) -> None:
    """Write why stages failed; no file where none did."""
    path = folder / FAILURES
    if not failures:
        path.unlink(missing_ok=True)
        return
    write_text(path, "".join(canonical_json(asdict(failures[n])) + "\n" for n in sorted(failures)))


def environment_id(environment: Mapping[str, Any]) -> str:
    """Eight hex digits that name a machine."""
    return hashlib.sha256(canonical_json(environment).encode()).hexdigest()[:8]


def hardware(device: str = "cpu") -> dict[str, Any]:
    """What this machine is, for ``environments.jsonl``.

    Raises:
        ValueError: A device that is neither "cpu" nor a cuda device.
    """
    import torch

    if device != "cpu" and not re.fullmatch(r"cuda(:\d+)?", str(device)):
        raise ValueError(f"expected device cpu or cuda, got {device!r}")
    facts: dict[str, Any] = {
        "device": str(device),
        "machine": platform.machine(),
        "system": platform.system(),
        "cpu": _cpu_name(),
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
    }
    if str(device) != "cpu" and torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One writer at a time, over all processes."""
    import fcntl

    with disk_errors(folder / RECORDS):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _append(path: Path, line: str) -> None:
    """Add a line that is on the disk when this returns; drop what a killed writer left half."""
    with disk_errors(path), path.open("ab+") as file:
        text = _whole(path.read_bytes())
        file.truncate(len(text))
        file.write(line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _whole(text: bytes) -> bytes:
    return text[: text.rfind(b"\n") + 1]


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The JSON objects of a file with the numbers of their lines; a half last line is left out."""
    text = _whole(path.read_bytes()) if path.is_file() else b""
    for number, line in enumerate(text.decode().split("\n")[:-1], start=1):
        try:
            value = json.loads(line)
        except ValueError as error:
            raise ValueError(f"line {number} of {path.name} is not JSON: {error}") from error
        if not isinstance(value, dict):
            raise ValueError(f"expected an object on line {number} of {path.name}, got {line[:40]}")
        yield number, value


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


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
