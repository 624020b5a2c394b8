from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from defense_nc import UnlearnConfig
from defense_reverse import mitigate
from wm_inject import quantize

TARGET = 2


def success(model, images, labels):
    others = labels != TARGET
    with torch.no_grad():
        return float((model(quantize(images[others])).argmax(1) == TARGET).float().mean())


def test_cleaning_removes_the_backdoor_and_leaves_the_model_alone(backdoored, data):
    model, trigger = backdoored.model, backdoored.report.triggers[TARGET]
    images, labels = data
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        triggered = trigger(images)
    assert success(model, triggered, labels) >= 0.95
    # the planted gate is one number away from 0: the paper's rate, made for real networks, is small
    config = replace(UnlearnConfig.preset("reverse"), lr=3e-3)
    cleaned = mitigate(model, trigger, images, labels, config=config)
    assert success(cleaned, triggered, labels) < 0.2
    with torch.no_grad():
        before, after = (
            (net(images).argmax(1) == labels).float().mean() for net in (model, cleaned)
        )
    assert after >= before - 0.05
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert cleaned is not model and not cleaned.training


def test_the_default_is_the_papers_recipe(backdoored, data):
    images, labels = data
    trigger = backdoored.report.triggers[TARGET]
    default, paper = (
        mitigate(backdoored.model, trigger, images, labels, config=config)
        for config in (None, UnlearnConfig.preset("reverse"))
    )
    for a, b in zip(default.parameters(), paper.parameters(), strict=True):
        assert torch.equal(a, b)
    recipe = UnlearnConfig.preset("reverse")
    assert (recipe.lr, recipe.momentum, recipe.epochs) == (1e-3, 0.9, 10)
    assert recipe.append and recipe.trigger_share == 1


def test_bad_input_is_refused(backdoored, data):
    images, labels = data
    trigger = backdoored.report.triggers[TARGET]
    for broken in (images[:0], images[0], images.double(), images + 1):
        with pytest.raises(ValueError, match="expected"):
            mitigate(backdoored.model, trigger, broken, labels)
    with pytest.raises(ValueError, match="expected labels"):
        mitigate(backdoored.model, trigger, images, labels[:-1])
