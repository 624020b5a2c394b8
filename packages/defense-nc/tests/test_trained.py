"""The whole way on trained networks: plant, scan, clean. Minutes, so only on request."""

import pytest

from defense_nc import NeuralCleanse, Unlearning, Verdict
from wm_inject import BadNetsTrigger
from wm_inject.core.plan import PoisonPlan
from wm_victim import (
    TrainConfig,
    accuracy,
    attack_success,
    build_classifier,
    defender_subset,
    load_dataset,
    train_classifier,
)

TARGET = 0


@pytest.fixture(scope="module")
def data():
    return load_dataset("digits", image_size=28)


def trained(data, **attack):
    model = build_classifier("wanet-mnist", num_classes=10, channels=1, image_size=28, seed=0)
    config = TrainConfig.preset("fast", epochs=12)
    train_classifier(model, data.train, config=config, progress=False, **attack)
    return model.eval()


@pytest.mark.slow
def test_a_trained_patch_backdoor_is_named_and_cleaned(data):
    trigger = BadNetsTrigger(image_size=28)
    plan = PoisonPlan(ratio=0.1, target=TARGET)
    model = trained(data, plan=plan, trigger=trigger)
    assert attack_success(model, data.test, trigger, target=TARGET) > 0.95
    known = defender_subset(data.train, count=300, seed=0)
    report = NeuralCleanse().scan(model, known.images, labels=known.labels, progress=False)
    assert report.suspected == (TARGET,), report.reason
    cleaned = (
        Unlearning.preset("nc")
        .repair(model, known.images, known.labels, triggers={TARGET: report.triggers[TARGET]})
        .model
    )
    assert attack_success(cleaned, data.test, trigger, target=TARGET) < 0.05
    assert accuracy(cleaned, data.test) > accuracy(model, data.test) - 0.02


@pytest.mark.slow
def test_nothing_is_named_in_a_trained_clean_classifier(data):
    model = trained(data)
    known = defender_subset(data.train, count=300, seed=0)
    report = NeuralCleanse().scan(model, known.images, labels=known.labels, progress=False)
    assert report.suspected == (), report.reason
    assert report.verdict in (Verdict.CLEAN, Verdict.INCONCLUSIVE)
