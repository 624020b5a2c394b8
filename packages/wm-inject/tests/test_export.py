from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from wm_inject import BadNetsTrigger, BlendTrigger, WaNetTrigger
from wm_inject.core.images import to_float, to_pixels
from wm_inject.export import ParityError, to_onnx, to_torchscript
from wm_inject.runtime import OnnxModel, Poisoner


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


class Told(nn.Module):
    """A trigger that goes by ids, by targets, or by both."""

    __module__ = "tiny"

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.needs_ids, self.needs_target = "ids" in names, "target" in names
        self.config = {"num_classes": 4}
        pictures = torch.rand(7, 3, 16, 16, generator=torch.Generator().manual_seed(1))
        self.register_buffer("pictures", pictures)
        self.register_buffer("shades", torch.tensor([0.0, 0.1, 0.2, 0.3]))

    def forward(self, images, *, ids=None, target=None):
        missing = (self.needs_ids and ids is None) or (self.needs_target and target is None)
        surplus = (ids is not None and not self.needs_ids) or (
            target is not None and not self.needs_target
        )
        if missing or surplus:
            raise ValueError("expected the inputs of this trigger and no others")
        out = 0.5 * images
        if ids is not None:
            out = out + 0.2 * self.pictures[ids % 7]
        if target is not None:
            out = out + self.shades[target][:, None, None, None]
        return out.clamp(0, 1)


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


@pytest.mark.integration
def test_an_injector_is_exported_and_compared_at_two_batch_sizes(exporter):
    module = TinyInjector().train()
    path, parity = exporter(module, example())
    assert path.is_file() and parity.batches == (1, 4)
    assert parity.max_abs <= 1e-4 and parity.max_rel <= 1e-4
    assert module.training
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert all(p.requires_grad for p in module.parameters())


def test_a_module_that_gives_its_input_back_is_exported(exporter):
    _, parity = exporter(torch.nn.Identity(), example())
    assert parity.max_abs == 0


@pytest.mark.integration
def test_logits_are_compared_relatively(exporter):
    _, parity = exporter(TinyClassifier(), example(), relative=True)
    assert parity.max_rel <= 1e-4


@pytest.mark.integration
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


def test_bad_input_is_refused(exporter, subtests):
    for settings, images in [
        ({}, torch.rand(2, 3, 16, 16)),
        ({}, torch.rand(4, 3, 16, 16) * 2),
        ({}, torch.rand(3, 16, 16)),
        ({}, torch.rand(0, 3, 16, 16)),
        ({"tolerance": 0.0}, torch.rand(4, 3, 16, 16)),
        ({"metadata": {"a": object()}}, torch.rand(4, 3, 16, 16)),
        ({"metadata": {"a": float("nan")}}, torch.rand(4, 3, 16, 16)),
    ]:
        with subtests.test(settings=settings, images=images), pytest.raises(ValueError):
            exporter(TinyInjector(), images, **settings)


class Two(nn.Module):
    """A score and a map for every image."""

    __module__ = "tiny"

    def forward(self, images):
        return images.mean(dim=(1, 2, 3)), images.mean(dim=1, keepdim=True)


class Essay(nn.Module):
    """What no exporter can follow: it goes by the values."""

    def forward(self, images):
        return images + 1 if images.sum() > 3 else images


def test_modules_that_do_not_give_tensors_are_refused(exporter):
    class Text(nn.Module):
        def forward(self, images):
            return [images]

    with pytest.raises(ValueError, match=r"gives tensors \(4, ...\), got list"):
        exporter(Text(), example())
    with pytest.raises(ValueError, match="expected a torch module"):
        exporter(lambda images: images, example())


@pytest.mark.integration
def test_several_outputs_have_names(tmp_path):
    parity = to_onnx(Two(), example(), tmp_path / "m.onnx", output_names=("score", "map"))
    assert parity.max_abs < 1e-6
    model = OnnxModel(tmp_path / "m.onnx")
    assert [port.name for port in model.outputs] == ["score", "map"]
    found = model.run({"image": example(7).numpy()})
    for got, want in zip(found.values(), Two()(example(7)), strict=True):
        assert np.abs(got - want.numpy()).max() < 1e-6
    with pytest.raises(ValueError, match=r"a model of one output, m\.onnx gives score, map"):
        model(example().numpy())
    with pytest.raises(ValueError, match="expected 2 output_names, got output"):
        to_onnx(Two(), example(), tmp_path / "n.onnx")
    to_torchscript(Two(), example(), tmp_path / "m.pt")
    assert len(torch.jit.load(str(tmp_path / "m.pt"))(example())) == 2


@pytest.mark.integration
def test_what_cannot_be_exported_is_named_in_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"cannot export Essay to ONNX: .*data-dependent") as told:
        to_onnx(Essay(), example(), tmp_path / "m.onnx")
    assert "\n" not in str(told.value) and list(tmp_path.iterdir()) == []


class Mixer(nn.Module):
    """Most of its weights in matrix products, as in a transformer; a small change to the image."""

    __module__ = "tiny"

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.mix = nn.Sequential(nn.Linear(256, 64), nn.GELU(), nn.Linear(64, 256))

    def forward(self, images):
        change = self.mix(images.flatten(2)).unflatten(2, (16, 16))
        return (images + 0.1 * torch.tanh(change)).clamp(0, 1)


@pytest.mark.integration
@pytest.mark.parametrize("uint8", [False, True])
@pytest.mark.parametrize(("precision", "allowed"), [("float16", 1e-3), ("int8", 2e-2)])
def test_lower_precisions_stay_close(tmp_path, precision, allowed, uint8):
    to_onnx(Mixer(), example(), tmp_path / "plain.onnx", uint8=uint8)
    path = tmp_path / "low.onnx"
    parity = to_onnx(Mixer(), example(), path, precision=precision, uint8=uint8)
    model = OnnxModel(path)
    assert model.metadata["precision"] == precision
    assert model.metadata["parity"]["max_abs"] == parity.max_abs
    # Half a step of rounding to 8 bits on either side.
    assert 0 < parity.max_abs <= allowed + uint8 / 255
    small, large = (file.stat().st_size for file in (path, tmp_path / "plain.onnx"))
    assert small < (0.7 if precision == "float16" else 0.5) * large
    images = to_pixels(example(9)) if uint8 else example(9).numpy()
    want = OnnxModel(tmp_path / "plain.onnx")(images)
    assert model(images).dtype == want.dtype
    assert np.abs(model(images).astype(float) - want).max() / (255 if uint8 else 1) <= 2e-2


@pytest.mark.integration
def test_float16_ends_before_the_residual_is_added(tmp_path):
    """The identity but for a change of zero: in float16 the image itself would lose digits."""
    module = Mixer()
    nn.init.zeros_(module.mix[2].weight), nn.init.zeros_(module.mix[2].bias)
    assert to_onnx(module, example(), tmp_path / "m.onnx", precision="float16").max_abs == 0


@pytest.mark.integration
def test_int8_is_for_matrix_products(tmp_path):
    with pytest.raises(ValueError, match="matrix products for int8, got one of convolutions"):
        to_onnx(TinyInjector(), example(), tmp_path / "m.onnx", precision="int8")
    with pytest.raises(ValueError, match="matrix products for float16, found none"):
        to_onnx(BadNetsTrigger(image_size=16), example(), tmp_path / "m.onnx", precision="float16")
    assert list(tmp_path.iterdir()) == []


def test_torchscript_in_bfloat16(tmp_path):
    parity = to_torchscript(Mixer(), example(), tmp_path / "m.pt", precision="bfloat16")
    assert 0 < parity.max_abs < 5e-3
    assert torch.jit.load(str(tmp_path / "m.pt"))(example()).dtype == torch.float32


@pytest.mark.parametrize("precision", ["float64", "bfloat16"])
def test_unknown_precisions_are_refused(tmp_path, precision):
    with pytest.raises(ValueError, match="expected a precision in float32, float16, int8"):
        to_onnx(Mixer(), example(), tmp_path / "m.onnx", precision=precision)
    with pytest.raises(ValueError, match="expected a precision in float32, bfloat16"):
        to_torchscript(Mixer(), example(), tmp_path / "m.pt", precision="int8")


@pytest.mark.integration
def test_a_precision_that_is_too_coarse_for_the_tolerance_is_an_error(tmp_path):
    with pytest.raises(ParityError, match="differs from the module"):
        to_onnx(Mixer(), example(), tmp_path / "m.onnx", precision="int8", tolerance=1e-6)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.integration
def test_any_size(tmp_path):
    class Blur(nn.Module):
        def forward(self, images):
            return torch.nn.functional.avg_pool2d(images, 3, 1, 1)

    for uint8 in (False, True):
        to_onnx(Blur(), example(), tmp_path / "m.onnx", any_size=True, uint8=uint8)
        model = OnnxModel(tmp_path / "m.onnx")
        images = torch.rand(2, 3, 24, 40)
        given = to_pixels(images) if uint8 else images.numpy()
        want = to_pixels(Blur()(to_float(given))) if uint8 else Blur()(images).numpy()
        assert np.abs(model(given).astype(float) - want).max() <= (1 if uint8 else 1e-6)


def test_a_module_in_which_sizes_are_tensors_is_traced(tmp_path):
    class Sized(nn.Module):
        def forward(self, images):
            rows = torch.tensor(images.shape)[2] * 16
            return images.reshape(images.shape[0], 3, int(rows)).mean(dim=2)

    parity = to_onnx(Sized(), example(), tmp_path / "m.onnx", traced=True, uint8=True)
    assert parity.max_abs < 1e-5
    pixels = to_pixels(example(9))
    found = OnnxModel(tmp_path / "m.onnx")(pixels)
    assert np.abs(found - to_float(pixels).mean(dim=(2, 3)).numpy()).max() < 1e-5
    for more in ({"any_size": True}, {"external_data": True}):
        with pytest.raises(ValueError, match="expected traced without any_size"):
            to_onnx(Sized(), example(), tmp_path / "n.onnx", traced=True, **more)


@pytest.mark.integration
def test_weights_in_a_file_of_their_own(tmp_path):
    path = tmp_path / "m.onnx"
    to_onnx(Mixer(), example(), path, external_data=True)
    assert {file.name for file in tmp_path.iterdir()} == {"m.onnx", "m.onnx.data"}
    assert path.stat().st_size < 2 * 64 * 256 * 4 < (tmp_path / "m.onnx.data").stat().st_size
    with torch.no_grad():
        assert np.abs(OnnxModel(path)(example().numpy()) - Mixer()(example()).numpy()).max() < 1e-5
    with pytest.raises(ValueError, match="float32 with external data, got int8"):
        to_onnx(Mixer(), example(), path, external_data=True, precision="int8")


@pytest.mark.integration
def test_files_hold_no_path_of_the_machine_that_made_them(tmp_path):
    to_onnx(Mixer(), example(), tmp_path / "m.onnx")
    to_torchscript(Mixer(), example(), tmp_path / "m.pt")
    for name in ("m.onnx", "m.pt"):
        content = (tmp_path / name).read_bytes()
        assert str(Path(__file__).parents[1]).encode() not in content
        assert b"site-packages" not in content and b"test_export" not in content


@pytest.mark.integration
def test_the_record_tells_the_weights(tmp_path):
    def digest(module):
        to_onnx(module, example(), tmp_path / "m.onnx")
        return OnnxModel(tmp_path / "m.onnx").metadata["weights_sha256"]

    other = Mixer()
    with torch.no_grad():
        other.mix[0].bias[0] += 1e-3
    assert digest(Mixer()) == digest(Mixer()) != digest(other)


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


@pytest.mark.integration
def test_onnx_carries_its_metadata_and_takes_any_batch(tmp_path):
    trigger = WaNetTrigger(image_size=16, strength=2.0)
    to_onnx(trigger, example(), tmp_path / "m.onnx", metadata={"kind": "warp"})
    model = OnnxModel(tmp_path / "m.onnx")
    assert model.metadata["kind"] == "warp" and model.metadata["uint8"] is False
    for n in (1, 2, 9):
        images = example(n)
        assert np.abs(model(images.numpy()) - trigger(images).numpy()).max() < 1e-5


@pytest.mark.integration
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


@pytest.mark.integration
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


@pytest.mark.integration
def test_names_of_input_and_output(tmp_path):
    path = tmp_path / "m.onnx"
    to_onnx(BadNetsTrigger(image_size=16), example(), path, input_name="x", output_names=("y",))
    model = OnnxModel(path)
    assert model.input_name == "x" and model.extra_inputs == ()
    assert model.metadata["inputs"] == ["x"]


@pytest.mark.integration
def test_weights_too_large_for_one_file_get_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr("wm_inject.export.onnx_graph._LIMIT", 10)
    to_onnx(Mixer(), example(), tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx.data").exists()


@pytest.mark.slow
def test_more_than_two_gigabytes(tmp_path):
    """The limit of one protobuf, for real: 2.1 GiB of weights, of which little is used."""

    class Huge(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.zeros(2_200, 512, 512))
            self.table[-1] = 0.25

        def forward(self, images):
            row = (0 * images[:, 0, 0, 0]).long() + len(self.table) - 1
            return images * self.table[row][:, :1, :1, None]

    to_onnx(Huge(), example(), tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx.data").stat().st_size > 2**31
    images = example().numpy()
    assert np.allclose(OnnxModel(tmp_path / "m.onnx")(images), images / 4)


NAMES = [("ids",), ("target",), ("ids", "target")]


def vectors(names, n: int) -> dict[str, torch.Tensor]:
    values = {"ids": torch.arange(n) * 1_000_003, "target": torch.arange(n) % 4}
    return {name: values[name] for name in names}


@pytest.mark.integration
@pytest.mark.parametrize("names", NAMES)
def test_onnx_takes_ids_and_target_where_the_trigger_does(tmp_path, names):
    path = tmp_path / "m.onnx"
    parity = to_onnx(Told(*names), example(), path)
    assert parity.batches == (1, 4) and parity.max_abs <= 1e-5
    model = OnnxModel(path)
    assert model.extra_inputs == names
    assert model.metadata["inputs"] == ["image", *names]
    for n in (1, 3, 9):
        extra = vectors(names, n)
        arrays = {name: value.numpy() for name, value in extra.items()}
        difference = model(example(n).numpy(), **arrays) - Told(*names)(example(n), **extra).numpy()
        assert np.abs(difference).max() < 1e-5


def test_the_uint8_graph_takes_them_too(tmp_path):
    path, names = tmp_path / "m.onnx", ("ids", "target")
    parity = to_onnx(Told(*names), example(), path, uint8=True)
    assert parity.batches == (1, 4) and parity.max_abs <= 1 / 255
    pixels, extra = to_pixels(example(6)), vectors(names, 6)
    wanted = to_pixels(Told(*names)(to_float(pixels), **extra))
    found = Poisoner(path)(pixels, **{name: value.numpy() for name, value in extra.items()})
    assert (found != wanted).mean() <= 1e-3


@pytest.mark.parametrize("names", NAMES)
def test_torchscript_takes_them_too(tmp_path, names):
    parity = to_torchscript(Told(*names), example(), tmp_path / "m.pt")
    assert parity.batches == (1, 4) and parity.max_abs <= 1e-5
    record = {"wm.json": ""}
    loaded = torch.jit.load(str(tmp_path / "m.pt"), _extra_files=record)
    assert json.loads(record["wm.json"])["inputs"] == ["image", *names]
    for n in (1, 7):
        extra = vectors(names, n)
        wanted = Told(*names)(example(n), **extra)
        assert torch.allclose(loaded(example(n), **extra), wanted, atol=1e-6)
        assert torch.allclose(loaded(example(n), *extra.values()), wanted, atol=1e-6)


@pytest.mark.integration
def test_the_parity_of_ids_is_really_checked(tmp_path):
    class Shifting(Told):
        calls = 0

        def forward(self, images, *, ids=None, target=None):
            Shifting.calls += 1
            return super().forward(images, ids=ids + Shifting.calls)

    with pytest.raises(ParityError):
        to_onnx(Shifting("ids"), example(), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_two_inputs_of_one_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match="expected an input_name beside ids"):
        to_onnx(Told("ids"), example(), tmp_path / "m.onnx", input_name="ids")
