"""Rates on classifiers whose answers are known without running anything."""

from __future__ import annotations

import pytest
import torch
from sklearn.metrics import balanced_accuracy_score
from torch import Tensor, nn

from wm_eval.robustness import (
    Outcomes,
    balanced_bit_accuracy,
    compare,
    constant_score,
    evaluate,
    outcomes,
    summarize,
)
from wm_inject.core.images import quantize
from wm_victim.datasets import ImageSet


class Oracle(nn.Module):
    """Reads the label off pixel (0, 0), unless pixel (0, 1) is white: then it says ``target``."""

    def __init__(self, target: int = 2, num_classes: int = 4) -> None:
        super().__init__()
        self.target, self.num_classes = target, num_classes

    def forward(self, images: Tensor) -> Tensor:
        labels = (images[:, 0, 0, 0] * 10).round().long() % self.num_classes
        labels = torch.where(images[:, 0, 0, 1] > 0.9, torch.tensor(self.target), labels)
        return torch.nn.functional.one_hot(labels, self.num_classes).float()


def stamp(images: Tensor, *, ids=None, target=None) -> Tensor:
    out = images.clone()
    out[:, :, 0, 1] = 1.0
    return out


def identity(images: Tensor, *, generator=None) -> Tensor:
    return images


def wipe(images: Tensor, *, generator=None) -> Tensor:
    return images * 0


def test_set(n: int = 40) -> ImageSet:
    labels = torch.arange(n) % 4
    images = torch.zeros(n, 1, 8, 8)
    images[:, 0, 0, 0] = labels / 10
    return ImageSet(images, labels, torch.arange(n))


test_set.__test__ = False  # type: ignore[attr-defined]


def labelled(labels: Tensor) -> ImageSet:
    return ImageSet(test_set().images, labels, test_set().ids)


def test_an_obedient_backdoor() -> None:
    found = evaluate(
        Oracle(), stamp, test_set(), target=2, corruptions={"none": identity, "wipe": wipe}
    )
    assert (found["none"].cda, found["none"].asr, found["none"].ftr) == (1, 1, 0)
    assert (found["none"].n_clean, found["none"].n_attack) == (40, 30)
    # A wiped image is label 0 to the oracle, whatever was in it.
    assert (found["wipe"].cda, found["wipe"].asr, found["wipe"].ftr) == (0.25, 0, 0)


def test_a_collapsed_model_is_seen_by_its_false_triggers() -> None:
    class Constant(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.eye(4)[2].expand(len(images), 4)

    found = evaluate(Constant(), stamp, test_set(), target=2, corruptions={"none": identity})
    assert (found["none"].asr, found["none"].ftr, found["none"].cda) == (1, 1, 0.25)


def test_all_to_all_counts_every_image() -> None:
    class Next(Oracle):
        def forward(self, images: Tensor) -> Tensor:
            labels = (images[:, 0, 0, 0] * 10).round().long()
            moved = torch.where(images[:, 0, 0, 1] > 0.9, (labels + 1) % 4, labels)
            return torch.nn.functional.one_hot(moved, 4).float()

    asked = []

    def trigger(images: Tensor, *, ids=None, target=None) -> Tensor:
        asked.append(target)
        return stamp(images)

    found = evaluate(
        Next(),
        trigger,
        test_set(),
        target=0,
        corruptions={"none": identity},
        label_map="all-to-all",
    )
    assert found["none"].asr == 1 and found["none"].n_attack == 40
    assert torch.equal(torch.cat(asked), (test_set().labels + 1) % 4)


def test_a_source_specific_attack_counts_its_source_alone() -> None:
    """Class 2 goes to class 1 with the stamp; the others do not, which is no miss."""

    class One(Oracle):
        def forward(self, images: Tensor) -> Tensor:
            labels = (images[:, 0, 0, 0] * 10).round().long()
            moved = torch.where((images[:, 0, 0, 1] > 0.9) & (labels == 2), 1, labels)
            return torch.nn.functional.one_hot(moved, 4).float()

    found = evaluate(
        One(),
        lambda images, **_: stamp(images),
        test_set(),
        target=1,
        corruptions={"none": identity},
        label_map="source-specific",
    )["none"]
    assert (found.asr, found.ftr, found.cda, found.n_attack) == (1, 0, 1, 10)


def test_the_order_is_trigger_then_eight_bits_then_corruption() -> None:
    seen = []

    def spy(images: Tensor, *, generator=None) -> Tensor:
        seen.append(images)
        return images

    def faint(images: Tensor, *, ids=None, target=None) -> Tensor:
        return (images + 0.3 / 255).clamp(0, 1)

    data = test_set()
    evaluate(Oracle(), faint, data, target=2, corruptions={"spy": spy})
    plain, marked = seen
    assert torch.equal(marked, quantize(faint(data.images)))
    assert torch.equal(plain, quantize(data.images))


def noise(images: Tensor, *, generator: torch.Generator) -> Tensor:
    return (images + 0.5 * torch.rand(images.shape, generator=generator)).clamp(0, 1)


def test_clean_and_triggered_meet_the_same_draw_and_names_do_not_share_it() -> None:
    seen: dict[str, list[Tensor]] = {"a": [], "b": []}

    def spy(name: str):
        def corrupt(images: Tensor, *, generator: torch.Generator) -> Tensor:
            seen[name].append(torch.rand(3, generator=generator))
            return images

        return corrupt

    corruptions = {name: spy(name) for name in seen}
    evaluate(Oracle(), stamp, test_set(), target=2, corruptions=corruptions, batch_size=20)
    first, second, third, fourth = seen["a"]
    assert torch.equal(first, second) and torch.equal(third, fourth)
    assert not torch.equal(first, third)
    assert not torch.equal(first, seen["b"][0])


def test_the_same_seed_gives_the_same_rows() -> None:
    def run(seed: int) -> Outcomes:
        return outcomes(
            Oracle(), stamp, test_set(), target=2, corruptions={"noise": noise}, seed=seed
        )["noise"]

    assert all(torch.equal(a, b) for a, b in zip(run(3), run(3), strict=True))
    assert not torch.equal(run(3).correct, run(4).correct)


def test_the_model_comes_back_in_its_mode() -> None:
    model = Oracle().train()
    evaluate(model, stamp, test_set(), target=2, corruptions={"none": identity})
    assert model.training
    with pytest.raises(ValueError, match="below 4 classes"):
        evaluate(model, stamp, test_set(), target=4, corruptions={"none": identity})
    assert model.training


def test_compare_counts_the_disagreements() -> None:
    first = torch.tensor([1, 1, 1, 0, 0], dtype=torch.bool)
    second = torch.tensor([1, 0, 0, 1, 0], dtype=torch.bool)
    found = compare(first, second)
    assert (found.only_first, found.only_second, found.n) == (2, 1, 5)
    assert found.value == pytest.approx(first.float().mean() - second.float().mean())


def test_balanced_bit_accuracy_agrees_with_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    mark = (torch.rand(1, 8, 8, generator=generator) > 0.7).float()
    estimate = torch.rand(5, 1, 8, 8, generator=generator)
    ours = balanced_bit_accuracy(estimate, mark)
    for row, score in zip(estimate, ours, strict=True):
        reference = balanced_accuracy_score(mark.flatten() > 0.5, row.flatten() > 0.5)
        assert float(score) == pytest.approx(reference, abs=1e-6)


def test_knowing_nothing_earns_a_half_and_the_mark_itself_one() -> None:
    mark = torch.zeros(1, 8, 8)
    mark[0, :2] = 1
    assert constant_score(mark) == 0.5
    assert float(balanced_bit_accuracy(mark[None], mark)) == 1
    assert float(balanced_bit_accuracy(1 - mark[None], mark)) == 0


@pytest.mark.parametrize(
    "bad",
    [
        {"target": -1},
        {"corruptions": {}},
        {"seed": -1},
        {"label_map": "none"},
        {"batch_size": 0},
        {"test": labelled(torch.full((40,), 9))},
        {"test": labelled(torch.full((40,), 2))},
    ],
)
def test_evaluate_refuses(bad: dict) -> None:
    given: dict = {"target": 2, "corruptions": {"none": identity}, "test": test_set(), **bad}
    with pytest.raises(ValueError, match=r"^expected "):
        evaluate(Oracle(), stamp, given.pop("test"), **given)


@pytest.mark.parametrize(
    ("estimate", "mark"),
    [
        (torch.zeros(1, 8, 8), torch.eye(8)[None]),
        (torch.zeros(0, 1, 8, 8), torch.eye(8)[None]),
        (torch.zeros(2, 1, 4, 4), torch.eye(8)[None]),
        (torch.zeros(2, 1, 8, 8), torch.eye(8)),
        (torch.zeros(2, 1, 8, 8), torch.ones(1, 8, 8)),
        (torch.full((2, 1, 8, 8), float("nan")), torch.eye(8)[None]),
        (torch.full((2, 1, 8, 8), 2.0), torch.eye(8)[None]),
        (torch.zeros(2, 1, 8, 8, dtype=torch.int64), torch.eye(8)[None]),
        (None, torch.eye(8)[None]),
    ],
)
def test_balanced_bit_accuracy_refuses(estimate, mark) -> None:
    with pytest.raises(ValueError, match=r"^expected "):
        balanced_bit_accuracy(estimate, mark)


def test_other_refusals() -> None:
    rows = torch.ones(3, dtype=torch.bool)
    with pytest.raises(ValueError, match="four bool columns"):
        summarize(Outcomes(rows, rows, rows, rows[:2]))
    with pytest.raises(ValueError, match="another class"):
        summarize(Outcomes(rows, ~rows, rows, rows))
    with pytest.raises(ValueError, match="bool columns"):
        compare(rows, rows.float())
    with pytest.raises(ValueError, match="one length"):
        compare(rows, rows[:2])
    with pytest.raises(ValueError, match="a watermark of shape"):
        constant_score(torch.ones(8, 8))
