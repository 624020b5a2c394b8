"""I-BAU: the hypergradient of a problem with a known answer, one addition for all, eval mode."""

import copy

import pytest
import torch
import torch.nn.functional as F

from defense_reverse.mitigations.hypergradient import hypergradient
from defense_reverse.mitigations.i_bau import IBAU, carrier_rows
from wm_inject.core.images import quantize
from wm_victim import build_classifier
from wm_victim.toy_backdoors import planted_classifier, planted_images, planted_trigger

TARGET = 3
QUICK = IBAU(steps=2, rounds=2, search_steps=2, batch_size=16, inner_batch=8, iterations=2)


@pytest.fixture(scope="module")
def data():
    return planted_images(300)


def small():
    return build_classifier("resnet10", num_classes=10, channels=3, image_size=16, width=8).eval()


class Quadratic:
    """inner = d'Ad/2 - d'Bp, so the optimum is A^-1 B p; outer = |d - c|^2/2 + |p|^2/2."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        root = torch.randn(4, 4, generator=generator, dtype=torch.float64)
        self.A = root @ root.T / 4 + torch.eye(4, dtype=torch.float64)
        self.B = torch.randn(4, 3, generator=generator, dtype=torch.float64)
        self.c = torch.randn(4, generator=generator, dtype=torch.float64)
        self.p = torch.randn(3, generator=generator, dtype=torch.float64).requires_grad_()
        self.optimum = torch.linalg.solve(self.A, self.B @ self.p.detach())

    def inner(self, d):
        return d @ self.A @ d / 2 - d @ self.B @ self.p

    def outer(self, d):
        return (d - self.c).square().sum() / 2 + self.p.square().sum() / 2

    def solve(self, iterations, lr=0.3):
        return hypergradient(
            self.inner, self.outer, self.optimum, [self.p], lr=lr, iterations=iterations
        )


def test_the_hypergradient_of_a_quadratic_problem_is_the_analytic_one():
    toy = Quadratic()
    loss, (found,) = toy.solve(300)
    back = torch.linalg.solve(toy.A, toy.optimum - toy.c)
    assert torch.allclose(found, toy.p.detach() + toy.B.T @ back, atol=1e-10)
    assert loss == pytest.approx(toy.outer(toy.optimum).item())


def test_each_iteration_adds_one_term_of_the_power_series():
    toy, lr = Quadratic(), 0.3
    step = torch.eye(4, dtype=torch.float64) - lr * toy.A
    direct = toy.optimum - toy.c
    for iterations in (1, 2, 5):
        terms = [torch.linalg.matrix_power(step, k) @ direct for k in range(iterations)]
        wanted = toy.p.detach() + lr * toy.B.T @ sum(terms)
        assert torch.allclose(toy.solve(iterations, lr)[1][0], wanted, atol=1e-12)


def test_the_hypergradient_equals_finite_differences_through_the_solved_optimum():
    toy = Quadratic()
    (found,) = toy.solve(300)[1]
    for index in range(3):
        values = []
        for move in (1e-5, -1e-5):
            p = toy.p.detach().clone()
            p[index] += move
            d = torch.linalg.solve(toy.A, toy.B @ p)
            values.append(float((d - toy.c).square().sum() / 2 + p.square().sum() / 2))
        assert float(found[index]) == pytest.approx((values[0] - values[1]) / 2e-5, abs=1e-6)


def test_a_parameter_that_a_loss_does_not_touch_gets_what_the_other_gives():
    toy = Quadratic()
    unused = torch.ones(2, dtype=torch.float64, requires_grad=True)
    _, (found, nothing) = hypergradient(
        toy.inner, toy.outer, toy.optimum, [toy.p, unused], lr=0.3, iterations=4
    )
    assert torch.equal(nothing, torch.zeros(2, dtype=torch.float64))
    assert torch.equal(found, toy.solve(4)[1][0])
    assert toy.p.grad is None and not toy.optimum.requires_grad


def test_some_image_carries_the_addition_in_every_batch(subtests):
    for count in [1, 2, 32, 99, 100, 256]:
        with subtests.test(count=count):
            rows = carrier_rows(count, 0.01, torch.Generator().manual_seed(0))
            assert len(rows) == len(set(rows.tolist())) == max(1, round(0.01 * count))
            assert set(rows.tolist()) <= set(range(count))


def test_one_addition_serves_all_images_and_fools_the_net(data):
    model = planted_classifier("patch", target=TARGET)
    settings = IBAU(search_steps=30, batch_size=64)
    delta = settings._search(model, data.images, torch.Generator().manual_seed(0))
    assert delta.shape == (1, 3, 16, 16) and not delta.requires_grad
    with torch.no_grad():
        before, after = model(data.images), model(data.images + delta)
    answers = before.argmax(1)
    assert float((after.argmax(1) != answers).double().mean()) > 0.5
    assert float(F.cross_entropy(after, answers)) > float(F.cross_entropy(before, answers))


def test_the_search_is_gradient_ascent_on_the_nets_own_answers(data):
    model, images = planted_classifier("patch"), data.images[:20]
    settings = IBAU(search_steps=1, batch_size=20, search_lr=10.0, penalty=0.0, radius=None)
    delta = settings._search(model, images, torch.Generator().manual_seed(0))
    free = torch.zeros(1, 3, 16, 16, requires_grad=True)
    loss = F.cross_entropy(model(images + free), model(images).argmax(1))
    (slope,) = torch.autograd.grad(loss, free)
    assert torch.allclose(delta, 10 * slope, atol=1e-6)
    near = IBAU(search_steps=3, batch_size=20, search_lr=1e3, radius=0.5)
    delta = near._search(model, images, torch.Generator().manual_seed(0))
    assert float(delta.norm()) == pytest.approx(0.5, abs=1e-5)


@pytest.mark.integration
def test_a_planted_backdoor_is_unlearnt():
    data, held_out = planted_images(400), planted_images(500, seed=1)
    model = planted_classifier("patch", target=TARGET)
    others = held_out.images[held_out.labels != TARGET]
    stamped = quantize(planted_trigger("patch")(others))

    def rates(net):
        with torch.no_grad():
            clean = (net(held_out.images).argmax(1) == held_out.labels).double().mean()
            return float(clean), float((net(stamped).argmax(1) == TARGET).double().mean())

    # The plant is one number, `gain`: alone trainable, it bears a rate that brings it down from 1.
    model.body.requires_grad_(False)
    settings = IBAU(lr=0.1, steps=20, rounds=4, search_steps=20, radius=5.0)
    repaired = settings.repair(model, data.images, data.labels)
    before, after = rates(model), rates(repaired.model)
    assert before[1] > 0.99
    assert after[1] < 0.2
    assert after[0] > before[0] - 0.05
    assert repaired.model.gain.item() < 0.3


def test_weights_change_and_running_statistics_do_not(data):
    model = small().train()
    model.head.weight.requires_grad_(False)
    state, images = copy.deepcopy(model.state_dict()), data.images.clone()
    repaired = QUICK.repair(model, data.images, data.labels)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.training and model.body.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(data.images, images)
    assert not any(module.training for module in repaired.model.modules())
    assert all(parameter.grad is None for parameter in repaired.model.parameters())
    for name, value in repaired.model.named_buffers():
        assert torch.equal(value, state[name])
    assert torch.equal(repaired.model.head.weight, model.head.weight)
    assert not torch.equal(repaired.model.head.bias, model.head.bias)
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    assert [parameter.requires_grad for parameter in repaired.model.parameters()] == wanted


def test_same_seed_same_bytes(data):
    before = torch.get_rng_state()
    first = QUICK.repair(small(), data.images, data.labels, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    again = QUICK.repair(small(), data.images, data.labels, seed=1)
    other = QUICK.repair(small(), data.images, data.labels, seed=2)
    assert first.log == again.log
    weights = [repaired.model.head.weight for repaired in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_the_log_counts_steps_and_rounds(data):
    settings = IBAU(steps=5, rounds=3, search_steps=None, batch_size=64, iterations=1)
    log = settings.repair(planted_classifier("patch"), data.images, data.labels).log
    assert len(log["losses"]) == 5
    assert len(log["norms"]) == len(log["fooled"]) == 3
    assert all(norm > 0 for norm in log["norms"]) and all(0 <= f <= 1 for f in log["fooled"])


def test_presets():
    assert IBAU.preset("fast") == IBAU.preset() == IBAU()
    paper = IBAU.preset("paper")
    assert (paper.rounds, paper.batch_size, paper.lr, paper.iterations) == (5, 100, 1e-3, 5)
    assert (paper.search_lr, paper.inner_lr, paper.penalty) == (10.0, 0.1, 1e-3)
    assert (paper.share, paper.search_steps, paper.radius) == (0.01, None, None)
    assert IBAU.preset("paper", steps=10).steps == 10
    assert IBAU().name == "i-bau"
    with pytest.raises(ValueError, match="preset"):
        IBAU.preset("slow")


def test_refused_settings(subtests):
    for wrong in [
        {"steps": 0},
        {"rounds": 0},
        {"steps": 2, "rounds": 3},
        {"batch_size": 1},
        {"lr": 0.0},
        {"search_steps": 0},
        {"search_lr": 0.0},
        {"radius": 0.0},
        {"penalty": -1.0},
        {"inner_lr": 0.0},
        {"inner_batch": 0},
        {"iterations": 0},
        {"share": 0.0},
        {"share": 1.5},
    ]:
        with subtests.test(wrong=wrong), pytest.raises(ValueError, match="expected"):
            IBAU(**wrong)


def test_refusals(data):
    images, labels, toy = data.images[:8], data.labels[:8], Quadratic()
    cases = [
        ((small(), images + 1, labels), r"\[0, 1\]"),
        ((small(), images[:1], labels[:1]), "at least 2"),
        ((small(), images, labels[:3]), "labels"),
        ((small(), images, labels + 10), "labels in 0"),
        ((small().requires_grad_(False), images, labels), "trainable"),
        ((lambda x: x, images, labels), "torch module"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            QUICK.repair(*arguments)
    for change in ({"lr": 0.0, "iterations": 1}, {"lr": 0.1, "iterations": 0}):
        with pytest.raises(ValueError, match="expected parameters"):
            hypergradient(toy.inner, toy.outer, toy.optimum, [toy.p], **change)
    with pytest.raises(ValueError, match="expected parameters"):
        hypergradient(toy.inner, toy.outer, toy.optimum, [], lr=0.1, iterations=1)
