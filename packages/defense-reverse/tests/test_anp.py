"""ANP: masks in [0, 1], disturbances of known size, and channels that go quiet."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call

from defense_nc.mitigations import check_repair
from defense_reverse.mitigations.anp import ANP, DisturbedLoss, masked_parameters, normalisations
from wm_inject.core.images import quantize
from wm_victim import build_classifier
from wm_victim.toy_backdoors import planted_classifier, planted_images, planted_trigger

TARGET = 3
QUICK = ANP(steps=3, batch_size=16)


@pytest.fixture(scope="module")
def data():
    return planted_images(120)


class Gated(nn.Module):
    """A digit classifier with one normalised channel of its own for the planted patch.

    The channel says how bright the corner is. Pruned, it says its bias, which asks for nothing.
    """

    def __init__(self):
        super().__init__()
        planted = planted_classifier("patch")
        self.body = planted.body
        self.register_buffer("template", planted.template)
        self.gate = nn.BatchNorm1d(2)
        self.out = nn.Linear(2, 10, bias=False)
        with torch.no_grad():
            self.out.weight.zero_()
            self.out.weight[TARGET, 0] = 12.0
        self.eval()

    def forward(self, images):
        drive = ((images - 0.5) * self.template).sum(dim=(1, 2, 3))
        fired = torch.sigmoid(10 * (drive - 0.4))
        return self.body(images) + self.out(self.gate(torch.stack([fired, fired * 0], dim=1)))


def small():
    model = build_classifier(
        "resnet10", num_classes=10, channels=3, image_size=16, width=8, seed=1
    ).train()
    with torch.no_grad():
        for norm in normalisations(model).values():
            norm.bias.uniform_(-0.3, 0.3, generator=torch.Generator().manual_seed(0))
        model(planted_images(100).images)  # running statistics of their own
    return model.eval()


def affine(model):
    return {name: (n.weight.detach(), n.bias.detach()) for name, n in normalisations(model).items()}


def ones(model):
    return {name: torch.ones_like(n.weight) for name, n in normalisations(model).items()}


def test_masks_of_one_without_noise_are_the_given_net(data):
    model = small()
    still = {name: torch.zeros(2, len(mask)) for name, mask in ones(model).items()}
    for noise in (None, still):
        parameters = masked_parameters(affine(model), ones(model), noise)
        for name, value in parameters.items():
            assert torch.equal(value, model.get_parameter(name))
        with torch.no_grad():
            assert torch.equal(
                functional_call(model, parameters, (data.images,)), model(data.images)
            )


def test_masks_and_noise_scale_weights_and_biases():
    weight, bias = torch.tensor([2.0, 4.0]), torch.tensor([10.0, -10.0])
    noise = {"n": torch.tensor([[0.5, -0.25], [0.1, 0.2]])}
    found = masked_parameters({"n": (weight, bias)}, {"n": torch.tensor([1.0, 0.5])}, noise)
    assert found["n.weight"].tolist() == [3.0, 1.0]
    assert found["n.bias"].tolist() == pytest.approx([11.0, -12.0])
    alone = masked_parameters({"": (weight, bias)}, {"": torch.zeros(2)}, None)
    assert alone["weight"].tolist() == [0, 0] and torch.equal(alone["bias"], bias)


def test_only_masks_get_gradients(data):
    scratch = small()
    masks = {name: mask.requires_grad_() for name, mask in ones(scratch).items()}
    norms = normalisations(scratch)
    loss_of = DisturbedLoss(scratch, norms, data.images, data.labels)
    noise = {name: torch.full((2, len(mask)), 0.1) for name, mask in masks.items()}
    loss_of(torch.arange(16), masks, noise).backward()
    assert all(mask.grad is not None and bool(mask.grad.any()) for mask in masks.values())
    assert all(parameter.grad is None for parameter in scratch.parameters())
    assert all(value.grad is None for value in noise.values())


@pytest.mark.integration
def test_masks_stay_in_the_unit_interval_even_at_a_huge_rate(data):
    settings = ANP(steps=4, batch_size=16, lr=50.0)
    generator = torch.Generator().manual_seed(0)
    masks, losses = settings._learn(small(), data.images, data.labels, generator, False)
    values = torch.cat(list(masks.values()))
    assert float(values.min()) == 0 and float(values.max()) == 1
    assert len(losses) == 4


def test_the_disturbance_climbs_the_loss_by_its_signs(data):
    scratch = small()
    loss_of = DisturbedLoss(scratch, normalisations(scratch), data.images, data.labels)
    masks, index = ones(scratch), torch.arange(32)

    def worst(noise_steps, noise=0.4):
        settings = ANP(noise=noise, noise_steps=noise_steps)
        return settings._worst_noise(loss_of, masks, index, torch.Generator().manual_seed(7))

    generator = torch.Generator().manual_seed(7)
    drawn = {
        n: 0.4 * (torch.rand((2, len(m)), generator=generator) * 2 - 1) for n, m in masks.items()
    }
    found = worst(1)
    for name in masks:
        # One step of the full size, and no projection: at most twice the size.
        moved = (found[name] - drawn[name]).abs()
        assert torch.allclose(moved[moved > 1e-6], torch.tensor(0.4), atol=1e-6)
        assert float(found[name].abs().max()) <= 0.8 + 1e-6
    assert float(loss_of(index, masks, found)) > float(loss_of(index, masks, drawn))
    assert not any(bool(value.any()) for value in worst(2, noise=0.0).values())


def test_a_pruned_channel_says_its_bias_and_the_others_as_before(data):
    model = small()
    repaired = ANP(steps=6, batch_size=16, lr=20.0, tolerance=0.99).repair(
        model, data.images, data.labels
    )
    assert repaired.log["pruned"] > 0
    norms, before = normalisations(repaired.model), normalisations(model)
    assert repaired.log["pruned"] == sum(repaired.log["pruned_by_layer"].values())
    for name, norm in norms.items():
        gone = norm.weight == 0
        assert int(gone.sum()) == repaired.log["pruned_by_layer"][name]
        # The running statistics and biases are the given ones, the weights too where not pruned.
        assert torch.equal(norm.running_mean, before[name].running_mean)
        assert torch.equal(norm.running_var, before[name].running_var)
        assert torch.equal(norm.bias, before[name].bias)
        assert torch.equal(norm.weight[~gone], before[name].weight[~gone])
        maps = norm(torch.randn(4, len(gone), 5, 5, generator=torch.Generator().manual_seed(0)))
        wanted = norm.bias[gone][None, :, None, None].expand(4, -1, 5, 5)
        assert torch.equal(maps[:, gone], wanted)


@pytest.mark.integration
def test_pruning_stops_before_the_first_threshold_that_costs_too_much(data):
    model = planted_classifier("clean")
    for tolerance in (0.0, 0.05):
        settings = ANP(steps=8, batch_size=16, tolerance=tolerance, holdout=0.3)
        repaired = settings.repair(model, data.images, data.labels)
        sweep, chosen = repaired.log["sweep"], repaired.log["threshold"]
        order = torch.randperm(120, generator=torch.Generator().manual_seed(0))
        held = data.images[order[:36]], data.labels[order[:36]]

        def accuracy(net, held=held):
            with torch.no_grad():
                return float((net(held[0]).argmax(1) == held[1]).double().mean())

        fine = [entry for entry in sweep if entry["accuracy"] >= accuracy(model) - tolerance]
        assert fine in (sweep, sweep[:-1])
        assert chosen == (fine[-1]["threshold"] if fine else None)
        assert accuracy(repaired.model) >= accuracy(model) - tolerance


@pytest.mark.integration
def test_a_planted_channel_is_found_and_pruned():
    data, held_out = planted_images(400), planted_images(500, seed=1)
    model = Gated()
    others = held_out.images[held_out.labels != TARGET]
    stamped = quantize(planted_trigger("patch")(others))

    def rates(net):
        with torch.no_grad():
            clean = (net(held_out.images).argmax(1) == held_out.labels).double().mean()
            return float(clean), float((net(stamped).argmax(1) == TARGET).double().mean())

    before = rates(model)
    repaired = ANP(steps=60, tolerance=0.02).repair(model, data.images, data.labels)
    after = rates(repaired.model)
    assert before[1] > 0.99
    assert after[1] < 0.2
    assert after[0] > before[0] - 0.05
    assert repaired.model.gate.weight[0].item() == 0


def test_the_given_model_stays_bit_identical(data):
    model = small().train()
    model.head.weight.requires_grad_(False)
    state, images = copy.deepcopy(model.state_dict()), data.images.clone()
    repaired = QUICK.repair(model, data.images, data.labels)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.training and model.body.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(data.images, images)
    assert not any(module.training for module in repaired.model.modules())
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    assert [parameter.requires_grad for parameter in repaired.model.parameters()] == wanted


def test_same_seed_same_bytes_with_dropout_too(data):
    body = nn.Sequential(
        nn.Flatten(), nn.Linear(768, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 10)
    )
    before = torch.get_rng_state()

    first = QUICK.repair(body, data.images, data.labels, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    again = QUICK.repair(body, data.images, data.labels, seed=1)
    assert first.log == again.log
    assert torch.equal(first.model[2].weight, again.model[2].weight)
    assert first.log["losses"] != QUICK.repair(body, data.images, data.labels, seed=2).log["losses"]


def test_presets():
    assert ANP.preset("fast") == ANP.preset() == ANP()
    paper = ANP.preset("paper")
    assert (paper.steps, paper.batch_size, paper.lr, paper.momentum) == (2000, 128, 0.2, 0.9)
    assert (paper.noise, paper.clean_weight, paper.noise_steps) == (0.4, 0.2, 1)
    assert paper.tolerance == 0.1
    assert ANP.preset("paper", steps=7).steps == 7
    assert ANP().name == "anp"
    with pytest.raises(ValueError, match="preset"):
        ANP.preset("slow")


def test_refused_settings(subtests):
    for wrong in [
        {"steps": 0},
        {"batch_size": 1},
        {"noise_steps": 0},
        {"lr": 0.0},
        {"momentum": 1.0},
        {"noise": -0.1},
        {"clean_weight": 1.1},
        {"holdout": 0.0},
        {"holdout": 1.0},
        {"tolerance": 1.0},
    ]:
        with subtests.test(wrong=wrong), pytest.raises(ValueError, match="expected"):
            ANP(**wrong)


def test_refusals(data):
    images, labels = data.images[:8], data.labels[:8]
    bare = nn.Sequential(nn.Flatten(), nn.Linear(768, 10))
    fixed = nn.Sequential(nn.BatchNorm2d(3, affine=False), nn.Flatten(), nn.Linear(768, 10)).eval()
    assert check_repair(bare, images, labels) == 10
    cases = [
        ((bare, images, labels), "batch normalisation"),
        ((fixed, images, labels), "batch normalisation"),
        ((small(), images[:3], labels[:3]), "at least 4"),
        ((small(), images + 1, labels), r"\[0, 1\]"),
        ((small(), images, labels[:3]), "labels"),
        ((small(), images, labels + 10), "labels in 0"),
        ((lambda x: x, images, labels), "torch module"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            QUICK.repair(*arguments)
