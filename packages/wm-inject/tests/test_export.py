from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from wm_inject.export import ParityError, to_onnx, to_torchscript
from wm_inject.images import to_float, to_pixels
from wm_inject.runtime import OnnxModel, Poisoner
from wm_inject.triggers import BadNetsTrigger, BlendTrigger, WaNetTrigger


class TinyInjector(nn.Module):
    """Images to images, with every layer doing something."""

    # TorchScript names files after modules; pytest names this one after a folder with a hyphen.
    __module__ = "tiny"

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body = nn.Sequential(
                nn.Conv2d(3, 8, 3, padding=1), nn.GELU(), nn.BatchNorm2d(8), nn.Conv2d(8, 3, 1)
            )

    def forward(self, images):
        return (images + 0.2 * self.body(images)).clamp(0, 1)


class TinyClassifier(nn.Module):
    __module__ = "tiny"

    def __init__(self) -> None:
        super().__init__()
        self.body = TinyInjector()
        self.head = nn.Linear(3, 10)

    def forward(self, images):
        return 50 * self.head(self.body(images).mean(dim=(2, 3)))


class Dropping(nn.Module):
    """Not what it was when it was traced: the exported file and the module differ."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, images):
        self.calls += 1
        return images * self.calls / 10


def example(n: int = 4, channels: int = 3) -> torch.Tensor:
    return torch.rand(n, channels, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=["torchscript", "onnx"])
def exporter(request, tmp_path):
    function = to_torchscript if request.param == "torchscript" else to_onnx
    path = tmp_path / ("m.pt" if function is to_torchscript else "m.onnx")
    return lambda module, images, **settings: (path, function(module, images, path, **settings))


def test_an_injector_is_exported_and_compared_at_two_batch_sizes(exporter):
    module = TinyInjector().train()
    path, parity = exporter(module, example())
    assert path.is_file() and parity.batches == (1, 4)
    assert parity.max_abs <= 1e-4 and parity.max_rel <= 1e-4
    assert module.training
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert all(p.requires_grad for p in module.parameters())


def test_logits_are_compared_relatively(exporter):
    _, parity = exporter(TinyClassifier(), example(), relative=True)
    assert parity.max_rel <= 1e-4


def test_a_file_that_computes_something_else_is_not_left_behind(exporter):
    with pytest.raises(ParityError, match=r"by .* absolute, more than 0\.0001"):
        exporter(Dropping(), example())


def test_nothing_is_overwritten_by_a_failure(tmp_path):
    path = tmp_path / "m.pt"
    path.write_text("old")
    with pytest.raises(ParityError):
        to_torchscript(Dropping(), example(), path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_frozen_batch_size_is_noticed(tmp_path):
    class Frozen(nn.Module):
        def forward(self, images):
            return images.reshape(int(images.shape[0]), -1)[: int(images.shape[0])] + torch.zeros(
                int(images.shape[0]), 1
            )

    with pytest.raises((ParityError, RuntimeError)):
        to_torchscript(Frozen(), example(), tmp_path / "m.pt")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "images"),
    [
        ({}, torch.rand(2, 3, 16, 16)),
        ({}, torch.rand(4, 3, 16, 16) * 2),
        ({}, torch.rand(3, 16, 16)),
        ({}, torch.rand(0, 3, 16, 16)),
        ({"tolerance": 0.0}, torch.rand(4, 3, 16, 16)),
        ({"metadata": {"a": object()}}, torch.rand(4, 3, 16, 16)),
        ({"metadata": {"a": float("nan")}}, torch.rand(4, 3, 16, 16)),
    ],
)
def test_bad_input_is_refused(exporter, settings, images):
    with pytest.raises(ValueError):
        exporter(TinyInjector(), images, **settings)


def test_modules_that_do_not_give_one_tensor_are_refused(exporter):
    class Two(nn.Module):
        def forward(self, images):
            return images, images

    with pytest.raises(ValueError, match=r"gives one tensor \(4, ...\), got tuple"):
        exporter(Two(), example())
    with pytest.raises(ValueError, match="expected a torch module"):
        exporter(lambda images: images, example())


def test_torchscript_carries_its_metadata_and_warns_nobody(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        to_torchscript(
            BadNetsTrigger(image_size=16), example(), tmp_path / "m.pt", metadata={"a": 1}
        )
    extra = {"wm.json": ""}
    loaded = torch.jit.load(str(tmp_path / "m.pt"), _extra_files=extra)
    record = json.loads(extra["wm.json"])
    assert record["a"] == 1 and record["tolerance"] == 1e-4 and record["image_size"] == [16, 16]
    assert torch.equal(loaded(example(7)), BadNetsTrigger(image_size=16)(example(7)))


def test_onnx_carries_its_metadata_and_takes_any_batch(tmp_path):
    trigger = WaNetTrigger(image_size=16, strength=2.0)
    to_onnx(trigger, example(), tmp_path / "m.onnx", metadata={"kind": "warp"})
    model = OnnxModel(tmp_path / "m.onnx")
    assert model.metadata["kind"] == "warp" and model.metadata["uint8"] is False
    for n in (1, 2, 9):
        images = example(n)
        assert np.abs(model(images.numpy()) - trigger(images).numpy()).max() < 1e-5


@pytest.mark.parametrize(
    "trigger",
    [BadNetsTrigger(image_size=16), BlendTrigger(image_size=16, channels=3), TinyInjector().eval()],
    ids=["patch", "blend", "learned"],
)
def test_the_uint8_graph_takes_and_gives_stored_pixels(tmp_path, trigger):
    path = tmp_path / "m.onnx"
    parity = to_onnx(trigger, example(), path, uint8=True)
    assert parity.max_abs <= 1 / 255
    pixels = to_pixels(example(5))
    with torch.no_grad():
        wanted = to_pixels(trigger(to_float(pixels)))
    differing = Poisoner(path)(pixels) != wanted
    assert differing.mean() <= 1e-3


def test_a_uint8_graph_of_a_classifier_gives_logits(tmp_path):
    module = TinyClassifier().eval()
    to_onnx(module, example(), tmp_path / "m.onnx", uint8=True, relative=True)
    model = OnnxModel(tmp_path / "m.onnx")
    pixels = to_pixels(example())
    with torch.no_grad():
        wanted = module(to_float(pixels)).numpy()
    assert np.abs(model(pixels) - wanted).max() / np.abs(wanted).max() < 1e-4
    with pytest.raises(ValueError, match="expected a graph that gives images"):
        Poisoner(tmp_path / "m.onnx")(pixels)


def test_names_of_input_and_output(tmp_path):
    path = tmp_path / "m.onnx"
    to_onnx(BadNetsTrigger(image_size=16), example(), path, input_name="x", output_name="y")
    assert OnnxModel(path).input_name == "x"


def test_two_gigabytes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("wm_inject.export._ONNX_LIMIT", 10)
    with pytest.raises(ValueError, match="at most 10 bytes of weights"):
        to_onnx(TinyInjector(), example(), tmp_path / "m.onnx")
