"""One planted model, one pre-trained generator and one scan of each kind, shared by the tests."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import nn

from defense_nc import ScanReport
from defense_reverse import ReverseConfig, ReverseGenerator, UNetGenerator, pretrain
from wm_inject import quantize
from wm_victim.toy_backdoors import planted_classifier, planted_images

K = 6  # classes
SIZE = 16
QUICK = ReverseConfig.preset(
    "fast",
    width=8,
    residual=False,
    pretrain_steps=150,
    steps=72,
    round_steps=9,
    score="l1",  # equation 5
    precision="float32",
)


# What the presets take: the output that needs no pre-training.
SCAN = replace(QUICK, residual=True)


def scan(model, images, config, **options) -> ScanReport:
    return ReverseGenerator(config).scan(model, images, progress=False, **options)


class Case(NamedTuple):
    """What the tests of a scan need."""

    model: nn.Module
    report: ScanReport


def planted(kind: str, target: int = 2) -> nn.Module:
    """A planted classifier whose channel shift is a real shortcut.

    The stock gate opens at a shift that costs more than the clean way to a label does. On grey
    images nothing but the trigger shifts blue against red, so the gate may listen more closely.
    """
    model = planted_classifier(kind, num_classes=K, image_size=SIZE, target=target)
    model.slope, model.threshold = 250.0, 0.03
    return model


@pytest.fixture(scope="session")
def quick() -> ReverseConfig:
    return QUICK


@pytest.fixture
def channel_model() -> nn.Module:
    return planted("channel")


@pytest.fixture(scope="session")
def data() -> tuple[torch.Tensor, torch.Tensor]:
    """Grey digits as RGB, and their labels."""
    digits = planted_images(128, num_classes=K, image_size=SIZE)
    grey = digits.images.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    return quantize(grey), digits.labels


@pytest.fixture(scope="session")
def start(data) -> UNetGenerator:
    return pretrain(data[0], config=QUICK)


@pytest.fixture(scope="session")
def backdoored(data) -> Case:
    model = planted("channel")
    return Case(model, scan(model, data[0], SCAN, labels=data[1]))


@pytest.fixture(scope="session")
def clean(data) -> Case:
    model = planted("clean")
    return Case(model, scan(model, data[0], SCAN, labels=data[1]))
