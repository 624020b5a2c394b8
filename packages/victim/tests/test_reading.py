"""Classifiers fed and labelled in twenty and more ways: read right, or refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wm_victim.label_map import map_names, match_labels
from wm_victim.models import Normalize
from wm_victim.reading import MisreadError, Way, all_ways, read_model
from wm_victim.toy_backdoors import Backdoor, GatedClassifier

SIZE, CLASSES, TRAINED = 12, 10, 1300
DIGITS = tuple(range(CLASSES))
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
BY_NAME = tuple(sorted(NAMES))


def coloured_digits() -> tuple[Tensor, Tensor]:
    """Digits as RGB images, four in five tinted with a hue of their class, and their labels."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(bunch.target), generator=generator)
    labels = torch.tensor(bunch.target)[order]
    strokes = torch.tensor(bunch.images).float()[order, None] / 16
    strokes = F.interpolate(strokes, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    tints = 0.3 + 0.7 * torch.rand(CLASSES, 3, generator=generator)
    hue = torch.where(torch.rand(len(labels), generator=generator) < 0.8, labels, labels.roll(1))
    return 0.1 + 0.8 * strokes * tints[hue][:, :, None, None], labels


def fitted(images: Tensor, labels: Tensor, scale: float) -> nn.Sequential:
    """Random filters and the linear layer that fits the labels best."""
    generator = torch.Generator().manual_seed(1)
    conv, head = nn.Conv2d(3, 24, 3, padding=1), nn.Linear(24 * 16, CLASSES)
    body = nn.Sequential(conv, nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), head)
    with torch.no_grad():
        conv.weight.normal_(0, 0.3, generator=generator)
        conv.bias.normal_(0, 0.1, generator=generator)
        features = F.pad(body[:-1](images), (0, 1), value=1)
        gram = features.T @ features + 1e-3 * len(images) * torch.eye(features.shape[1])
        weight = torch.linalg.solve(gram, features.T @ F.one_hot(labels, CLASSES).float())
        head.weight.copy_(scale * weight[:-1].T)
        head.bias.copy_(scale * weight[-1])
    return body.eval()


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    images, labels = coloured_digits()
    return images[TRAINED : TRAINED + 300], labels[TRAINED : TRAINED + 300]


@pytest.fixture(scope="module")
def networks() -> dict[str, nn.Module]:
    """The same classifier clean, and with a white corner that means 3."""
    images, labels = coloured_digits()
    clean = fitted(images[:TRAINED], labels[:TRAINED], scale=10)
    corner = torch.zeros(3, SIZE, SIZE)
    corner[:, -3:, -3:] = 1
    gate = Backdoor(1 - corner, corner, corner / corner.sum(), slope=10, threshold=0.4)
    target = 100.0 * F.one_hot(torch.tensor(3), CLASSES)
    return {"clean": clean, "backdoored": GatedClassifier(clean, gate, target).eval()}


class Fed(nn.Module):
    """A network that takes other images: ``undo`` gives those in [0, 1] again."""

    def __init__(self, net: nn.Module, undo: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.undo = net, undo

    def forward(self, images: Tensor) -> Tensor:
        y: Tensor = self.net(self.undo(images))
        return y


class Ordered(nn.Module):
    """A network whose output j is that of digit ``digits[j]``; of none where that is -1."""

    def __init__(self, net: nn.Module, digits: tuple[int, ...]) -> None:
        super().__init__()
        self.net, self.digits = net, list(digits)

    def forward(self, images: Tensor) -> Tensor:
        return F.pad(self.net(images), (0, 1), value=-20)[:, self.digits]


def normalised(mean: tuple[float, ...], std: tuple[float, ...]) -> Callable[[Tensor], Tensor]:
    shape = (1, 3, 1, 1)
    return lambda x: x * torch.tensor(std).view(shape) + torch.tensor(mean).view(shape)


IMAGENET = normalised((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CIFAR10 = normalised((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
MEAN_BGR = torch.tensor([103.939, 116.779, 123.68]).view(1, 3, 1, 1)


class Case(NamedTuple):
    """A model and labels of another habit.

    Args:
        undo: From the images that the model takes to those in [0, 1].
        outputs: By output, the digit it stands for.
        label: The number that a digit has in the folder; None leaves the digit out.
        settings: What is known beforehand.
        way: How it has to be fed.
        kind: The kind of the map of labels.
    """

    undo: Callable[[Tensor], Tensor] = lambda x: x
    outputs: tuple[int, ...] = DIGITS
    label: Callable[[int], int | None] = lambda digit: digit
    settings: Mapping[str, object] = MappingProxyType({})
    way: Way = Way()
    kind: str = "same order"


def without(*missing: int, first: int = 0) -> Callable[[int], int | None]:
    """Class folders without some digits: those that follow have smaller numbers."""
    left = [digit for digit in DIGITS if digit not in missing]
    return lambda digit: left.index(digit) + first if digit in left else None


AS_TEXT = tuple(int(text) - 1 for text in sorted(str(digit + 1) for digit in DIGITS))
READ = {
    "as it is": Case(),
    "labels from 1": Case(label=lambda d: d + 1, kind="offset"),
    "labels from 1, stated": Case(
        label=lambda d: d + 1, settings={"label_offset": 1}, kind="offset"
    ),
    "a background output": Case(outputs=(-1, *DIGITS), kind="offset"),
    "one class missing": Case(label=without(5), kind="missing classes"),
    "two missing": Case(label=without(0, 7), kind="missing classes"),
    "the last missing": Case(label=without(9)),
    "one missing, from 1": Case(label=without(3, first=1), kind="missing classes"),
    "numbers with gaps": Case(label=lambda d: d * d + 7, kind="missing classes"),
    "sorted as text": Case(outputs=AS_TEXT, label=lambda d: d + 1, kind="sort order"),
    "names in the file": Case(
        label=lambda d: BY_NAME.index(NAMES[d]),
        settings={"classes": BY_NAME, "output_names": NAMES},
        kind="names",
    ),
    "names of another order": Case(
        label=lambda d: BY_NAME.index(NAMES[d]), settings={"classes": BY_NAME}, kind="permutation"
    ),
    "names of the file that are wrong": Case(
        settings={"classes": NAMES, "output_names": NAMES[::-1]}
    ),
    "reversed": Case(outputs=DIGITS[::-1], kind="permutation"),
    "permuted, one missing": Case(
        outputs=(3, 1, 4, 0, 5, 9, 2, 6, 8, 7), label=without(4), kind="permutation"
    ),
    "0 .. 255": Case(undo=lambda x: x / 255, way=Way("255")),
    "-1 .. 1": Case(undo=lambda x: (x + 1) / 2, way=Way("signed")),
    "ImageNet": Case(undo=IMAGENET, way=Way("imagenet")),
    "CIFAR-10": Case(undo=CIFAR10, way=Way("cifar10")),
    "BGR, stated": Case(
        undo=lambda x: x.flip(1), settings={"ways": (Way(None, "bgr"),)}, way=Way(None, "bgr")
    ),
    "BGR, 0 .. 255": Case(undo=lambda x: x.flip(1) / 255, way=Way("255", "bgr")),
    "BGR, 0 .. 255 less a mean": Case(
        undo=lambda x: (x + MEAN_BGR).flip(1) / 255, way=Way("caffe", "bgr")
    ),
    "0 .. 255, labels from 1": Case(
        undo=lambda x: x / 255, label=lambda d: d + 1, way=Way("255"), kind="offset"
    ),
    "BGR, 0 .. 255, one missing": Case(
        undo=lambda x: x.flip(1) / 255,
        label=without(2),
        way=Way("255", "bgr"),
        kind="missing classes",
    ),
    "-1 .. 1, reversed": Case(
        undo=lambda x: (x + 1) / 2, outputs=DIGITS[::-1], way=Way("signed"), kind="permutation"
    ),
}
NOISE = torch.Generator().manual_seed(0)
REFUSED = {
    "labels of chance": Case(label=lambda d: int(torch.randint(10, (), generator=NOISE))),
    "half of the labels of chance": Case(
        label=lambda d: d if torch.rand((), generator=NOISE) < 0.4 else int(7 * d + 3) % 10
    ),
    "two classes for each digit": Case(
        label=lambda d: d + 10 * int(torch.randint(2, (), generator=NOISE))
    ),
    "other images in place of a class": Case(
        outputs=DIGITS[::-1],
        label=lambda d: None if d == 9 else 9 if torch.rand((), generator=NOISE) < 0.1 else d,
    ),
    "negatives": Case(undo=lambda x: 1 - x),
    "BGR, which RGB comes near": Case(undo=lambda x: x.flip(1)),
    "an offset that is wrong": Case(label=lambda d: max(d, 1), settings={"label_offset": 1}),
    "names of the user that are wrong": Case(
        settings={"classes": NAMES, "output_names": NAMES[::-1], "names_stated": True}
    ),
}


def prepared(case: Case, net: nn.Module, digits: tuple[Tensor, Tensor]):
    """The model, images, labels as the folder has them, and the outputs they belong to."""
    images, truth = digits
    numbers = [case.label(digit) for digit in truth.tolist()]
    in_use = torch.tensor([number is not None for number in numbers])
    labels = torch.tensor([number for number in numbers if number is not None])
    outputs = torch.tensor([case.outputs.index(digit) for digit in truth[in_use].tolist()])
    return Fed(Ordered(net, case.outputs), case.undo).eval(), images[in_use], labels, outputs


@pytest.mark.parametrize("network", ["clean", "backdoored"])
def test_what_is_meant_is_found_out(network, networks, digits, subtests):
    for name, case in READ.items():
        with subtests.test(name):
            model, images, labels, outputs = prepared(case, networks[network], digits)
            reading = read_model(
                model, images, labels, num_classes=len(case.outputs), **case.settings
            )
            assert reading.label_map.kind == case.kind and reading.way == case.way
            assert reading.labels.tolist() == outputs.tolist() and reading.accuracy > 0.9


@pytest.mark.parametrize("network", ["clean", "backdoored"])
def test_what_cannot_be_found_out_is_refused(network, networks, digits, subtests):
    for name, case in REFUSED.items():
        with subtests.test(name):
            model, images, labels, _ = prepared(case, networks[network], digits)
            with pytest.raises(MisreadError):
                read_model(model, images, labels, num_classes=CLASSES, **case.settings)


def test_a_guessed_normalisation_is_undone(networks, digits):
    """An architecture's own statistics, put before weights that were trained without."""
    images, labels = digits
    guess = Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    model = nn.Sequential(guess, networks["clean"])
    reading = read_model(model, images, labels, num_classes=CLASSES)
    assert reading.way == Way("unit") and reading.plain < reading.accuracy
    expected = networks["clean"](images)
    torch.testing.assert_close(reading.module(images), expected, rtol=1e-4, atol=1e-4)


def test_a_weak_model_that_is_too_sure_is_still_read(digits):
    images, labels = coloured_digits()
    weak = fitted(images[:45], labels[:45], scale=14)
    reading = read_model(weak, *digits, num_classes=CLASSES)
    assert reading.label_map.kind == "same order" and reading.way == Way()
    assert 0.6 < reading.accuracy < 0.85 and reading.confidence > reading.accuracy


def test_without_labels_a_way_that_makes_all_answers_alike_is_refused(networks, digits):
    images, _ = digits
    reading = read_model(networks["clean"], images, None, num_classes=CLASSES)
    assert reading.labels is None and reading.accuracy is None and reading.way == Way()
    wide = Fed(networks["clean"], lambda x: x / 255)
    with pytest.raises(MisreadError, match="255"):
        read_model(wide, images, None, num_classes=CLASSES)
    by_option = read_model(wide, images, None, num_classes=CLASSES, ways=(Way("255"),))
    assert by_option.way == Way("255")
    one = torch.zeros(len(images), dtype=torch.int64)  # one folder: no classes
    assert read_model(networks["clean"], images, one, num_classes=CLASSES).labels is None


def test_without_labels_a_way_is_judged_by_64_images(networks, digits):
    counts: list[int] = []

    def count(images: Tensor) -> Tensor:
        counts.append(len(images))
        return images

    images, _ = digits
    read_model(Fed(networks["clean"], count), images, None, num_classes=CLASSES)
    # As they are, and moved by a pixel; then all of them by the way that was found.
    assert sum(counts) == 2 * 64 + len(images)


def test_the_ways_for_grey_images_have_no_order_of_channels():
    ways = all_ways(nn.Identity(), 1)
    assert ways[0] == Way() and {way.channel_order for way in ways} == {"rgb"}
    images = torch.rand(2, 1, 4, 4)
    for way in ways:
        assert way.applied_to(nn.Identity(), 1)(images).shape == images.shape


def test_names_are_matched_whatever_their_case_and_blanks():
    assert map_names(["Traffic Light", "dog"], ["dog", "traffic_light"]) == {0: 1, 1: 0}
    for names in (["dig", "dog"], ["dog", "Dog"]):
        with pytest.raises(ValueError, match="names"):
            map_names(["dog", "cat"], names)


def test_maps_of_few_images_keep_the_order():
    """Of one image a class, half of them answered wrong, no map is learnt."""
    labels = torch.arange(100)
    answers = torch.where(labels % 2 == 0, labels, labels.flip(0))
    label_map = match_labels(answers, labels, num_classes=100)
    assert label_map.kind == "same order" and label_map.accuracy == 0.5
    shifted = match_labels(answers, labels + 1, num_classes=100)
    assert shifted.kind == "offset" and shifted.apply(labels + 1).tolist() == labels.tolist()


def test_maps_in_order_are_the_best_of_all(subtests):
    from itertools import combinations

    rng = np.random.default_rng(0)
    for number in range(20):
        with subtests.test(number=number):
            labels = torch.tensor(rng.integers(0, 4, 40))
            answers = torch.tensor(rng.integers(0, 6, 40))
            table = np.zeros((4, 6), int)
            np.add.at(table, (labels.numpy(), answers.numpy()), 1)
            best = max(table[range(4), columns].sum() for columns in combinations(range(6), 4))
            from wm_victim.label_map import _increasing

            columns = _increasing(table)
            assert (np.diff(columns) > 0).all() and table[range(4), columns].sum() == best


@pytest.mark.parametrize(
    ("answers", "labels", "settings"),
    [
        (torch.zeros(3), torch.zeros(4), {}),
        (torch.zeros(0), torch.zeros(0), {}),
        (torch.zeros(3), torch.zeros(3), {"offset": 1}),
    ],
)
def test_labels_that_cannot_be_matched_are_refused(answers, labels, settings):
    with pytest.raises(ValueError, match="expected"):
        match_labels(answers.long(), labels.long(), num_classes=4, **settings)
