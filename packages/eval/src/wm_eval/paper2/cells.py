"""What both tables of the experiment have in common: where a row stands, and what a cell says."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean, stdev

from wm_eval.attacks.gather import TITLES, Number
from wm_eval.attacks.render import Page
from wm_eval.attacks.spread import Spread
from wm_eval.detectors import DETECTORS
from wm_eval.paper2.config import FINE_TUNING, NAD
from wm_eval.paper2.summary import DetectRecords
from wm_eval.tables import ABSENT, Table

_NETWORKS = {
    "wanet-mnist": "3 ConvBlocks + fcs",
    "preactresnet18": "PreActResNet-18",
    "preactresnet10": "PreActResNet-10",
    "resnet18": "ResNet-18",
    "resnet10": "ResNet-10",
    "vgg16": "VGG16",
    "mobilenetv2": "MobileNetV2",
}
_DATA = {"mnist": "MNIST", "cifar10": "CIFAR-10", "gtsrb": "GTSRB"}


def where(one: DetectRecords, attack: str) -> tuple[str, str, str]:
    """Data set, network and attack, as tables call them."""
    network = _NETWORKS.get(one.model, one.model)
    if one.width is not None and one.model != "wanet-mnist":
        network += f", width {one.width}"
    return _DATA.get(one.name, one.name) or ABSENT, network or ABSENT, TITLES.get(attack, attack)


def spread(values: Iterable[float]) -> Spread | None:
    """Mean, sample standard deviation and count of some figures; None if there are none."""
    found = list(values)
    if not found:
        return None
    return Spread(fmean(found), stdev(found) if len(found) > 1 else None, len(found))


def number(
    one: DetectRecords, attack: str, measure: str, column: str, seed: int | None, value: float
) -> Number:
    """A figure of the tidy list; the network stands where other studies have their recipe."""
    source = "paper" if seed is None else "measured"
    return Number(one.model, attack, measure, column, source, seed, float(value))


def detector_title(name: str) -> str:
    """What a detector is called in tables and figures."""
    return DETECTORS[name].title if name in DETECTORS else name


def method_title(method: str) -> str:
    """What a way to clean is called in tables and figures."""
    titles = {FINE_TUNING: "fine-tuning alone", NAD: "NAD"}
    if method in DETECTORS:
        return f"unlearning, {detector_title(method)}"
    return titles.get(method, method)


def page(
    name: str,
    title: str,
    experiments: Sequence[DetectRecords],
    table: Table,
    numbers: Sequence[Number],
) -> Page:
    """A page with one table, and below it what could not be measured."""
    about = " ".join(_about(one) for one in experiments if one.data)
    data = ", ".join(sorted({one.name for one in experiments if one.name}))
    failed = [failure for one in experiments for failure in one.failures]
    rows = tuple((failure.stage, failure.reason) for failure in failed)
    tables = [table]
    if rows:
        note = "Stages that did not come to their end; what needs them is missing above."
        tables.append(Table(f"{name}-missing", "Missing", ("stage", "reason"), rows, note))
    return Page(name, title, about, tuple(tables), tuple(numbers), data)


def _about(one: DetectRecords) -> str:
    return (
        f"{_DATA.get(one.name, one.name)}: {one.data['n_train']} training images, rates over "
        f"{one.data['n_measured']} test images."
    )


__all__ = [
    "detector_title",
    "method_title",
    "number",
    "page",
    "spread",
    "where",
]
