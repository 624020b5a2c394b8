"""The discriminant filter: known directions, planted models, and its file for services."""

import copy

import numpy as np
import onnx
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import nn

from defense_nc import DiscriminantFilter, InputFilter, Strip, auroc, export_filter
from defense_nc.input_filters.detector import conformal_threshold
from defense_nc.input_filters.feature_score import FeatureScore
from wm_inject import to_onnx
from wm_inject.core.images import to_pixels
from wm_inject.runtime import Detector, Scanner
from wm_victim import build_classifier
from wm_victim.activations import penultimate
from wm_victim.loading.onnx_module import IoFormat, OnnxNet
from wm_victim.loading.onnx_simplify import simplify
from wm_victim.toy_backdoors import planted_classifier, planted_images, planted_trigger

TARGET = 3


@pytest.fixture(scope="module")
def data():
    return planted_images(300)


@pytest.fixture(scope="module")
def fresh():
    return planted_images(200, seed=1)


@pytest.fixture(scope="module")
def model():
    """A network of convolutions whose last linear layer reads 64 numbers."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build_classifier(
            "resnet10", num_classes=10, channels=3, image_size=16, width=8
        ).eval()


def features(model, images):
    return penultimate(model, images).double().numpy()


def test_the_direction_is_fishers(model, data):
    """Against scikit-learn's discriminant with the same shrinkage, on the same half."""
    trigger = planted_trigger("patch")
    found = DiscriminantFilter(shrinkage=0.3).calibrate(
        model, data.images, triggers={TARGET: trigger}, seed=5
    )
    order = torch.randperm(300, generator=torch.Generator().manual_seed(5))
    half = data.images[order[::2]]
    clean, triggered = features(model, half), features(model, trigger(half))
    lda = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.3)
    # Its covariance is scaled to unit variances before it is shrunk; ours is shrunk as it is.
    centred = np.concatenate([clean - clean.mean(0), triggered - triggered.mean(0)])
    covariance = centred.T @ centred / len(centred)
    mixed = 0.7 * covariance + 0.3 * np.trace(covariance) / len(covariance) * np.eye(
        len(covariance)
    )
    want = np.linalg.solve(mixed, triggered.mean(0) - clean.mean(0))
    got = found.scorer.weight.numpy()
    assert np.dot(got, want) / np.linalg.norm(got) / np.linalg.norm(want) > 1 - 1e-9
    lda.fit(np.concatenate([clean, triggered]), [0] * 150 + [1] * 150)
    both = lda.decision_function(features(model, data.images))
    assert np.corrcoef(both, found.score(data.images).numpy())[0, 1] > 0.9


def test_clean_images_score_nought_and_triggered_ones_one(model, data):
    trigger = planted_trigger("patch")
    found = DiscriminantFilter().calibrate(model, data.images, triggers={TARGET: trigger}, seed=1)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    first, second = data.images[order[::2]], data.images[order[1::2]]
    assert float(found.score(first).mean()) == pytest.approx(0, abs=1e-4)
    assert float(found.score(trigger(first)).mean()) == pytest.approx(1, abs=1e-4)
    # The threshold comes from the half that the direction has not seen.
    assert int(found.decide(second).sum()) == int(0.05 * (len(second) + 1)) - 1
    assert found.log == {"label": TARGET, "images": 150, "false_positive_rate": 0.05}


def test_it_tells_triggered_images_from_clean_ones(data, fresh):
    trigger, model = planted_trigger("patch"), planted_classifier("patch")
    found = DiscriminantFilter(false_positive_rate=0.02).calibrate(
        model, data.images, triggers={TARGET: trigger}
    )
    scores = torch.cat([found.score(fresh.images), found.score(trigger(fresh.images))])
    assert auroc(scores, torch.arange(400) >= 200) > 0.99
    assert float(found.decide(fresh.images).double().mean()) <= 0.08


def test_model_and_trigger_come_back_as_they_were(model, data):
    state, trigger = copy.deepcopy(model.state_dict()), planted_trigger("patch").train()
    found = DiscriminantFilter().calibrate(model, data.images, triggers={TARGET: trigger})
    found.scorer.network()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert trigger.training and model(data.images[:2]).shape == (2, 10)


def test_the_conformal_threshold_holds_its_rate_on_new_scores():
    """Over many draws: the share of new scores above it is k / (N + 1) on average, never more."""
    generator = torch.Generator().manual_seed(0)
    for count, rate in ((19, 0.05), (50, 0.05), (199, 0.01), (150, 0.5)):
        draws = torch.randn(2000, count + 1, generator=generator, dtype=torch.float64)
        above = [conformal_threshold(row[:-1], rate) < float(row[-1]) for row in draws]
        expected = int(rate * (count + 1) + 1e-9) / (count + 1)
        assert expected <= rate
        assert sum(above) / 2000 == pytest.approx(expected, abs=4 * (rate / 2000) ** 0.5)
    for scores, rate in ((torch.rand(18), 0.05), (torch.rand(0), 0.05), (torch.rand(50), 0.0)):
        with pytest.raises(ValueError, match="expected scores"):
            conformal_threshold(scores, rate)


@pytest.mark.integration
@pytest.mark.parametrize("kind", [DiscriminantFilter, InputFilter])
def test_the_file_decides_as_the_filter_does(model, data, fresh, tmp_path, kind):
    trigger = planted_trigger("patch")
    found = kind(false_positive_rate=0.05).calibrate(model, data.images, triggers={TARGET: trigger})
    path = tmp_path / "filter.onnx"
    parity = export_filter(found, data.images[:4], path)
    assert parity.max_rel < 1e-4
    images = torch.cat([fresh.images, trigger(fresh.images)])
    images = torch.from_numpy(to_pixels(images)).permute(0, 3, 1, 2).float() / 255
    scan = Scanner(path)(to_pixels(images))
    want = found.score(images).numpy()
    assert np.abs(scan.scores["filter"] - want).max() < 1e-4 * np.abs(want).max()
    sure = np.abs(want - found.threshold) > 1e-3 * np.abs(want).max()
    assert (scan.flagged == found.decide(images).numpy())[sure].all() and sure.mean() > 0.9
    detector = Detector(path)
    assert detector.false_positive_rate == 0.05
    assert detector.looks_for == f"a reversed trigger of label {TARGET}"
    assert detector.model.metadata["kind"] == "input-filter"


@pytest.mark.integration
def test_a_filter_on_an_imported_graph_is_exported(data, tmp_path):
    """Sizes pass through tensors there, which torch's newer exporter does not take."""
    path = tmp_path / "victim.onnx"
    model = build_classifier("resnet10", num_classes=10, channels=3, image_size=16, width=8).eval()
    to_onnx(model, data.images[:4], path, traced=True)
    simplified = simplify(onnx.load(str(path)), image="image", output="output")
    imported = OnnxNet(simplified, IoFormat(3, 16)).eval()
    input_filter = InputFilter().calibrate(
        imported, data.images, triggers={TARGET: planted_trigger("patch")}
    )
    parity = export_filter(input_filter, data.images[:4], tmp_path / "filter.onnx")
    assert parity.max_rel < 1e-4
    assert Scanner(tmp_path / "filter.onnx")(to_pixels(data.images[:5])).flagged.shape == (5,)


def test_only_filters_are_exported(model, data, tmp_path):
    strip = Strip(overlays=2, calibration=10).calibrate(model, data.images[:40])
    with pytest.raises(ValueError, match="expected a calibrated input filter, got strip"):
        export_filter(strip, data.images[:4], tmp_path / "f.onnx")
    with pytest.raises(ValueError, match="expected a calibrated input filter, got str"):
        export_filter("filter", data.images[:4], tmp_path / "f.onnx")
    found = InputFilter().calibrate(model, data.images, triggers={TARGET: planted_trigger("patch")})
    with pytest.raises(ValueError, match="expected"):
        export_filter(found, data.images[:4, :, :8], tmp_path / "f.onnx")


def test_a_model_that_goes_on_after_its_linear_layer_has_no_file(data, tmp_path):
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Flatten(), nn.Linear(768, 10))

        def forward(self, images):
            return torch.cat([self.body(images), images.flatten(1)[:, :1]], dim=1)

    score = FeatureScore(Scaled(), torch.ones(768))
    with pytest.raises(ValueError, match="ends in its last linear layer"):
        score.network()(data.images[:2])
    with pytest.raises(ValueError, match="expected weights of shape"):
        FeatureScore(Scaled(), torch.ones(3))


def test_presets_and_refusals(model, data):
    assert DiscriminantFilter.preset("paper", shrinkage=0.5) == DiscriminantFilter(shrinkage=0.5)
    assert DiscriminantFilter().name == "discriminant-filter"
    trigger = planted_trigger("patch")

    def unchanged(images, *, ids=None, target=None):
        return images

    for call, told in (
        (lambda: DiscriminantFilter.preset("slow"), "preset"),
        (lambda: DiscriminantFilter(shrinkage=0.0), "shrinkage"),
        (lambda: DiscriminantFilter(false_positive_rate=1.0), "false_positive_rate"),
        (lambda: DiscriminantFilter().calibrate(model, data.images), "one reversed trigger, got 0"),
        (
            lambda: DiscriminantFilter().calibrate(model, data.images[:39], triggers={0: trigger}),
            "at least 40 images, got 39",
        ),
        (
            lambda: DiscriminantFilter().calibrate(model, data.images, triggers={0: unchanged}),
            "moves the classifier's activations",
        ),
    ):
        with pytest.raises(ValueError, match=told):
            call()
