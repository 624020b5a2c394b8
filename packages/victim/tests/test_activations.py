"""Outputs of layers are recorded, and stages are found in every classifier of this library."""

import copy

import pytest
import torch
from torch import nn

from wm_victim import build_classifier
from wm_victim.activations import conv_stages, get_layer, record_outputs
from wm_victim.toy_backdoors import planted_classifier


def small(name, *, size=32, channels=3):
    width = None if name.startswith("timm:") else 8
    return build_classifier(
        name, num_classes=4, channels=channels, image_size=size, width=width
    ).eval()


def maps(model, *, size=32, channels=3):
    images = torch.rand(2, channels, size, size)
    stages = conv_stages(model, images)
    with torch.no_grad(), record_outputs(model, stages) as found:
        model(images)
    return [(name, found[name].shape[-1]) for name in stages]


def test_the_stages_of_our_classifiers(subtests):
    for name, ends in [
        ("resnet18", [("blocks.1", 32), ("blocks.3", 16), ("blocks.5", 8), ("blocks.7", 4)]),
        ("resnet10", [("blocks.0", 32), ("blocks.1", 16), ("blocks.2", 8), ("blocks.3", 4)]),
        ("preactresnet10", [("blocks.0", 32), ("blocks.1", 16), ("blocks.2", 8), ("blocks.3", 4)]),
        (
            "vgg16",
            [
                *(("layers.5", 32), ("layers.12", 16), ("layers.22", 8)),
                *(("layers.32", 4), ("layers.42", 2)),
            ],
        ),
        ("mobilenetv2", [("layers.4", 32), ("layers.7", 16), ("layers.14", 8), ("layers.20", 4)]),
    ]:
        with subtests.test(name=name, ends=ends):
            assert maps(small(name)) == [(f"body.{layer}", side) for layer, side in ends]


def test_the_stages_of_the_nets_for_mnist():
    found = maps(small("wanet-mnist", size=28, channels=1), size=28, channels=1)
    assert found == [("body.layers.3", 14), ("body.layers.6", 7), ("body.layers.7", 4)]
    assert maps(planted_classifier(), size=16) == [("body.2", 16), ("body.3", 6)]


def test_the_last_map_is_what_the_head_reads():
    model = small("resnet10")
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad(), record_outputs(model, [conv_stages(model, images)[-1]]) as found:
        features = model.features(images)
    (last,) = found.values()
    torch.testing.assert_close(last.mean((2, 3)), features)


def test_a_shared_relu_and_a_single_pixel_are_no_stages():
    relu = nn.ReLU()
    body = [nn.Conv2d(3, 4, 3, 2, 1), relu, nn.Conv2d(4, 4, 3, 2, 1), relu, nn.Conv2d(4, 4, 4)]
    model = nn.Sequential(*body, nn.Flatten(), nn.Linear(4, 3))
    assert maps(model, size=16) == [("0", 8), ("2", 4)]


def test_networks_without_maps_are_refused(subtests):
    for kind in ["linear", "one pixel", "tokens"]:
        with subtests.test(kind=kind):
            if kind == "tokens":
                model = small("timm:test_vit")
                images = torch.rand(1, 3, 32, 32)
            else:
                first = nn.Flatten() if kind == "linear" else nn.Conv2d(3, 48, 4)
                model = nn.Sequential(first, nn.Flatten(), nn.Linear(48, 3))
                images = torch.rand(1, 3, 4, 4)
            with pytest.raises(ValueError, match="convolutional maps"):
                conv_stages(model, images)
            with pytest.raises(ValueError, match="images"):
                conv_stages(model, images + 1)


def test_a_tap_records_with_gradients_and_leaves_no_hook():
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
    given = torch.rand(4, 3)
    with record_outputs(model, ["0"]) as found:
        assert found == {}
        answer = model(given)
        torch.testing.assert_close(answer, found["0"].relu())
        assert found["0"].requires_grad
        model(given[:1])
        assert len(found["0"]) == 1
    assert not model[0]._forward_hooks
    with pytest.raises(RuntimeError, match="shape"), record_outputs(model, ["0"]):
        model(torch.rand(4, 7))
    assert not model[0]._forward_hooks


def test_looking_for_stages_changes_nothing():
    model = small("resnet10").train()
    model.head.weight.requires_grad_(False)
    state = copy.deepcopy(model.state_dict())
    conv_stages(model, torch.rand(3, 3, 32, 32))
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert model.training and not model.head.weight.requires_grad
    assert not any(module._forward_hooks for module in model.modules())


def test_refused_layers():
    model = nn.Sequential(nn.Linear(3, 2), nn.LSTM(2, 2))
    for layers in (["conv9"], [""], ["0", "nothing"]):
        with pytest.raises(ValueError, match="expected a layer"), record_outputs(model, layers):
            pass
    with pytest.raises(ValueError, match="names of layers"), record_outputs(model, []):
        pass
    with pytest.raises(ValueError, match="expected a tensor from"), record_outputs(model, ["1"]):
        model(torch.rand(4, 3))
    assert get_layer(model, "0") is model[0]
