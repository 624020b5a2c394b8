"""Every file of the hostile corpus is refused in one line, in time, in bounds, and never acts."""

import gc
import os
import pickle
import resource
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import pytest

from wm_inject.core.text import printable
from wm_victim.loading import LoadingError, open_model

from .hostile_models import CASES, Case

_SECONDS, _BYTES = 20, 2 * 2**30
# Of those that need a child, what every run tries; start-up makes each cost seconds.
_QUICK = {"item_set_on_a_tensor", "doubling_concats"}
_FAST = [case for case in CASES if not case.child or case.build.__name__ in _QUICK]
_SLOW = [case for case in CASES if case not in _FAST]


def _largest_child() -> int:
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024


def _cpu_seconds() -> float:
    """Of this process and its children: a busy machine does not change it."""
    return sum(os.times()[:4])


def refuse(case: Case, tmp_path: Path) -> str:
    """What is said of a case, once it is known that nothing else happened."""
    folder, marker = tmp_path / "files", tmp_path / "marker"
    folder.mkdir()
    path = case.build(folder, marker)
    assert not marker.exists(), "making the file must not act"
    before = sorted(str(one) for one in tmp_path.rglob("*"))
    largest = _largest_child()
    start = _cpu_seconds()
    with pytest.raises(LoadingError) as caught:
        open_model(path, **case.settings)
    seconds = _cpu_seconds() - start
    assert sorted(str(one) for one in tmp_path.rglob("*")) == before, "nothing may appear"
    assert seconds < _SECONDS
    # The system keeps the largest of all children of this process; other tests may have had more.
    assert _largest_child() <= max(largest, _BYTES)
    message = str(caught.value)
    assert message.isprintable(), "one line, and nothing that a terminal obeys"
    name = printable(path.name)
    assert message.startswith(f"cannot open {name}: ")
    assert len(message) > len(f"cannot open {name}: ") + 8
    return message


@pytest.mark.integration
def test_a_hostile_file_is_refused(tmp_path: Path, subtests: pytest.Subtests) -> None:
    for case in _FAST:
        folder = tmp_path / case.build.__name__
        folder.mkdir()
        with subtests.test(case=case.name):
            refuse(case, folder)


@pytest.mark.slow
@pytest.mark.parametrize("case", _SLOW, ids=lambda case: case.name)
def test_a_hostile_file_is_refused_by_the_child(case: Case, tmp_path: Path) -> None:
    refuse(case, tmp_path)


@pytest.mark.integration
@pytest.mark.parametrize(
    "name",
    [
        "system_in_an_archive",
        "exec_in_a_bare_pickle",
        "inst_of_protocol_zero",
        "getattr_chain_in_an_archive",
        "compressed_as_joblib_writes",
    ],
)
def test_the_witness_is_real(name: str, tmp_path: Path) -> None:
    """The control: handed to Python's own unpickler, five ways of running code leave the marker."""
    marker = tmp_path / "marker"
    build = next(case.build for case in CASES if case.build.__name__ == name)
    path = build(tmp_path, marker)
    data = path.read_bytes()
    if data[:2] == b"PK":
        with zipfile.ZipFile(path) as archive:
            data = archive.read("archive/data.pkl")
    elif data[:1] == b"\x78":
        data = zlib.decompress(data)
    pickle.loads(data)
    gc.collect()
    assert marker.exists()


def test_the_corpus_has_three_files_in_every_class() -> None:
    families = Counter(case.family for case in CASES)
    assert min(families.values()) >= 3, families
    assert len(CASES) >= 40
    assert len({case.name for case in CASES}) == len(CASES)
