from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from torch import nn

from defense_nc.scan_inputs import ScanInputs
from defense_reverse import (
    ReverseConfig,
    ReversedTrigger,
    ReverseGenerator,
    pretrain,
    reverse_engineer,
)
from defense_reverse.engines import search_in_turn, search_together
from defense_reverse.engines.task import ScanTask, SearchResult
from wm_inject.core import resume
from wm_victim.inference import frozen

K = 6


def scan(model, images, config, **options):
    return ReverseGenerator(config).scan(model, images, progress=False, **options)


def reverse(model, data, config, *, by=search_together, seed=0, **more) -> SearchResult:
    images, labels = data
    with frozen(model):
        start = pretrain(images, config=config, seed=seed)
        return by(ScanTask(ScanInputs(model, images, labels, K), config, start, seed), **more)


def same(one: ReversedTrigger, other: ReversedTrigger) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    told = (one.success_rate, one.residual_norm) == (other.success_rate, other.residual_norm)
    return told and all(torch.equal(a, b) for a, b in pairs)


@pytest.fixture
def small(quick):
    """Few steps in float32, without the race: what both engines must agree on."""
    return replace(
        quick, width=4, residual=True, steps=18, round_steps=6, race=False, batch_size=8, lr=5e-3
    )


@pytest.mark.integration
@pytest.mark.parametrize(
    "changes",
    [
        {"stack": "apart"},
        {"stack": "vmapped"},
        {"stack": "apart", "images_at_once": 16},  # groups of two
        {"stack": "apart", "residual": False, "pretrain_steps": 20},
        {"stack": "apart", "round_images": 40, "patience": 1, "success_floor": 0.3},
    ],
    ids=str,
)
def test_both_engines_give_the_same_answer(data, channel_model, small, changes):
    config = replace(small, **changes)
    found = reverse(channel_model, data, config)
    alone = reverse(channel_model, data, config, by=search_in_turn)
    assert found.steps == alone.steps and found.stopped_at == {}
    for label, trigger in alone.triggers.items():
        other = found.triggers[label]
        assert other.target == label
        # one image of the hundred or so may fall on the other side of a boundary
        assert other.success_rate == pytest.approx(trigger.success_rate, abs=0.011)
        assert other.residual_norm == pytest.approx(trigger.residual_norm, rel=0.02, abs=1e-4)
        torch.testing.assert_close(other(data[0]), trigger(data[0]), rtol=0, atol=0.02)


@pytest.mark.integration
def test_one_by_one_is_reverse_engineer(data, channel_model, small):
    images, labels = data
    found = reverse(channel_model, data, small, by=search_in_turn)
    start = pretrain(images, config=small)
    for label in (0, 2):
        alone = reverse_engineer(
            channel_model, images, label, config=small, start=start, labels=labels
        )
        assert same(found.triggers[label], alone)
        assert found.scores[label] == alone.residual_norm


@pytest.mark.integration
def test_the_size_of_the_groups_changes_nothing_but_rounding(data, channel_model, small):
    whole, pairs = (
        reverse(channel_model, data, replace(small, images_at_once=count)) for count in (512, 16)
    )
    for label in range(K):
        expected = pytest.approx(whole.scores[label], rel=0.02, abs=1e-4)
        assert pairs.scores[label] == expected


@pytest.mark.integration
def test_with_the_race_labels_leave_and_the_planted_one_is_still_named(data, channel_model, quick):
    images, labels = data
    changes = {"candidates": 2, "references": 1, "milestones": (0.6,), "lr": 5e-3}
    config = replace(quick, residual=True, race=True, batch_size=16, **changes)
    report = scan(channel_model, images, config, labels=labels)
    assert report.suspected == (2,)
    left = report.log["left_at"]
    assert 1 <= len(left) <= 2 and "2" not in left and set(left.values()) == {45}
    steps = report.log["label_steps"]
    assert [steps[int(label)] for label in left] == [45] * len(left)
    assert steps[2] == config.steps
    # the score of a label that left is at equal effort, its trigger's residual is as measured
    for label in map(int, left):
        assert report.labels[label].score <= report.triggers[label].residual_norm


@pytest.mark.integration
def test_finished_labels_leave_the_group_and_the_others_go_on(data, small):
    class Generous(nn.Module):
        """Sends everything to label 1, so that its copy is the end of the search."""

        def forward(self, images):
            logits = torch.zeros(len(images), K)
            logits[:, 1] = 9 + images.mean() * 0
            return logits

    config = replace(small, patience=2)
    found = reverse(Generous(), data, config)
    assert found.steps == {label: 12 if label == 1 else 18 for label in range(K)}
    assert found.triggers[1].residual_norm == 0


def test_no_steps_leave_the_start(data, channel_model, small):
    found = reverse(channel_model, data, replace(small, steps=0))
    assert all(trigger.residual_norm == 0 for trigger in found.triggers.values())


class Killed(Exception):
    """What ends a scan half-way here."""


@pytest.mark.integration
@pytest.mark.parametrize(("name", "saves"), [("one-by-one", 2), ("together", 1), ("together", 3)])
def test_a_killed_scan_goes_on_to_the_same_bytes(
    data, channel_model, small, tmp_path, monkeypatch, name, saves
):
    images, labels = data
    changes = {"milestones": (0.3, 0.6), "candidates": 1, "references": 1, "images_at_once": 24}
    config = replace(small, engine=name, race=name == "together", success_floor=0.2, **changes)
    options = {"labels": labels, "seed": 3}
    path, real, states = tmp_path / "scan.safetensors", resume.save_state, []

    def save(*args, **more):
        real(*args, **more)
        states.append(args)
        if len(states) == saves:
            raise Killed

    monkeypatch.setattr(resume, "save_state", save)
    with pytest.raises(Killed):
        scan(channel_model, images, config, **options, checkpoint=path)
    assert path.exists()
    resumed = scan(channel_model, images, config, **options, checkpoint=path)
    assert not path.exists()
    saved_in_two_parts = len(states)
    whole = scan(channel_model, images, config, **options, checkpoint=path)
    assert resumed.to_dict() == whole.to_dict()
    assert all(same(whole.triggers[x], resumed.triggers[x]) for x in range(K))
    assert saved_in_two_parts == len(states) / 2  # nothing was done twice


def test_the_checkpoint_of_another_scan_is_refused(data, channel_model, small, tmp_path):
    images, labels = data
    start = pretrain(images, config=small)
    path = tmp_path / "scan.safetensors"
    inputs = ScanInputs(channel_model, images, labels, K)
    task = ScanTask(inputs, small, start)
    task.resume_file(path).save({"searches": []})
    assert task.resume_file(path).load() == {"searches": []}
    for other in (
        task._replace(seed=1),
        task._replace(config=replace(small, lr=1e-3)),
        task._replace(inputs=inputs._replace(images=1 - images)),
        task._replace(inputs=inputs._replace(model=nn.Linear(2, 2))),
    ):
        with pytest.raises(ValueError, match="checkpoint of another run"):
            other.resume_file(path).load()
    path.write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"scan\.safetensors"):
        task.resume_file(path).load()


class Wide(nn.Module):
    """A classifier of very many labels that remembers the sizes of its batches."""

    sizes: ClassVar[set[int]] = set()  # of the class: an engine may work on a copy

    def __init__(self, labels: int) -> None:
        super().__init__()
        self.labels = labels

    def forward(self, images):
        self.sizes.add(len(images))
        spread = torch.linspace(-1, 1, self.labels) * 1e-3
        return images.mean(dim=(1, 2, 3))[:, None] * spread


@pytest.mark.integration
def test_very_many_labels_fit_a_small_budget():
    model, many = Wide(300), 300
    images = torch.rand(4, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    changes = {"width": 1, "depth": 1, "steps": 1, "batch_size": 2, "images_at_once": 200}
    config = ReverseConfig.preset("fast", **changes, stack="vmapped")
    labels = torch.tensor([0, 1, 2, 3])
    report = scan(model, images, config, labels=labels)
    assert len(report.labels) == len(report.triggers) == many
    assert max(model.sizes) == config.images_at_once
