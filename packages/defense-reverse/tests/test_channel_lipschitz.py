"""Channel-Lipschitz pruning: known constants, who reads whom, and what is left in place."""

import copy
import math

import pytest
import torch
from torch import nn

from defense_reverse.mitigations import ChannelLipschitzPruning
from defense_reverse.mitigations.channel_lipschitz import above_others, lipschitz, scaled_filters
from wm_victim import build_classifier

IMAGES = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(4)


def net(*, folded: bool = False) -> nn.Sequential:
    """Two convolutions with statistics of their own; folded, the same function without them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first, second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 12, 3, padding=1, bias=False)
        norms = nn.BatchNorm2d(16), nn.BatchNorm2d(12)
        for norm in norms:
            nn.init.uniform_(norm.running_mean, -0.1, 0.1)
            nn.init.uniform_(norm.running_var, 0.5, 2.0)
            nn.init.uniform_(norm.weight, 0.8, 1.2)
            nn.init.uniform_(norm.bias, -0.1, 0.1)
        head = nn.Linear(12, 10)
        with torch.no_grad():
            first.weight[5] *= 20  # stands out
            norms[1].weight[7] = -40.0
    if folded:
        first, second = (
            nn.utils.fuse_conv_bn_eval(conv.eval(), norm.eval())
            for conv, norm in zip((first, second), norms, strict=True)
        )
    layers: list[nn.Module] = [first, nn.MaxPool2d(2)]
    layers += [nn.ReLU()] if folded else [norms[0], nn.ReLU()]
    layers += [second] if folded else [second, norms[1]]
    model = nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
    return model.eval()


def test_deviations_are_from_the_other_values() -> None:
    values = torch.tensor([1.0, 2.0, 3.0, 10.0], dtype=torch.float64)
    assert above_others(values)[3] == pytest.approx(8.0)  # others: mean 2, deviation 1
    assert above_others(values)[0] == pytest.approx((1 - 5) / math.sqrt(19))
    assert above_others(torch.tensor([1.0, 1.0, 1.0, 4.0])).tolist()[3] == math.inf
    assert above_others(torch.ones(5)).tolist() == [0.0] * 5
    assert above_others(torch.tensor([1.0, 9.0])).tolist() == [0.0, 0.0]


def test_a_constant_bounds_what_the_channel_amplifies() -> None:
    layer = scaled_filters(net(), IMAGES)[0]
    assert layer.norm is not None
    filters = layer.convolution.weight.detach().double()
    scale = layer.norm.weight.detach() / (layer.norm.running_var + layer.norm.eps).sqrt()  # type: ignore[operator]
    for channel, value in enumerate(lipschitz(layer).tolist()):
        largest = float(torch.linalg.svdvals(filters[channel].flatten(1))[0])
        assert value == pytest.approx(largest * abs(float(scale[channel])), rel=1e-6)


def test_what_stands_out_is_switched_off_and_nothing_else() -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    repaired = ChannelLipschitzPruning().repair(model, IMAGES, LABELS)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert repaired.log == {"channels": 28, "pruned": {"2": [5], "5": [7]}}
    after = repaired.model.state_dict()
    for norm, channel in (("2", 5), ("5", 7)):
        for part in ("weight", "bias"):
            assert after[f"{norm}.{part}"][channel] == 0
            after[f"{norm}.{part}"][channel] = before[f"{norm}.{part}"][channel]
    assert all(torch.equal(before[name], value) for name, value in after.items())


def test_a_folded_network_is_pruned_to_the_same_function() -> None:
    whole, folded = net(), net(folded=True)
    with torch.no_grad():
        assert torch.allclose(whole(IMAGES), folded(IMAGES), atol=1e-4)
        a = ChannelLipschitzPruning().repair(whole, IMAGES, LABELS)
        b = ChannelLipschitzPruning().repair(folded, IMAGES, LABELS)
        assert b.log == {"channels": 28, "pruned": {"0": [5], "3": [7]}}
        assert torch.allclose(a.model(IMAGES), b.model(IMAGES), atol=1e-4)
        assert not torch.allclose(a.model(IMAGES), whole(IMAGES), atol=1e-2)


def test_a_normalisation_that_reads_a_sum_is_left_alone() -> None:
    """Pre-activation blocks: only the second normalisation reads a convolution."""
    model = build_classifier(
        "preactresnet10", num_classes=10, channels=3, image_size=16, width=8
    ).eval()
    layers = scaled_filters(model, IMAGES)
    names = {name: module for name, module in model.named_modules()}
    pairs = [(found_name(names, f.convolution), f.name) for f in layers]
    inside = [(conv, norm) for conv, norm in pairs if "blocks" in conv]
    assert len(inside) == 4
    for conv, norm in inside:
        assert conv.rpartition(".")[0] == norm.rpartition(".")[0]
        assert (conv[-1], norm[-1]) == ("1", "2")
    plain = build_classifier("resnet10", num_classes=10, channels=3, image_size=16, width=8).eval()
    norms = [m for m in plain.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {id(f.norm) for f in scaled_filters(plain, IMAGES)} == {id(norm) for norm in norms}


def test_of_a_partly_folded_network_what_was_folded_is_pruned() -> None:
    """As exporters leave pre-activation blocks: their second normalisation is folded."""
    model = build_classifier(
        "preactresnet10", num_classes=10, channels=3, image_size=16, width=8
    ).eval()
    whole = [f for f in scaled_filters(model, IMAGES) if f.name.endswith("bn2")]
    assert len(whole) == 4
    for layer in whole:
        folded = nn.utils.fuse_conv_bn_eval(layer.convolution, layer.norm)  # type: ignore[arg-type]
        block = layer.name.rpartition(".")[0]
        owner = model.get_submodule(block)
        owner.conv1, owner.bn2 = folded, nn.Identity()
    left = [f for f in scaled_filters(model, IMAGES) if f.norm is None]
    for before, after in zip(whole, left, strict=True):
        assert after.name.rpartition(".")[0] == before.name.rpartition(".")[0]
        assert torch.allclose(lipschitz(after), lipschitz(before), rtol=1e-5)


def found_name(modules: dict[str, nn.Module], wanted: nn.Module) -> str:
    return next(name for name, module in modules.items() if module is wanted)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="deviations above 0"):
        ChannelLipschitzPruning(deviations=0.0)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 10))
    with pytest.raises(ValueError, match="convolutions to prune"):
        ChannelLipschitzPruning().repair(linear, IMAGES, LABELS)
    fixed = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, affine=False)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)),
    )
    with pytest.raises(ValueError, match="convolutions to prune"):
        ChannelLipschitzPruning().repair(fixed, IMAGES, LABELS)
