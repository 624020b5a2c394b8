"""The channels that sleep go first, stay at exactly 0, and only validation images say when."""

import copy

import pytest
import torch
from torch import nn

from defense_reverse.mitigations import FinePruning
from defense_reverse.mitigations.channels import ChannelMask, fold, mean_activations
from wm_victim import build_classifier
from wm_victim.activations import record_outputs
from wm_victim.toy_backdoors import planted_images

LAYER = "1"


def constructed():
    """Four channels of known activity: 0.4, 0.1, 0.3 and 0.2 times the image's brightness.

    Only the first and the third are read: class 1 for bright images, class 0 for dark ones.
    """
    model = nn.Sequential(
        nn.Conv2d(1, 4, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    ).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([0.4, 0.1, 0.3, 0.2]).view(4, 1, 1, 1))
        model[0].bias.zero_()
        model[4].weight.copy_(torch.tensor([[0.0] * 4, [10.0, 0.0, 10.0, 0.0]]))
        model[4].bias.copy_(torch.tensor([0.0, -3.5]))
    return model


def shades(count=50):
    """Dark and bright images in turn."""
    images = torch.full((count, 1, 4, 4), 0.2)
    images[1::2] = 0.8
    return images, torch.arange(count) % 2


def test_mean_activations_computed_by_hand():
    images, _ = shades()
    found = mean_activations(constructed(), LAYER, images)
    wanted = torch.tensor([0.4, 0.1, 0.3, 0.2], dtype=torch.float64) * 0.5
    torch.testing.assert_close(found, wanted, atol=1e-7, rtol=0)
    # Before a ReLU it is the absolute value that counts; features work as well as maps.
    model = constructed()
    model[0].weight.data.neg_()
    torch.testing.assert_close(mean_activations(model, "0", images), wanted, atol=1e-7, rtol=0)
    torch.testing.assert_close(
        mean_activations(constructed(), "3", images), wanted, atol=1e-7, rtol=0
    )


def test_the_least_active_channels_go_and_the_stop_keeps_the_last_good_ones():
    """Channels 1 and 3 are read by nobody; without channel 2 bright images look dark."""
    images, labels = shades()
    mitigator = FinePruning.preset(steps=1, lr=1e-9, prune_step=0.25, layer=LAYER)
    repaired = mitigator.repair(constructed(), images, labels)
    assert repaired.log["pruned"] == [1, 3]  # in ascending order of activity
    # Nothing, one, two pruned: all right. Three: 0.8 * 0.4 * 10 is below 3.5, half are wrong.
    before = repaired.log["accuracies"]
    assert before[:3] == [1.0, 1.0, 1.0] and before[3] < 0.9 and len(before) == 4
    assert repaired.log["channels"] == 4


def test_accuracy_with_nothing_pruned_is_the_models_own():
    images, labels = shades()
    labels = torch.where(torch.arange(50) < 20, 1 - labels, labels)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(4))[:10]
    model = constructed()
    with torch.no_grad():
        own = (model(images[order]).argmax(1) == labels[order]).double().mean()
    choice = FinePruning()._prune(model, LAYER, images, labels, seed=4, progress=False)
    assert choice.accuracies[0] == float(own)
    assert not model[1]._forward_hooks


def test_the_stop_listens_to_the_validation_images_only():
    """The others may be labelled as they like: the choice is the same."""
    images, labels = shades()
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    judges, others = order[:10], order[10:]
    wrong = labels.clone()
    wrong[others] = 1 - wrong[others]
    settings = FinePruning.preset(prune_step=0.25)
    first, second = (
        settings._prune(constructed(), LAYER, images, given, seed=0, progress=False)
        for given in (labels, wrong)
    )
    assert first == second
    wrong = labels.clone()
    wrong[judges] = 1 - wrong[judges]
    third = settings._prune(constructed(), LAYER, images, wrong, seed=0, progress=False)
    assert third.accuracies[0] == 0


def test_one_channel_always_stays_and_all_steps_are_taken():
    assert FinePruning.preset(prune_step=1.0)._counts(4) == [0, 3]
    assert FinePruning.preset(prune_step=0.25)._counts(4) == [0, 1, 2, 3]
    assert FinePruning.preset(prune_step=0.01)._counts(8) == list(range(8))
    assert FinePruning.preset(prune_step=0.3)._counts(10) == [0, 3, 6, 9]


def test_the_tolerance_decides_how_far_it_goes():
    images, labels = shades()
    bold = FinePruning.preset(prune_step=0.25, tolerance=0.9)
    choice = bold._prune(constructed(), LAYER, images, labels, seed=0, progress=False)
    assert choice.pruned == (1, 3, 2)  # the last channel stays


@pytest.mark.parametrize("name", ["resnet10", "preactresnet10", "vgg16", "mobilenetv2"])
def test_pruned_channels_are_exactly_0_before_and_after_fine_tuning(name):
    model = build_classifier(name, num_classes=10, channels=3, image_size=32, width=8)
    images = torch.rand(24, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(24) % 10
    seen = []

    def look(module, inputs, output):
        seen.append(output.detach())

    # An untrained net is right by chance: with this tolerance all steps but the last are taken.
    settings = FinePruning.preset(steps=3, batch_size=8, prune_step=0.5, tolerance=0.999)
    choices = []
    choose = FinePruning._prune

    def spy(self, pruned, layer, *data, **options):
        choice = choose(self, pruned, layer, *data, **options)
        pruned.get_submodule(layer).register_forward_hook(look, prepend=False)
        choices.append(choice)
        return choice._replace(pruned=tuple(range(0, choice.channels, 2)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FinePruning, "_prune", spy)
        repaired = settings.repair(model, images, labels)
    layer = repaired.log["layer"]
    seen.clear()
    with torch.no_grad(), record_outputs(repaired.model, [layer]) as found:
        logits = repaired.model(images)
    assert float(found[layer][:, ::2].abs().max()) == 0
    assert float(found[layer][:, 1::2].abs().max()) > 0
    # A file of the weights alone gives the same answers, though its channels are no longer held.
    plain = build_classifier(name, num_classes=10, channels=3, image_size=32, width=8).eval()
    plain.load_state_dict(repaired.model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(plain(images), logits)
    again = copy.deepcopy(repaired.model).train()
    with torch.no_grad(), record_outputs(again, [layer]) as found:
        again(images)
    assert float(found[layer][:, ::2].abs().max()) == 0


def test_a_mask_holds_channels_of_maps_and_features_even_if_infinite():
    mask = ChannelMask(torch.tensor([True, False]))
    features = torch.tensor([[1.0, float("inf")]])
    assert mask(nn.Identity(), None, features).tolist() == [[1.0, 0.0]]
    assert mask(nn.Identity(), None, torch.ones(1, 2, 3, 3)).sum() == 9


def test_a_fold_keeps_every_answer_or_does_nothing():
    images, _ = shades(8)
    keep = torch.tensor([True, False, False, True])
    model = constructed()
    model[1].register_forward_hook(ChannelMask(keep))
    with torch.no_grad():
        before = model(images)
        assert fold(model, LAYER, keep, images)
        assert torch.equal(model(images), before)
    assert not model[4].weight[:, 1:3].any()
    # A second convolution mixes the channels: no column of the linear layer belongs to one.
    mixed = nn.Sequential(model[0], nn.ReLU(), nn.Conv2d(4, 4, 1), *constructed()[2:]).eval()
    mixed[1].register_forward_hook(ChannelMask(keep))
    state = copy.deepcopy(mixed.state_dict())
    assert not fold(mixed, "1", keep, images)
    assert all(torch.equal(state[name], value) for name, value in mixed.state_dict().items())
    assert len(mixed[1]._forward_hooks) == 1


def test_published_settings():
    paper = FinePruning.preset("paper")
    assert (paper.prune_step, paper.tolerance, paper.sgd.lr) == (0.01, 0.1, 0.01)
    sgd = paper.sgd
    assert (sgd.batch_size, sgd.schedule, sgd.weight_decay) == (256, "cosine", 5e-4)


def test_layers_that_cannot_be_pruned_are_refused():
    images, labels = shades(8)
    model = constructed()
    model[1].unused = nn.Conv2d(1, 1, 1)
    for layer, message in [("conv9", "expected a layer"), ("1.unused", "runs in the model")]:
        with pytest.raises(ValueError, match=message):
            FinePruning.preset(steps=1, layer=layer).repair(model, images, labels)
    flat = nn.Sequential(nn.Flatten(), nn.Unflatten(1, (4, 4)), nn.Flatten(), nn.Linear(16, 2))
    with pytest.raises(ValueError, match="maps"):
        FinePruning.preset(steps=1, layer="1").repair(flat, images, labels)
    digits = planted_images(8)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(768, 10))
    with pytest.raises(ValueError, match="convolutional maps"):
        FinePruning.preset(steps=1).repair(linear, digits.images, digits.labels)


def test_refused_settings(subtests):
    for wrong in [
        {"tolerance": 0.0},
        {"tolerance": 1.0},
        {"validation_share": 0.0},
        {"validation_share": 1.0},
        {"prune_step": 0.0},
        {"prune_step": 1.5},
    ]:
        with subtests.test(wrong=wrong), pytest.raises(ValueError, match="expected"):
            FinePruning.preset(**wrong)
