"""Starved searches are seen by generators and by the detectors in feature space."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from defense_nc import Verdict
from defense_reverse import (
    BtiDbf,
    FeatureRE,
    MarginAscent,
    PairPerturbation,
    ReverseConfig,
    ReverseGenerator,
    UniversalPerturbation,
)
from wm_victim.toy_backdoors import planted_classifier, planted_images

CLASSES = 4
SHORT = ReverseConfig.preset("fast", width=2, depth=1, steps=16, batch_size=8, precision="float32")


class Cut(nn.Module):
    """A classifier in two parts, with something behind its head."""

    def __init__(self, model, behind=lambda y: y):
        super().__init__()
        self.model, self.behind = model, behind

    def features(self, images):
        return self.model.body[:3](images)

    def head(self, features):
        return self.behind(self.model.body[3:](features))

    def forward(self, images):
        return self.head(self.features(images))


class InPlace(Cut):
    """Normalises its images where they are."""

    def features(self, images):
        return super().features(images.sub_(0.1).add_(0.1))


@pytest.fixture(scope="module")
def data():
    return planted_images(24, num_classes=CLASSES)


def cut(kind=Cut, **more):
    return kind(planted_classifier("clean", num_classes=CLASSES), **more).eval()


def detectors():
    return {
        "together": ReverseGenerator(SHORT),
        "one by one": ReverseGenerator(
            ReverseConfig.preset("reference", width=2, depth=1, steps=4)
        ),
        "feature-re": FeatureRE.preset(width=2, depth=1, warmup_steps=1, steps=10, batch_size=8),
        "mm-bd": MarginAscent(starts=4, steps=5),
        "uap": UniversalPerturbation(batch_size=4, steps=5),
        "pairs": PairPerturbation(batch_size=4, steps=5, map_steps=5),
        "bti-dbf": BtiDbf.preset(width=2, depth=1, mask_steps=10, steps=10, batch_size=8),
    }


@pytest.mark.integration
def test_every_detector_sees_that_it_is_starved(data, subtests):
    def scan(detector, **behind):
        return detector.scan(cut(**behind), data.images, labels=data.labels, progress=False)

    for name, detector in detectors().items():
        with subtests.test(detector=name):
            report = scan(detector, behind=lambda y: (10 * y).round() / 10)
            assert report.verdict is Verdict.NOT_SCANNED and report.suspected == ()
            assert min(report.starved) > 0.9
            control = scan(detector)
            assert max(control.starved) < 0.1 and control.verdict is not Verdict.NOT_SCANNED


@pytest.mark.integration
def test_models_as_people_have_them(data, subtests):
    for name in ("together", "feature-re"):
        detector = detectors()[name]
        with subtests.test(detector=name):
            images = data.images.clone()
            plain = detector.scan(cut(), images, labels=data.labels, progress=False)
            changing = detector.scan(cut(InPlace), images, labels=data.labels, progress=False)
            assert torch.equal(images, data.images)
            assert len(changing.labels) == CLASSES
            with torch.inference_mode():
                inside = detector.scan(cut(), images.clone(), labels=data.labels, progress=False)
            assert inside == plain
            tiny = detector.scan(
                cut(behind=lambda y: 1e-4 * y), images, labels=data.labels, progress=False
            )
            assert "multiplied" in tiny.notes[0]
            with pytest.raises(ValueError, match="one tensor"):
                detector.scan(cut(behind=lambda y: (y,)), images, progress=False)
