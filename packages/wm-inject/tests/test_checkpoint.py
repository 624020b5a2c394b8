from __future__ import annotations

import json
import os
import pickle
import struct
from importlib import metadata as installed

import pytest
import torch
from safetensors.torch import save_file

from wm_inject import __version__
from wm_inject.core.checkpoint import CheckpointError, load_checkpoint, save_checkpoint


def state():
    shared = torch.arange(6.0)
    return {
        "weight": shared.view(2, 3).t(),  # not contiguous
        "same": shared,  # shares memory with weight
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.zeros(0, 3),
        "flags": torch.tensor([True, False]),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "count": torch.tensor(7),
    }


def save(path, **changes):
    settings = {"kind": "demo", "config": {"width": 4, "name": "é"}, "state": state(), **changes}
    save_checkpoint(path, **settings)
    return path


def test_round_trip(tmp_path):
    found = load_checkpoint(save(tmp_path / "a.safetensors", metadata={"seed": 3}), kind="demo")
    assert (found.kind, found.config) == ("demo", {"width": 4, "name": "é"})
    assert found.metadata["seed"] == 3
    assert {"torch", "safetensors", "wm-inject"} <= set(found.metadata["versions"])
    assert found.state.keys() == state().keys()
    for name, tensor in state().items():
        assert found.state[name].dtype == tensor.dtype
        assert torch.equal(found.state[name], tensor)


def test_same_content_same_bytes(tmp_path):
    first = save(tmp_path / "a.safetensors").read_bytes()
    assert save(tmp_path / "b.safetensors").read_bytes() == first


def test_a_checkout_that_is_not_installed_will_do(tmp_path, monkeypatch):
    found = installed.version

    def version(name):
        if name == "wm-inject":
            raise installed.PackageNotFoundError(name)
        return found(name)

    monkeypatch.setattr(installed, "version", version)
    save(tmp_path / "a.safetensors")
    told = load_checkpoint(tmp_path / "a.safetensors").metadata["versions"]
    assert told["wm-inject"] == __version__ and told["torch"] == found("torch")


def test_one_of_several_kinds_will_do(tmp_path):
    path = save(tmp_path / "a.safetensors")
    assert load_checkpoint(path, kind=("other", "demo")).kind == "demo"
    assert load_checkpoint(path).kind == "demo"
    with pytest.raises(CheckpointError, match=r"expected the kind other or third, .* holds demo"):
        load_checkpoint(path, kind=("other", "third"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_tensors_are_not_written(tmp_path, value):
    with pytest.raises(ValueError, match="'bad' holds NaN or infinity"):
        save(tmp_path / "a.safetensors", state={"bad": torch.tensor([value])})
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_stored_is_refused(tmp_path, subtests):
    for changes in [
        {"kind": ""},
        {"config": {"a": object()}},
        {"metadata": {"a": float("nan")}},
        {"state": {"a": [1.0]}},
        {"state": [torch.zeros(1)]},
        {"config": None},
    ]:
        with subtests.test(changes=changes), pytest.raises(ValueError):
            save(tmp_path / "a.safetensors", **changes)


def test_missing_file_and_folder(tmp_path):
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(CheckpointError, match="found none at"):
            load_checkpoint(path)


def test_a_pipe_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="found none at"):
        load_checkpoint(tmp_path / "pipe")


def test_too_large(tmp_path):
    with pytest.raises(CheckpointError, match="expected at most 10 bytes"):
        load_checkpoint(save(tmp_path / "a.safetensors"), max_bytes=10)


class Bomb:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def test_pickles_are_refused_and_never_run(tmp_path):
    marker = tmp_path / "ran"
    (tmp_path / "a.safetensors").write_bytes(pickle.dumps(Bomb(str(marker))))
    torch.save(Bomb(str(marker)), tmp_path / "b.safetensors")
    for name in "ab":
        with pytest.raises(CheckpointError, match="is not one"):
            load_checkpoint(tmp_path / f"{name}.safetensors")
    assert not marker.exists()


def test_garbage_is_refused_in_one_line(tmp_path, subtests):
    for content in [
        b"",
        b"1234567",
        struct.pack("<Q", 2**60) + b"{}",
        struct.pack("<Q", 4) + b"[[[[",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 200000) + b"[" * 200000,
    ]:
        with subtests.test(content=content):
            (tmp_path / "a.safetensors").write_bytes(content)
            with pytest.raises(CheckpointError) as caught:
                load_checkpoint(tmp_path / "a.safetensors")
            assert "\n" not in str(caught.value)


def test_foreign_safetensors_are_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    good = {"format": "wm-checkpoint-1", "kind": "demo", "config": {}, "metadata": {}}
    for metadata in (None, {"wm": "{}"}, {"wm": json.dumps({**good, "sha256": "0", "config": []})}):
        save_file({"a": torch.zeros(2)}, path, metadata=metadata)
        with pytest.raises(CheckpointError, match="format wm-checkpoint-1"):
            load_checkpoint(path)
    save_file({"a": torch.zeros(2)}, path, metadata={"wm": json.dumps({**good, "sha256": "0"})})
    with pytest.raises(CheckpointError, match="checksum"):
        load_checkpoint(path)


def test_a_flipped_bit_and_a_cut_are_noticed(tmp_path):
    path = save(tmp_path / "a.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(path)
    path.write_bytes(content[:-5])
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(path)


def test_a_finite_check_follows_the_checksum(tmp_path, monkeypatch):
    monkeypatch.setattr("wm_inject.core.checkpoint._finite", lambda tensor: True)
    path = save(tmp_path / "a.safetensors", state={"bad": torch.tensor([float("nan")])})
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="NaN or infinity in tensor 'bad'"):
        load_checkpoint(path)
