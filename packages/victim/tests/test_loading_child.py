"""What the sandboxed child does, called here: which weights come out, and why none do."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from wm_victim.loading.worker import convert_state, main

WEIGHTS = {"fc.weight": torch.arange(6.0).reshape(2, 3), "fc.bias": torch.tensor([1.0, -1.0])}


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def convert(folder: Path, content: Any, most: int = 100) -> dict[str, Any]:
    return convert_state(saved(folder / "m.pt", content), folder, {"max_tensors": most})


def same(folder: Path) -> bool:
    found = load_file(folder / "weights.safetensors")
    return set(found) == set(WEIGHTS) and all(torch.equal(found[k], WEIGHTS[k]) for k in WEIGHTS)


def test_the_tensors_come_out_as_they_are(tmp_path: Path) -> None:
    assert convert(tmp_path, WEIGHTS) == {"notes": []}
    assert same(tmp_path)


def test_weights_are_found_where_training_scripts_keep_them(tmp_path: Path) -> None:
    told = convert(tmp_path, {"epoch": 3, "model": {"state_dict": WEIGHTS}})
    assert same(tmp_path)
    assert [note.split("'")[1] for note in told["notes"]] == ["model", "state_dict"]


def test_views_become_tensors_of_their_own(tmp_path: Path) -> None:
    shared = torch.arange(6.0)
    convert(tmp_path, {"a": shared.reshape(2, 3).t(), "b": shared[:2]})
    found = load_file(tmp_path / "weights.safetensors")
    assert torch.equal(found["a"], shared.reshape(2, 3).t()) and torch.equal(found["b"], shared[:2])


@pytest.mark.filterwarnings("ignore:Validating sparse:UserWarning")  # as the child does
def test_what_is_no_plain_tensor_is_left_out_and_told(tmp_path: Path) -> None:
    odd = {"step": 7, "wave": torch.ones(2, dtype=torch.complex64), "few": torch.eye(2).to_sparse()}
    (note,) = convert(tmp_path, {**WEIGHTS, **odd})["notes"]
    assert same(tmp_path)
    assert all(name in note for name in odd)


def test_what_holds_no_weights_is_refused(tmp_path: Path, subtests: pytest.Subtests) -> None:
    for content, told in [
        ([1, 2], "expected a dictionary of tensors, got list"),
        ({"a": 1}, "found no tensor in it"),
        ({1: torch.ones(1)}, "expected tensors by name, got another key"),
        ({f"t{n}": torch.ones(1) for n in range(101)}, "101 tensors, more than 100"),
        ({"a": torch.ones(1).expand(3_000_000)}, "tensors that are larger than the file"),
        (nn.Linear(2, 2), "torch refuses its pickle"),
    ]:
        with subtests.test(content=content, told=told), pytest.raises(ValueError, match=told):
            convert(tmp_path, content)


def job(folder: Path, name: str, **options: Any) -> dict[str, Any]:
    settings = {"job": name, "input": str(folder), "name": "m.pt", "scratch": str(folder)}
    main(json.dumps({**settings, "options": options, "restrictions": ["none"]}))
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return found


def test_the_child_reports_in_plain_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "m.pt", WEIGHTS)
    assert job(tmp_path, "state", max_tensors=9) == {"notes": [], "restrictions": ["none"]}
    saved(tmp_path / "m.pt", [1])
    told = job(tmp_path, "state", max_tensors=9)["refused"]
    assert told == "expected a dictionary of tensors, got list"
    (tmp_path / "m.pt").write_bytes(b"no archive")
    assert "\n" not in job(tmp_path, "state", max_tensors=9)["refused"]
    assert "\n" not in job(tmp_path, "onnx")["refused"]
    assert "\n" not in job(tmp_path, "script")["refused"]
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")):

        def refuse(*_: Any, error: BaseException = error) -> Any:
            raise error

        monkeypatch.setattr("wm_victim.loading.worker.convert_state", refuse)
        assert job(tmp_path, "state")["refused"] == "it asks for more memory than allowed"
