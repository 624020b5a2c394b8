"""Where a study keeps what it has done: one record a stage, and whether a stage may be skipped.

A stage is done when its record is there, was made with the same settings, seed, data, versions and
inputs, and every file it names still has the bytes it had. Each stage reads the files of the ones
before it, never their memory, so a run that was killed and one that was not take the same road.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from wm_eval.records import Record, hardware, read_record, record_key, versions, write_record


class Made(NamedTuple):
    """What a stage has made: its figures, and the files it wrote, relative to the study."""

    values: Mapping[str, Any]
    files: Sequence[str] = ()


@dataclass(frozen=True)
class Workspace:
    """A study's folder.

    Args:
        folder: Where records, models and pictures go.
        seed: The study's seed.
        data: The fingerprint of its data.
        device: Where it computes, "cpu" or a cuda device.
        say: Called with one line when a stage starts or is skipped.
    """

    folder: Path
    seed: int
    data: str
    device: str
    say: Callable[[str], None]

    def path(self, *parts: str) -> Path:
        """A path inside the study; its folder is made."""
        path = self.folder.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def record(self, name: str) -> Record:
        """The record of a stage that is done.

        Raises:
            ValueError: It is not.
        """
        return read_record(self.path("records", f"{name}.json"))

    def stage(
        self,
        name: str,
        settings: Mapping[str, Any],
        inputs: Sequence[str],
        work: Callable[[Path], Made],
    ) -> Record:
        """Do a stage, or give its record if it is done.

        Args:
            name: Of the stage and its record.
            settings: Everything its values depend on beside seed, data and inputs.
            inputs: Stages whose results it uses.
            work: Does it; gets a path for a checkpoint, which is removed at the end.
        """
        path = self.path("records", f"{name}.json")
        # The content of the inputs, not their settings: what was trained anew is measured anew.
        digests = {i: _digest(self.path("records", f"{i}.json")) for i in inputs}
        config = {"settings": settings, "inputs": digests}
        key = record_key(name, config, self.seed, self.data, versions())
        done = self._done(path, key)
        checkpoint = self.path("work", f"{name}-{key}.safetensors")
        if done is not None:
            checkpoint.unlink(missing_ok=True)  # of a run that was killed a moment too early
            self.say(f"{name}: done before")
            return done
        self.say(f"{name}: started")
        start = time.perf_counter()
        made = work(checkpoint)
        seconds = time.perf_counter() - start
        files = {file: _digest(self.folder / file) for file in made.files}
        record = Record(name, config, self.seed, self.data, {**made.values, "files": files})
        write_record(path, record, environment={"seconds": seconds, **hardware(self.device)})
        checkpoint.unlink(missing_ok=True)
        # Give back what a fresh and a resumed run both read: the record as it is stored.
        return read_record(path)

    def _done(self, path: Path, key: str) -> Record | None:
        if not path.is_file():
            return None
        try:
            record = read_record(path)
            same = record.key == key and all(
                _digest(self.folder / file) == digest
                for file, digest in record.values["files"].items()
            )
        except (ValueError, KeyError, OSError):
            return None  # half a record, or a file that is gone: do it again
        return record if same else None


def file_digest(path: str | Path | None) -> str | None:
    """SHA-256 of a file's bytes; None where no file is meant.

    Raises:
        ValueError: No such file.
    """
    if path is None:
        return None
    if not Path(path).is_file():
        raise ValueError(f"expected a file at {path}, found none")
    return _digest(Path(path))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
