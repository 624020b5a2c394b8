"""Simulated clean models, for what is fitted to them and judged by them."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from defense_nc.verdict.calibrate import fit_calibration
from defense_nc.verdict.calibration import CleanModel
from defense_nc.verdict.model_info import ModelInfo

SUBJECT = ModelInfo(classes=10, image_size=32, channels=3, network="convolutional", images=500)


def _drawn(generator, count, noise):
    """Log scores of a clean model: a level and a spread of its own, and noise per label."""
    level = 3.5 + 0.2 * generator.normal()
    spread = 0.2 * math.exp(0.3 * generator.normal())
    values = {
        "normal": lambda: generator.normal(size=count),
        "heavy": lambda: generator.standard_t(4, size=count) / math.sqrt(2),
        "skewed": lambda: -np.log(generator.exponential(size=count)) / 1.28,
    }[noise]()
    return torch.from_numpy(level + spread * values)


def _simulated(seed, counts=(10,), noise="normal", models=40):
    generator = np.random.default_rng(seed)
    each = [
        CleanModel(
            tuple(_drawn(generator, count, noise).tolist()),
            replace(SUBJECT, classes=count),
            "noise",
            "none",
        )
        for count in counts
        for _ in range(models)
    ]
    return fit_calibration(each, detector="test", preset="tiny", settings={"betas": (0.5, 0.9)})


@pytest.fixture(scope="session")
def subject():
    """What the simulated models are said to be."""
    return SUBJECT


@pytest.fixture(scope="session")
def drawn():
    """Draws the log scores of one clean model."""
    return _drawn


@pytest.fixture(scope="session")
def simulated():
    """Fits a calibration to simulated clean models."""
    return _simulated


@pytest.fixture(scope="session")
def calibration():
    """A calibration of forty simulated clean models of ten classes."""
    return _simulated(0)
