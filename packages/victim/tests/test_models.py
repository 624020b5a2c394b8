from pathlib import Path

import pytest
import torch
from torch import nn

from wm_inject.core.checkpoint import CheckpointError, save_checkpoint
from wm_inject.core.files import sha256_file
from wm_victim import CLASSIFIERS, build_classifier, load_classifier, save_classifier
from wm_victim.imagenet_weights import ImagenetWeights
from wm_victim.models import Classifier, Normalize


def build(name: str, **changes: object) -> Classifier:
    settings: dict[str, object] = {"num_classes": 10, "channels": 3, "image_size": 32}
    return build_classifier(name, **(settings | changes))  # type: ignore[arg-type]


def test_parameter_counts_are_the_published_ones(subtests: pytest.Subtests) -> None:
    for name, changes, count in [
        ("resnet18", {}, 11_173_962),
        ("preactresnet18", {}, 11_171_146),
        ("preactresnet18", {"num_classes": 43}, 11_188_075),
        ("vgg16", {}, 14_728_266),
        ("mobilenetv2", {}, 2_296_922),
        ("wanet-mnist", {"channels": 1, "image_size": 28}, 585_738),
        ("wanet-mnist", {"channels": 1, "image_size": 32}, 585_738),
    ]:
        with subtests.test(name=name, changes=changes, count=count):
            assert sum(p.numel() for p in build(name, **changes).parameters()) == count


def test_every_net_takes_grey_28_and_rgb_of_many_sizes(subtests: pytest.Subtests) -> None:
    for name in CLASSIFIERS:
        for channels, size in [(1, 28), (3, 32), (3, 40)]:
            with subtests.test(name=name, channels=channels, size=size):
                model = build(
                    name, channels=channels, image_size=size, num_classes=7, width=8
                ).eval()
                images = torch.rand(3, channels, size, size)
                with torch.no_grad():
                    logits = model(images)
                    assert logits.shape == (3, 7)
                    # The split that feature-level methods rely on.
                    assert torch.equal(model.head(model.features(images)), logits)
                    assert torch.allclose(model(images[:1]), logits[:1], atol=1e-5)
                    # The defined order of memory does not matter.
                    last = model(images.to(memory_format=torch.channels_last))
                    assert torch.allclose(last, logits, atol=1e-5)


def test_normalisation_is_the_first_layer() -> None:
    images = torch.rand(2, 3, 4, 4)
    out = Normalize((0.1, 0.2, 0.3), (0.5, 0.25, 1.0))(images)
    for channel, (mean, std) in enumerate([(0.1, 0.5), (0.2, 0.25), (0.3, 1.0)]):
        assert torch.allclose(out[:, channel], (images[:, channel] - mean) / std)
    model = build("resnet10", width=8, mean=(0.0,) * 3, std=(1.0,) * 3).eval()
    shifted = build("resnet10", width=8, mean=(0.5,) * 3, std=(0.5,) * 3).eval()
    with torch.no_grad():
        assert torch.allclose(shifted(images), model((images - 0.5) / 0.5), atol=1e-6)


def test_the_seed_makes_the_weights_and_leaves_the_global_state_alone() -> None:
    before = torch.get_rng_state()
    first, again = build("resnet10", width=8, seed=3), build("resnet10", width=8, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.head.weight, again.head.weight)
    assert not torch.equal(first.head.weight, build("resnet10", width=8, seed=4).head.weight)


def test_a_saved_classifier_comes_back_to_the_bit(tmp_path: Path) -> None:
    model = build("vgg16", channels=1, image_size=28, width=8, seed=1)
    model(torch.rand(8, 1, 28, 28))  # moves the running statistics
    save_classifier(model.eval(), tmp_path / "m.safetensors", {"data": "digits"})
    loaded = load_classifier(tmp_path / "m.safetensors")
    assert not loaded.training
    assert loaded.config == model.config
    images = torch.rand(2, 1, 28, 28)
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))
    save_classifier(loaded, tmp_path / "again.safetensors", {"data": "digits"})
    first = (tmp_path / "m.safetensors").read_bytes()
    assert first == (tmp_path / "again.safetensors").read_bytes()


def test_a_file_that_does_not_fit_is_refused(tmp_path: Path, subtests: pytest.Subtests) -> None:
    for config, message in [
        ({"name": "resnet10"}, "is no classifier"),
        ({"name": "timm:hf_hub:someone/model", "num_classes": 2}, "is no classifier"),
        ({"name": "resnet10", "width": 16}, "is no classifier"),
        ({"name": "resnet10", "width": 10**9}, "width in 8 .. 512"),
        ({"name": "resnet10", "surprise": 1}, "surprise"),
        ({"name": ["resnet10"]}, "is no classifier"),
        ({"name": "resnet10", "mean": ["a", "b", "c"]}, "is no classifier"),
    ]:
        with subtests.test(config=config, message=message):
            state = build("resnet10", width=8).state_dict()
            base: dict[str, object] = {"num_classes": 10, "channels": 3, "image_size": 32}
            path = tmp_path / "m.safetensors"
            save_checkpoint(path, kind="classifier", config=base | config, state=state)
            with pytest.raises(CheckpointError, match=message):
                load_classifier(path)


def test_other_files_and_models_are_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "t.safetensors", kind="patch", config={}, state={})
    with pytest.raises(CheckpointError, match="kind classifier"):
        load_classifier(tmp_path / "t.safetensors")
    with pytest.raises(ValueError, match="model of build_classifier, got Linear"):
        save_classifier(nn.Linear(2, 2), tmp_path / "l.safetensors")


def test_bad_settings_are_refused(subtests: pytest.Subtests) -> None:
    for name, changes, message in [
        ("resnet50", {}, "expected a classifier in resnet18"),
        ("timm:test_vit", {"image_size": 28}, "expected images of a size that timm:test_vit takes"),
        ("resnet18", {"channels": 4}, "channels 1 or 3"),
        ("resnet18", {"num_classes": 1}, "num_classes in 2"),
        ("resnet18", {"num_classes": 2.5}, "num_classes in 2"),
        ("resnet18", {"image_size": 4}, "image_size in 8"),
        ("resnet18", {"width": 4}, "width in 8"),
        ("resnet18", {"mean": (0.5,)}, "3 means"),
        ("resnet18", {"std": (0.5, 0.0, 0.5)}, "positive standard"),
        ("resnet18", {"std": (0.5, float("nan"), 0.5)}, "positive standard"),
        ("vgg16", {"image_size": 24}, "at least 28 pixels for vgg16"),
        ("timm:resnet18", {"width": 32}, "own widths"),
        ("timm:no_such_net", {}, "timm.list_models"),
        ("timm:hf_hub:someone/net", {}, "timm.list_models"),
    ]:
        with (
            subtests.test(name=name, changes=changes, message=message),
            pytest.raises(ValueError, match=message),
        ):
            build(name, **changes)


def test_normalize_refuses_lengths_that_differ() -> None:
    with pytest.raises(ValueError, match="as many means"):
        Normalize((0.5,), (0.5, 0.5))
    with pytest.raises(ValueError, match="as many means"):
        Normalize((), ())


@pytest.mark.parametrize("name", ["timm:resnet10t", "timm:vit_tiny_patch16_224"])
def test_timm_models_come_without_a_download(name: str, tmp_path: Path) -> None:
    model = build(name, image_size=64, num_classes=5).eval()
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert model(images).shape == (2, 5)
        save_classifier(model, tmp_path / "m.safetensors")
        assert torch.equal(load_classifier(tmp_path / "m.safetensors")(images), model(images))


@pytest.mark.integration
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_traced_net_gives_the_same_logits_at_another_batch_size(name: str) -> None:
    model = build(name, channels=1, image_size=28, width=8).eval()
    images = torch.rand(3, 1, 28, 28)
    with torch.no_grad():
        traced = torch.jit.trace(model, images[:2])
        assert torch.allclose(traced(images), model(images), atol=1e-5)


@pytest.fixture
def carried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """Weights of a network of timm's under other names, in a package that can be imported."""
    import timm

    package = tmp_path / "carries_weights"
    package.mkdir()
    (package / "__init__.py").write_text("")
    state = timm.create_model("mobilenetv3_small_050", num_classes=5).state_dict()
    torch.save({f"_{key}": value for key, value in state.items()}, package / "w.pth")
    digest = sha256_file(package / "w.pth")
    source = ImagenetWeights(package.name, "w.pth", digest, (0.4,) * 3, (0.3,) * 3)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(
        "wm_victim.imagenet_weights.IMAGENET_WEIGHTS", {"mobilenetv3_small_050": source}
    )
    return state


def test_weights_from_imagenet_are_those_that_a_package_carries(
    carried: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    model = build("imagenet:mobilenetv3_small_050")
    body = {key: value for key, value in carried.items() if not key.startswith("classifier")}
    assert all(torch.equal(value, body[key]) for key, value in model.body.state_dict().items())
    assert (model.config["mean"], model.config["std"]) == ([0.4] * 3, [0.3] * 3)
    assert build("imagenet:mobilenetv3_small_050", mean=(0.5,) * 3).config["mean"] == [0.5] * 3
    save_classifier(model.eval(), tmp_path / "model.safetensors")
    (tmp_path / "carries_weights" / "w.pth").unlink()  # the saved file needs it no longer
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(load_classifier(tmp_path / "model.safetensors")(images), model(images))
    with pytest.raises(ValueError, match="sha256"):
        build("imagenet:mobilenetv3_small_050")


def test_other_networks_and_images_than_those_of_the_weights_are_refused(
    carried: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="imagenet: and one of"):
        build("imagenet:resnet18")
    with pytest.raises(ValueError, match="colour"):
        build("imagenet:mobilenetv3_small_050", channels=1)
    monkeypatch.setattr("wm_victim.imagenet_weights.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="installed"):
        build("imagenet:mobilenetv3_small_050")
