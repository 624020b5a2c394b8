"""What every mitigation needs: checks, and batches that are counted in steps."""

import copy

import pytest
import torch
from torch import nn

from defense_nc.batches import EndlessBatches, training_batches
from defense_nc.mitigations import check_repair, trainable


def order(seed=0):
    return torch.Generator().manual_seed(seed)


def test_every_row_comes_once_before_any_row_again(subtests):
    for count, size, steps in [(97, 32, 10), (10, 4, 5), (5, 64, 3)]:
        with subtests.test(count=count, size=size, steps=steps):
            parts = list(training_batches(count, size, steps, order()))
            assert len(parts) == steps
            # 97 = 3 * 32 + 1: the single row is left out of the pass
            a_pass = [*[size] * (count // size), count % size]
            a_pass = [length for length in a_pass if length > 1]
            lengths = [len(part) for part in parts]
            assert lengths == (a_pass * steps)[:steps]
            first = torch.cat(parts[: len(a_pass)])
            assert len(first.unique()) == len(first) == sum(a_pass)
            assert set(first.tolist()) <= set(range(count))


def test_endless_batches_continue_from_their_state():
    batches = EndlessBatches(7, 3, order())
    first = torch.cat([next(batches) for _ in range(7)])
    assert all(sorted(part.tolist()) == list(range(7)) for part in first.split(7))
    state = batches.state_dict()
    following = [next(batches).tolist() for _ in range(5)]
    again = EndlessBatches(7, 3, order(1))
    again.load_state_dict(state)
    assert [next(again).tolist() for _ in range(5)] == following


def test_passes_differ_and_the_seed_decides():
    first, again, other = (torch.cat(list(training_batches(8, 4, 4, order(s)))) for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[:8], first[8:])


def test_no_steps_are_no_batches():
    assert list(training_batches(8, 4, 0, order())) == []


def test_refused_batches(subtests):
    for wrong in [(1, 4, 2), (8, 1, 2), (8, 4, -1)]:
        with subtests.test(wrong=wrong), pytest.raises(ValueError, match="expected count >= 2"):
            training_batches(*wrong, order())


def test_the_check_counts_classes_and_changes_nothing():
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(48), nn.Dropout(), nn.Linear(48, 5)).train()
    model[1].weight.requires_grad_(False)
    state = copy.deepcopy(model.state_dict())
    images, labels = torch.rand(6, 3, 4, 4), torch.arange(6) % 5
    assert check_repair(model, images, labels) == 5
    assert model.training and model[3].weight.requires_grad and not model[1].weight.requires_grad
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert len(trainable(model)) == 3


def test_refusals():
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 5))
    images, labels = torch.rand(6, 3, 4, 4), torch.arange(6) % 5
    frozen = copy.deepcopy(model).requires_grad_(False)
    nan = copy.deepcopy(model)
    nan[1].weight.data.fill_(float("nan"))
    cases = [
        ((lambda x: x, images, labels), "torch module"),
        ((model, images[0], labels), "shape"),
        ((model, images.double(), labels), "float32"),
        ((model, images + 1, labels), r"\[0, 1\]"),
        ((model, images[:0], labels[:0]), "empty"),
        ((model, images[:1], labels[:1]), "at least 2"),
        ((model, images, labels[:3]), "labels"),
        ((model, images, labels.int()), "int64"),
        ((model, images, labels + 5), "labels in 0"),
        ((frozen, images, labels), "trainable"),
        ((nn.Conv2d(3, 2, 3), images, labels), "logits"),
        ((nan, images, labels), "finite"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            check_repair(*arguments)
