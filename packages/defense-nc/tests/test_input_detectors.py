"""Input detectors: thresholds, the ROC area, STRIP's entropy, and the filter's neurons."""

import copy
import math

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import nn

from defense_nc.input_filters.detector import CalibratedDetector, auroc, threshold_at
from defense_nc.input_filters.input_filter import InputFilter, excitement
from defense_nc.input_filters.strip import Strip, strip_entropy
from defense_nc.trigger import put_trigger
from wm_inject.core.images import quantize, to_pixels
from wm_victim import build_classifier
from wm_victim.activations import last_linear, penultimate
from wm_victim.toy_backdoors import planted_classifier, planted_images, planted_trigger

TARGET = 3


@pytest.fixture(scope="module")
def data():
    return planted_images(300)


@pytest.fixture(scope="module")
def fresh():
    return planted_images(200, seed=1)


class Constant(nn.Module):
    """The same logits for every image."""

    def __init__(self, logits):
        super().__init__()
        self.register_buffer("logits", torch.tensor(logits))

    def forward(self, images):
        return self.logits.expand(len(images), -1)


class Watched(nn.Module):
    """A digit classifier with a penultimate neuron of its own, the last, for the planted patch."""

    def __init__(self):
        super().__init__()
        planted = planted_classifier("patch")
        self.body, old = planted.body[:-1], planted.body[-1]
        self.register_buffer("template", planted.template)
        self.head = nn.Linear(old.in_features + 1, old.out_features)
        with torch.no_grad():
            self.head.weight.zero_()
            self.head.weight[:, :-1] = old.weight
            self.head.weight[TARGET, -1] = 2.0
            self.head.bias.copy_(old.bias)
        self.eval()

    def forward(self, images):
        drive = ((images - 0.5) * self.template).sum(dim=(1, 2, 3))
        # So loud that the bright corner's own features come after it.
        gate = 50 * torch.sigmoid(10 * (drive - 0.4))
        return self.head(torch.cat([self.body(images), gate[:, None]], dim=1))


# --- threshold and ROC area ---------------------------------------------------------------------


def test_the_threshold_flags_the_wanted_share_of_clean_scores(subtests):
    for rate in [0.0, 0.01, 0.05, 0.29, 0.5, 0.99]:
        with subtests.test(rate=rate):
            scores = torch.randperm(100, generator=torch.Generator().manual_seed(0)).double()
            assert int((scores > threshold_at(scores, rate)).sum()) == round(100 * rate)


def test_ties_never_flag_more_than_the_share():
    assert not bool((torch.ones(50) > threshold_at(torch.ones(50), 0.2)).any())
    scores = torch.tensor([0.0, 1.0, 1.0, 1.0, 2.0])
    assert int((scores > threshold_at(scores, 0.5)).sum()) <= 2


def test_auroc_equals_that_of_scikit_learn(subtests):
    for levels in [3, 10, 1000]:
        with subtests.test(levels=levels):
            generator = torch.Generator().manual_seed(levels)
            scores = torch.randint(levels, (200,), generator=generator).double()
            truths = torch.rand(200, generator=generator) < 0.3
            assert auroc(scores, truths) == pytest.approx(roc_auc_score(truths, scores), abs=1e-12)


def test_auroc_of_known_orders():
    truths = torch.tensor([False, False, True, True])
    assert auroc(torch.tensor([1.0, 2.0, 3.0, 4.0]), truths) == 1
    assert auroc(torch.tensor([4.0, 3.0, 2.0, 1.0]), truths) == 0
    assert auroc(torch.ones(4), truths) == 0.5
    assert auroc(torch.tensor([1.0, 3.0, 2.0, 4.0]), truths) == 0.75


def test_refused_scores():
    some, truths = torch.rand(4), torch.tensor([True, False, True, False])
    cases = [
        (lambda: auroc([0.1, 0.2], truths), "floating tensor"),
        (lambda: auroc(some.long(), truths), "floating tensor"),
        (lambda: auroc(some[:0], truths[:0]), "shape"),
        (lambda: auroc(some * math.nan, truths), "finite"),
        (lambda: auroc(some, truths.long()), "bool"),
        (lambda: auroc(some, truths[:2]), "shape"),
        (lambda: auroc(some, torch.ones(4, dtype=torch.bool)), "4 and 0"),
        (lambda: threshold_at(some[None], 0.1), "shape"),
        (lambda: threshold_at(some, 1.0), "false_positive_rate"),
        (lambda: threshold_at(some, -0.1), "false_positive_rate"),
        (lambda: CalibratedDetector("x", math.inf, (3, 8, 8), torch.sum), "finite threshold"),
    ]
    for refuses, message in cases:
        with pytest.raises(ValueError, match=message):
            refuses()


# --- STRIP --------------------------------------------------------------------------------------


def test_entropy_of_a_sure_classifier_is_none_and_of_an_undecided_one_all(data):
    images, overlays = data.images[:5], data.images[5:12]
    sure, undecided = Constant([0.0, 1e4, 0.0]), Constant([2.0] * 8)
    assert torch.equal(strip_entropy(sure, images, overlays), torch.zeros(5, dtype=torch.float64))
    assert strip_entropy(undecided, images, overlays).tolist() == pytest.approx([3.0] * 5)


def test_entropy_is_the_mean_over_saturating_sums_in_eight_bits(data):
    class Recorder(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model, self.seen = model, []

        def forward(self, images):
            self.seen.append(images)
            return self.model(images)

    model = Recorder(planted_classifier("patch", target=TARGET))
    images, overlays = data.images[:3], data.images[3:7]
    entropy = strip_entropy(model, images, overlays, batch_size=5)
    seen = torch.cat(model.seen)
    wanted = [
        torch.from_numpy((to_pixels(a[None]).astype(int) + to_pixels(b[None])).clip(0, 255))
        for a in images
        for b in overlays
    ]
    mixed = torch.cat(wanted).permute(0, 3, 1, 2).float() / 255
    assert torch.equal(quantize(mixed), seen)
    p = model.model(mixed).double().softmax(1)
    bits = -(p * p.clamp(min=1e-300).log2()).sum(1)
    assert torch.allclose(bits.view(3, 4).mean(1), entropy, atol=1e-6)
    assert bool((entropy >= 0).all()) and bool((entropy <= math.log2(10)).all())


@pytest.mark.integration
def test_strip_tells_triggered_images_from_clean_ones(data, fresh):
    model = planted_classifier("patch", target=TARGET)
    detector = Strip(overlays=16).calibrate(model, data.images)
    scores = torch.cat(
        [detector.score(fresh.images), detector.score(planted_trigger("patch")(fresh.images))]
    )
    truths = torch.arange(400) >= 200
    assert auroc(scores, truths) > 0.99
    decided = torch.cat(
        [detector.decide(fresh.images), detector.decide(planted_trigger("patch")(fresh.images))]
    )
    assert float(decided[:200].double().mean()) < 0.06
    assert float(decided[200:].double().mean()) > 0.95


def test_strip_flags_the_wanted_share_of_its_calibration_images(data):
    model = planted_classifier("patch", target=TARGET)
    strip = Strip(overlays=8, calibration=100, false_positive_rate=0.07)
    detector = strip.calibrate(model, data.images, seed=5)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(5))
    used = data.images[order[8:108]]
    assert int(detector.decide(used).sum()) == 7
    assert detector.log["images"] == 100
    assert detector.log["mean_entropy"] == pytest.approx(-float(detector.score(used).mean()))


def test_overlays_are_seeded_and_an_image_scores_the_same_in_any_batch(data, fresh):
    model = planted_classifier("patch", target=TARGET)
    strip = Strip(overlays=4, calibration=50)
    before = torch.get_rng_state()
    first, again, other = (strip.calibrate(model, data.images, seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    images = fresh.images[:9]
    assert first.threshold == again.threshold
    assert torch.equal(first.score(images), again.score(images))
    assert not torch.equal(first.score(images), other.score(images))
    alone = torch.cat([first.score(images[i : i + 1]) for i in range(9)])
    assert torch.allclose(alone, first.score(images), atol=1e-5)


# --- the neurons and the input filter -----------------------------------------------------------


def test_activations_are_what_the_head_reads(data):
    model = build_classifier("resnet10", num_classes=10, channels=3, image_size=16, width=8).eval()
    found = penultimate(model, data.images[:10], batch_size=4)
    with torch.no_grad():
        wanted = torch.cat([model.features(part) for part in data.images[:10].split(4)])
    assert torch.equal(found, wanted)
    assert not model.head._forward_pre_hooks
    assert last_linear(model) is model.head
    assert last_linear(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))).in_features == 3


def test_the_trigger_excites_its_own_neuron_most(data):
    model = Watched()
    gain = excitement(model, data.images, planted_trigger("patch")(data.images))
    assert int(gain.argmax()) == len(gain) - 1
    assert torch.equal(excitement(model, data.images, data.images), torch.zeros_like(gain))


def test_the_filter_tells_triggered_images_from_clean_ones(data, fresh):
    trigger = planted_trigger("patch")
    filter_ = InputFilter(share=1e-3, false_positive_rate=0.05)
    detector = filter_.calibrate(Watched(), data.images, triggers={TARGET: trigger})
    assert (detector.log["label"], detector.log["neurons"]) == (TARGET, [1152])
    assert int(detector.decide(data.images).sum()) <= 15
    assert bool(detector.decide(trigger(fresh.images)).all())
    scores = torch.cat([detector.score(fresh.images), detector.score(trigger(fresh.images))])
    assert auroc(scores, torch.arange(400) >= 200) == 1
    # The published share is one neuron in a hundred.
    wide = InputFilter().calibrate(Watched(), data.images, triggers={TARGET: trigger})
    assert len(wide.log["neurons"]) == round(0.01 * 1153)
    alone = penultimate(Watched(), fresh.images)[:, wide.log["neurons"]].double().mean(1)
    assert torch.allclose(wide.score(fresh.images), alone)


def test_the_given_model_and_trigger_come_back_as_they_were(data):
    model, trigger = Watched().train(), planted_trigger("patch").train()
    model.head.weight.requires_grad_(False)
    state = copy.deepcopy(model.state_dict())
    for settings in (Strip(overlays=4, calibration=20), InputFilter()):
        detector = settings.calibrate(model, data.images[:50], triggers={TARGET: trigger})
        detector.decide(data.images[:5])
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.training and model.body.training and trigger.training
    assert not model.head.weight.requires_grad and model.head.bias.requires_grad
    assert not model.head._forward_pre_hooks


def test_presets():
    assert Strip.preset("fast") == Strip.preset() == Strip()
    assert (Strip.preset("paper").overlays, Strip().false_positive_rate) == (100, 0.01)
    assert Strip.preset("paper", overlays=3).overlays == 3
    assert InputFilter.preset("paper", share=0.5) == InputFilter(share=0.5)
    assert (Strip().name, InputFilter().name) == ("strip", "input-filter")
    for kind in (Strip, InputFilter):
        with pytest.raises(ValueError, match="preset"):
            kind.preset("slow")


def test_refused_settings(subtests):
    for kind, wrong in [
        (Strip, {"overlays": 0}),
        (Strip, {"calibration": 0}),
        (Strip, {"batch_size": 0}),
        (Strip, {"false_positive_rate": 1.0}),
        (InputFilter, {"share": 0.0}),
        (InputFilter, {"share": 1.5}),
        (InputFilter, {"false_positive_rate": -0.1}),
    ]:
        with subtests.test(kind=kind, wrong=wrong), pytest.raises(ValueError, match="expected"):
            kind(**wrong)


def test_refused_data(data):
    images, trigger, model = data.images[:40], planted_trigger("patch"), Watched()
    watch = {TARGET: trigger}
    strip = Strip(overlays=4, calibration=10)
    detector = strip.calibrate(model, images)

    def smaller(batch, *, ids=None, target=None):
        return batch[:, :, :8]

    cases = [
        (lambda: strip.calibrate(model, images[:4]), "more than 4"),
        (lambda: strip.calibrate(model, images + 1), r"\[0, 1\]"),
        (lambda: strip.calibrate(nn.Flatten(0, 1), images), "logits"),
        (lambda: strip.calibrate(lambda x: x, images), "torch module"),
        (lambda: strip_entropy(model, images, images[:, :, :8]), "overlays"),
        (lambda: strip_entropy(model, images, images[:0]), "overlays"),
        (lambda: strip_entropy(model, images, images, batch_size=0), "batch_size"),
        (lambda: detector.score(images[:0]), "empty"),
        (lambda: detector.decide(images[:, :, :8]), "size|shape|16"),
        (lambda: InputFilter().calibrate(model, images), "one reversed trigger, got 0"),
        (
            lambda: InputFilter().calibrate(model, images, triggers={1: trigger, 2: trigger}),
            "one reversed trigger, got 2",
        ),
        (lambda: InputFilter().calibrate(model, images.double(), triggers=watch), "float32"),
        (lambda: InputFilter().calibrate(model, images, triggers={0: 5}), "expected a trigger"),
        (lambda: InputFilter().calibrate(model, images, triggers={0: smaller}), "triggered images"),
        (lambda: InputFilter().calibrate(nn.Flatten(), images, triggers=watch), "linear layer"),
        (lambda: penultimate(nn.Linear(16, 2), images), "reads"),
        (lambda: penultimate(model, images[0]), "shape"),
        (lambda: excitement(model, images, images + 1), r"\[0, 1\]"),
        (lambda: last_linear("model"), "torch module"),
        (lambda: put_trigger(trigger, images[:, :, :8]), "expected"),
    ]
    for refuses, message in cases:
        with pytest.raises(ValueError, match=message):
            refuses()
