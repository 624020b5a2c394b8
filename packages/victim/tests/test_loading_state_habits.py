"""Weights as trainers write them: with extras, in the older form, under prefixes, with a stem."""

import argparse
import collections
import datetime
import enum
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from wm_victim.loading import LoadingError
from wm_victim.loading.architectures import build
from wm_victim.loading.archives import (
    ALLOWED_GLOBALS,
    check_pickle,
    foreign_globals,
    legacy_pickles,
)
from wm_victim.loading.class_names import read_names, stored_names
from wm_victim.loading.contract import ModelOptions
from wm_victim.loading.pickled_objects import without_objects
from wm_victim.loading.state_files import convert_state
from wm_victim.loading.subtrees import find_subtree

from .hostile_models import ARCH
from .hostile_models.weights import weights as small_weights

WEIGHTS = {"fc.weight": torch.arange(6.0).reshape(2, 3), "fc.bias": torch.tensor([1.0, -1.0])}


class Colour(enum.Enum):
    RED = 1


class Table(dict[str, Any]):
    """A dictionary of a class of its own, as configurations often are."""


class Slots:
    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = [1]


def touch(path: str) -> None:
    Path(path).touch()


class Touches:
    """Unpickled, it leaves a file; nothing in its name says so."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return touch, (str(self.path),)


EXTRAS: dict[str, Any] = {
    "Namespace": argparse.Namespace(lr=0.1, layers=[1, 2], inner=argparse.Namespace(a=1)),
    "scalar": np.float64(93.5),
    "_reconstruct": np.arange(3),
    "PosixPath": Path("a/b"),
    "Colour": {Colour.RED: Colour.RED},
    "Table": Table(a=Table(b=[1])),
    "defaultdict": collections.defaultdict(list, {"a": [1]}),
    "deque": collections.deque([1, 2], maxlen=3),
    "timedelta": datetime.timedelta(seconds=3),
    "Slots": Slots(),
    "ReLU": [nn.ReLU],
    "Linear": {"inner": nn.Linear(2, 2)},
    "float16": torch.float16,
}


def saved(path: Path, content: Any, *, legacy: bool) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


def pickle_of(path: Path, *, legacy: bool) -> tuple[bytes, list[int] | None]:
    if legacy:
        start, stop = legacy_pickles(path)[3]
        return path.read_bytes()[start:stop], [start, stop]
    with zipfile.ZipFile(path) as archive:
        return archive.read(f"{path.stem}/data.pkl"), None


def convert(folder: Path, content: Any, *, legacy: bool = False) -> dict[str, Any]:
    """What the child makes of a file, once the checks of this process have passed."""
    path = saved(folder / "m.pt", content, legacy=legacy)
    for left in ("plain", "weights.safetensors"):
        (folder / left).unlink(missing_ok=True)
    data, span = pickle_of(path, legacy=legacy)
    options = {"max_tensors": 100, "objects": foreign_globals(data), "pickle": span}
    return convert_state(path, folder, options)


def same(folder: Path) -> bool:
    tensors = load_file(folder / "weights.safetensors")
    return set(tensors) == set(WEIGHTS) and all(
        torch.equal(tensors[k], WEIGHTS[k]) for k in WEIGHTS
    )


@pytest.mark.parametrize("legacy", [False, True])
def test_extras_are_left_out_unread(
    tmp_path: Path, legacy: bool, subtests: pytest.Subtests
) -> None:
    for name, extra in EXTRAS.items():
        with subtests.test(name=name):
            (note,) = (
                note
                for note in convert(
                    tmp_path, {"extra": extra, "state_dict": WEIGHTS, "again": extra}, legacy=legacy
                )["notes"]
                if "unread" in note
            )
            assert name in note
            assert same(tmp_path)


def test_nothing_of_an_extra_is_called(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    content = {"model": WEIGHTS, "extra": Touches(marker)}
    assert "touch" in str(convert(tmp_path, content)["notes"])
    assert not marker.exists()
    assert same(tmp_path)
    data, _ = pickle_of(tmp_path / "m.pt", legacy=False)
    check_pickle(without_objects(data, ALLOWED_GLOBALS))
    with pytest.raises(LoadingError, match=r"asks for code: .*touch"):
        check_pickle(data)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_weights_that_need_code_stay_refused(tmp_path: Path, subtests: pytest.Subtests) -> None:
    quantised = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
    for content, reason in [
        (nn.Linear(2, 2), r"objects that need their code: .*Linear.*state_dict"),
        ({"model": nn.Linear(2, 2), "epoch": 3}, r"objects that need their code: .*Linear"),
        ({"state_dict": Table(WEIGHTS)}, r"objects that need their code: .*Table"),
        ({"model": {"w": quantised}}, "quantised weights"),
    ]:
        with subtests.test(said=reason), pytest.raises(ValueError, match=reason):
            convert(tmp_path, content)


def test_the_older_form_is_read(tmp_path: Path) -> None:
    kinds = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool)
    state = {str(kind): torch.ones(3, dtype=kind) for kind in kinds}
    state["view"] = state["torch.float32"][1:]
    assert convert(tmp_path, state, legacy=True) == {"notes": []}
    tensors = load_file(tmp_path / "weights.safetensors")
    assert all(torch.equal(tensors[name], value) for name, value in state.items())


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")
def test_tensors_as_torch_wrote_them_in_2017_are_read(tmp_path: Path) -> None:
    class Rebuilt:
        def __init__(self, call: Any, *args: Any) -> None:
            self.call, self.args = call, args

        def __reduce__(self) -> tuple[Any, ...]:
            return self.call, self.args

    state = {
        name: Rebuilt(
            nn.Parameter,
            Rebuilt(torch._utils._rebuild_tensor, t.storage(), 0, tuple(t.shape), t.stride()),
            True,
        )
        for name, t in WEIGHTS.items()
    }
    for legacy in (False, True):
        assert convert(tmp_path, state, legacy=legacy) == {"notes": []}
        assert same(tmp_path)


def test_an_archive_that_was_packed_anew_is_read(tmp_path: Path) -> None:
    torch.save({"state_dict": WEIGHTS, "args": argparse.Namespace(a=1)}, tmp_path / "m.pt")
    with zipfile.ZipFile(tmp_path / "m.pt") as old:
        for folder in ("runs/best/", ""):
            (tmp_path / "plain").unlink(missing_ok=True)
            with zipfile.ZipFile(tmp_path / "n.pt", "w", zipfile.ZIP_DEFLATED) as new:
                for name in old.namelist():
                    new.writestr(folder + name.partition("/")[2], old.read(name))
            options = {"max_tensors": 9, "objects": ["argparse.Namespace"]}
            convert_state(tmp_path / "n.pt", tmp_path, options)
            assert same(tmp_path)


def test_a_damaged_older_form_is_refused(tmp_path: Path, subtests: pytest.Subtests) -> None:
    path = saved(tmp_path / "m.pt", WEIGHTS, legacy=True)
    data = path.read_bytes()
    head = data.index(b"\x80", 13)
    code = data[:head] + b"\x80\x02cos\nsystem\n." + data[head:]
    for name, content, reason in [
        ("cut", data[:-3], "."),
        ("longer", data + b"PK", "bytes behind its end"),
        ("code", code, "asks for code|damaged"),
        ("no storages", data[:80], "."),
    ]:
        with subtests.test(name=name):
            path.write_bytes(content)
            with pytest.raises((ValueError, RuntimeError, EOFError), match=reason):
                _, span = pickle_of(path, legacy=True)
                convert_state(path, tmp_path, {"max_tensors": 9, "pickle": span})


def test_names_and_sizes_are_found_in_a_checkpoint(tmp_path: Path) -> None:
    facts = {"class_to_idx": {"dog": 1, "cat": 0}, "img_size": (32, 32, 3)}
    for content in ({"model": WEIGHTS, **facts}, {"state_dict": WEIGHTS, "hparams": facts}):
        result = convert(tmp_path, {"num_classes": 2, "model_name": "resnet18", **content})
        assert (result["class_names"], result["image_size"]) == (("cat", "dog"), 32)


def test_class_names_of_every_habit(subtests: pytest.Subtests) -> None:
    for value in [
        ["cat", "dog"],
        ("cat", "dog"),
        {0: "cat", 1: "dog"},
        {"1": "dog", "0": "cat"},
        {"dog": 1, "cat": 0},
        '["cat", "dog"]',
        "['cat', 'dog']",
        "{0: 'cat', 1: 'dog'}",
        '{"cat": 0, "dog": 1}',
        "cat, dog",
        "cat\ndog\n",
    ]:
        with subtests.test(value=value):
            assert read_names(value) == ("cat", "dog")
    for value in [None, 3, "cat", ["cat", "cat"], ["cat", "\x1b[2J"], [1, 2], {1: "a", 2: "b"}]:
        with subtests.test(value=value):
            assert read_names(value) is None
    assert stored_names({"names": 3, "labels": "cat,dog"}) == ("cat", "dog")


EXPECTED = {"conv.weight": (4, 3, 3, 3), "bn.num_batches_tracked": (), "fc.bias": (2,)}


def state_of(*prefixes: str, **others: Tensor) -> dict[str, Tensor]:
    state = {f"{p}{n}": torch.zeros(shape) for p in prefixes for n, shape in EXPECTED.items()}
    return state | {name.replace("__", "."): value for name, value in others.items()}


def test_the_one_model_is_found_under_its_prefix(subtests: pytest.Subtests) -> None:
    one = torch.ones(1)
    for state, left in [
        (state_of(""), []),
        (state_of("module."), []),
        (state_of("_orig_mod.module."), []),
        (state_of("module._orig_mod."), []),
        (state_of("model.net._orig_mod."), []),
        (state_of("model.", loss__weight=torch.ones(2), acc__tp=one), ["loss.weight", "acc.tp"]),
        (state_of("module.", n_averaged=one), ["n_averaged"]),
        (state_of("model.", "ema_model.module."), [f"ema_model.module.{n}" for n in EXPECTED]),
    ]:
        with subtests.test(first=next(iter(state))):
            subtree = find_subtree(state, EXPECTED)
            assert set(subtree.weights) == set(EXPECTED)
            assert sorted(subtree.others) == sorted(left)
            assert not left or any(left[0] in note for note in subtree.notes)
    inner = {"conv._orig_mod.weight": one, "bn.num_batches_tracked": one, "fc.bias": one}
    assert set(find_subtree(inner, EXPECTED).weights) == set(EXPECTED)
    with pytest.raises(LoadingError, match=r"2 models, under 'a\.', 'b\.'"):
        find_subtree(state_of("a.", "b."), EXPECTED)


def opened(state: dict[str, Tensor], arch: str = ARCH, **options: Any) -> Any:
    return build(state, ModelOptions(arch, **options))


def test_what_lies_beside_a_model_is_used_or_refused(tmp_path: Path) -> None:
    state = {f"1.{name}": value for name, value in small_weights().items()}
    state |= {"0.mean": torch.tensor([0.1, 0.2, 0.3]), "0.std": torch.full((1, 3, 1, 1), 0.5)}
    candidate = opened(state)
    assert candidate.module[0].mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert any("'1.'" in note for note in candidate.notes)
    with pytest.raises(LoadingError, match=r"behind the classifier, 'head\.weight'"):
        opened(state | {"head.weight": torch.ones(3, 10)})


@pytest.mark.integration
def test_the_stem_of_small_images_is_built(subtests: pytest.Subtests) -> None:
    from torchvision.models import resnet18

    torch.manual_seed(0)
    net = resnet18(num_classes=4)
    net.maxpool = nn.Identity()
    for channels in (3, 1):
        with subtests.test(channels=channels), torch.no_grad():
            net.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
            candidate = opened(
                net.state_dict(), "resnet18", mean=(0,) * channels, std=(1,) * channels
            )
            assert (candidate.channels, candidate.image_size) == (channels, 32)
            assert any("3x3" in note for note in candidate.notes)
            images = torch.rand(2, channels, 32, 32)
            torch.testing.assert_close(candidate.module.eval()(images), net.eval()(images))


def test_the_patches_and_positions_of_a_transformer_are_read_off(
    subtests: pytest.Subtests,
) -> None:
    import timm

    net = timm.create_model("test_vit", num_classes=5, img_size=32, patch_size=4).eval()
    candidate = opened(net.state_dict(), "timm:test_vit", mean=(0,) * 3, std=(1,) * 3)
    assert (candidate.image_size, candidate.image_sizes) == (32, ())
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(candidate.module.eval()(images), net(images))


def test_an_open_size_is_said(tmp_path: Path) -> None:
    candidate = opened(dict(small_weights()))
    assert {32, 64, 224} <= set(candidate.image_sizes)
    assert any("image size" in note and "guess" in note for note in candidate.notes)
    assert opened(dict(small_weights()), image_size=64).image_sizes == ()
