"""Neuron pruning silences what the reversed trigger excites, and no more than it must."""

import copy

import pytest
import torch
from torch import nn

from defense_nc.mitigations import NeuronPruning
from wm_inject.core.images import quantize
from wm_victim import build_classifier
from wm_victim.activations import penultimate
from wm_victim.toy_backdoors import planted_classifier, planted_images, planted_trigger

TARGET = 3


@pytest.fixture(scope="module")
def data():
    return planted_images(300)


class Watched(nn.Module):
    """A digit classifier with some penultimate neurons of their own for the planted patch."""

    def __init__(self, targets=(TARGET,), redundant=3):
        super().__init__()
        planted = planted_classifier("patch")
        self.body = planted.body[:-1]
        self.register_buffer("template", planted.template)
        old = planted.body[-1]
        self.redundant, self.first = redundant, old.in_features
        self.head = nn.Linear(old.in_features + redundant, old.out_features)
        with torch.no_grad():
            self.head.weight.zero_()
            self.head.weight[:, : self.first] = old.weight
            for target in targets:
                self.head.weight[target, self.first :] = 2.0
            self.head.bias.copy_(old.bias)
        self.eval()

    def forward(self, images):
        drive = ((images - 0.5) * self.template).sum(dim=(1, 2, 3))
        # The gates open one after the other, so that they are excited by different amounts.
        late = 0.4 + 0.1 * torch.arange(self.redundant)
        # So loud that the bright corner's own features come after them.
        gates = 50 * torch.sigmoid(10 * (drive[:, None] - late))
        return self.head(torch.cat([self.body(images), gates], dim=1))


def rates(model, data, target=TARGET):
    others = data.images[data.labels != target]
    with torch.no_grad():
        clean = (model(data.images).argmax(1) == data.labels).double().mean()
        stamped = quantize(planted_trigger("patch")(others))
        attack = (model(stamped).argmax(1) == target).double().mean()
    return float(clean), float(attack)


def test_the_planted_neurons_go_and_nothing_else(data):
    model = Watched()
    repaired = NeuronPruning().repair(
        model, data.images, data.labels, triggers={TARGET: planted_trigger("patch")}
    )
    held_out = planted_images(500, seed=1)
    before, after = rates(model, held_out), rates(repaired.model, held_out)
    assert before[1] > 0.99
    assert after[1] < 0.05
    assert after[0] > before[0] - 0.01
    (entry,) = repaired.log["labels"]
    first = model.first
    assert set(entry["neurons"]) == {first, first + 1, first + 2}
    assert entry["label"] == TARGET
    assert entry["success"][0] > 0.99 and entry["success"][1] <= 0.05
    assert (repaired.log["pruned"], repaired.log["neurons"]) == (3, first + 3)
    # Largest difference first.
    stamped = quantize(planted_trigger("patch")(data.images[data.labels != TARGET]))
    clean = data.images[data.labels != TARGET]
    gain = penultimate(model, stamped).mean(0) - penultimate(model, clean).mean(0)
    assert gain[entry["neurons"]].tolist() == sorted(gain[entry["neurons"]].tolist(), reverse=True)


def test_pruned_neurons_count_for_nothing_and_the_others_as_before(data):
    model = Watched()
    repaired = NeuronPruning().repair(
        model, data.images, data.labels, triggers={TARGET: planted_trigger("patch")}
    )
    gone = repaired.log["labels"][0]["neurons"]
    rest = [column for column in range(model.first + 3) if column not in gone]
    assert not bool(repaired.model.head.weight[:, gone].any())
    assert torch.equal(repaired.model.head.weight[:, rest], model.head.weight[:, rest])
    assert torch.equal(repaired.model.head.bias, model.head.bias)
    low, high = repaired.log["accuracy"]
    assert low == pytest.approx(rates(model, data)[0])
    assert high == pytest.approx(rates(repaired.model, data)[0])


def test_a_trigger_that_does_not_work_prunes_nothing(data):
    model = Watched()
    wrong = {1: planted_trigger("pattern")}
    repaired = NeuronPruning(success_rate=0.5).repair(
        model, data.images, data.labels, triggers=wrong
    )
    assert repaired.log["pruned"] == 0
    assert torch.equal(repaired.model.head.weight, model.head.weight)


def test_the_cap_holds_for_all_labels_together(data):
    # The clean part carries the label by itself: no number of neurons stops this "trigger".
    def nothing(images, *, ids=None, target=None):
        return images

    settings = NeuronPruning(cap=0.01, success_rate=0.0)
    triggers = {5: nothing, 2: nothing}
    repaired = settings.repair(Watched(), data.images, data.labels, triggers=triggers)
    assert repaired.log["pruned"] <= int(0.01 * repaired.log["neurons"])
    assert [entry["label"] for entry in repaired.log["labels"]] == [2, 5]
    both = [neuron for entry in repaired.log["labels"] for neuron in entry["neurons"]]
    assert len(both) == len(set(both)) == repaired.log["pruned"]


def test_the_given_model_stays_bit_identical_and_the_same_again(data):
    model = build_classifier("resnet10", num_classes=10, channels=3, image_size=16, width=8)
    model.head.bias.requires_grad_(False)
    state = copy.deepcopy(model.state_dict())
    triggers = {TARGET: planted_trigger("patch").train()}
    first, again = (
        NeuronPruning(success_rate=0.0).repair(model, data.images, data.labels, triggers=triggers)
        for _ in range(2)
    )
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.training and triggers[TARGET].training
    assert not model.head.bias.requires_grad and model.head.weight.requires_grad
    assert not first.model.training and not first.model.body.training
    assert not model.head._forward_pre_hooks and not first.model.head._forward_pre_hooks
    assert first.log == again.log
    assert torch.equal(first.model.head.weight, again.model.head.weight)


def test_presets_and_refused_settings():
    assert NeuronPruning.preset("paper") == NeuronPruning.preset() == NeuronPruning()
    assert (NeuronPruning().cap, NeuronPruning().name) == (0.3, "neuron-pruning")
    assert NeuronPruning.preset("fast", cap=0.1).cap == 0.1
    with pytest.raises(ValueError, match="preset"):
        NeuronPruning.preset("slow")
    for wrong in ({"cap": 0.0}, {"cap": 1.1}, {"success_rate": 1.0}, {"success_rate": -0.1}):
        with pytest.raises(ValueError, match="expected"):
            NeuronPruning(**wrong)


def test_refusals(data):
    images, labels, trigger = data.images[:8], data.labels[:8], planted_trigger("patch")
    ones = torch.full_like(labels, 1)
    cases = [
        ((Watched(), images, labels, None), "at least one label"),
        ((Watched(), images, labels, {}), "at least one label"),
        ((Watched(), images, labels, {10: trigger}), "labels in 0 .. 9"),
        ((Watched(), images, labels, {"1": trigger}), "labels in 0 .. 9"),
        ((Watched(), images, labels, {0: 5}), "expected a trigger"),
        ((Watched(), images, ones, {1: trigger}), "other classes than 1"),
        ((Watched(), images + 1, labels, {0: trigger}), r"\[0, 1\]"),
        ((Watched(), images, labels + 10, {0: trigger}), "labels in 0"),
        ((Watched(), images[:1], labels[:1], {0: trigger}), "at least 2"),
        # Its gate adds to the logits behind the last linear layer.
        ((planted_classifier("patch").requires_grad_(True), images, labels, {0: trigger}), None),
        ((lambda x: x, images, labels, {0: trigger}), "torch module"),
    ]
    for (model, pictures, truths, triggers), message in cases:
        if message is None:
            with torch.no_grad():
                model.added[0], model.threshold = 1e6, -1.0
            message = "last linear layer"
        with pytest.raises(ValueError, match=message):
            NeuronPruning().repair(model, pictures, truths, triggers=triggers)
