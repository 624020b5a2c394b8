"""The static checks meet damage with their own error and no other: nothing else is caught above."""

import random
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from wm_victim.loading import Limits, LoadingError
from wm_victim.loading.archives import (
    ALLOWED_GLOBALS,
    check_contents,
    check_pickle,
    foreign_globals,
    legacy_pickles,
    list_archive,
)
from wm_victim.loading.file_formats import archive_format, file_format
from wm_victim.loading.onnx_operators import SUPPORTED
from wm_victim.loading.onnx_scan import scan_onnx
from wm_victim.loading.pickled_objects import without_objects
from wm_victim.loading.safetensors_header import read_header

from .hostile_models import function, graph

_MUTANTS = 150


def mutants(data: bytes) -> list[bytes]:
    """Copies with a few bytes changed, cut out or doubled."""
    generator = random.Random(0)
    found = []
    for _ in range(_MUTANTS):
        changed = bytearray(data)
        for _ in range(generator.randint(1, 3)):
            at = generator.randrange(len(changed))
            what = generator.randrange(3)
            if what == 0:
                changed[at] = generator.randrange(256)
            elif what == 1:
                del changed[at : at + generator.randint(1, 40)]
            else:
                changed[at:at] = changed[at : at + generator.randint(1, 40)]
        found.append(bytes(changed) or b"\0")
    return found


def outcomes(
    check: Callable[[bytes], object], data: bytes, error: type[Exception]
) -> tuple[int, int]:
    """How many mutants pass and how many are refused; anything but ``error`` comes through."""
    check(data)
    refused = 0
    for mutant in mutants(data):
        try:
            check(mutant)
        except error:
            refused += 1
    return _MUTANTS - refused, refused


def test_a_damaged_graph_is_refused_in_one_way() -> None:
    data = graph(functions=[function("F", ["Relu"])], domains=("own",)).SerializeToString()
    _, refused = outcomes(lambda one: scan_onnx(one, Limits()), data, LoadingError)
    assert refused > 0


def test_a_damaged_header_is_refused_in_one_way() -> None:
    data = save({"a": torch.ones(3, 4), "b": torch.zeros(2, dtype=torch.int64)})
    _, refused = outcomes(lambda one: read_header(one, max_tensors=10), data, LoadingError)
    assert refused > 0


def test_a_damaged_pickle_or_archive_is_refused_in_one_way(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"a": torch.ones(3), "b": torch.nn.Parameter(torch.ones(2))}, path)
    with zipfile.ZipFile(path) as archive:
        pickled = archive.read("a/data.pkl")
    _, refused = outcomes(check_pickle, pickled, LoadingError)
    assert refused > 0

    def check(data: bytes) -> None:
        path.write_bytes(data)
        list_archive(path, max_entries=100, max_bytes=2**20)
        check_contents(path)

    _, refused = outcomes(check, path.read_bytes(), LoadingError)
    assert refused > 0


def test_a_damaged_file_of_the_older_form_is_refused_in_one_way(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    content = {"a": torch.ones(3), "b": Path("c"), "d": slice(2)}
    torch.save(content, path, _use_new_zipfile_serialization=False)

    def check(data: bytes) -> None:
        path.write_bytes(data)
        start, stop = legacy_pickles(path)[3]
        foreign_globals(data[start:stop])
        check_pickle(without_objects(data[start:stop], ALLOWED_GLOBALS))

    _, refused = outcomes(check, path.read_bytes(), LoadingError)
    assert refused > 0


def test_what_torch_saves_needs_no_other_global(tmp_path: Path) -> None:
    kinds = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool)
    for number, kind in enumerate(kinds):
        path = tmp_path / f"{number}.pt"
        torch.save({"a": torch.zeros(3, dtype=kind)}, path)
        with zipfile.ZipFile(path) as archive:
            check_pickle(archive.read(f"{number}/data.pkl"))
    assert not [name for name in ALLOWED_GLOBALS if name.startswith(("os ", "builtins "))]


def test_operators_that_act_or_branch_are_not_imported(subtests: pytest.Subtests) -> None:
    for name in ["Save", "Load", "Hub", "If", "Loop", "Scan", "NonZero", "Compress"]:
        with subtests.test(name=name):
            assert name not in SUPPORTED


def test_the_content_decides_what_a_file_is() -> None:
    assert file_format(b"PK\x03\x04" + bytes(60)) == "zip"
    assert file_format(b"\x10\0\0\0\0\0\0\0{" + b" " * 60) == "safetensors"
    assert file_format(b"\x08\x09\x3a" + bytes(60)) == "onnx"
    with pytest.raises(LoadingError, match="HDF5"):
        file_format(b"\x89HDF\r\n\x1a\n" + bytes(60))
    assert file_format(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." + bytes(9)) == "legacy"
    assert archive_format(["a/data.pkl", "a/constants.pkl"]) == "torchscript"
    assert archive_format(["a/data.pkl", "a/version"]) == "state"
    with pytest.raises(LoadingError, match="NumPy"):
        archive_format(["x.npy"])
    with pytest.raises(LoadingError, match=r"'runs/best\.pth': unpack it"):
        archive_format(["runs/", "runs/best.pth", "__MACOSX/._best.pth"])
