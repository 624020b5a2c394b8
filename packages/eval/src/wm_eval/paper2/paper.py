"""What the reverse-generator paper prints, to stand beside what was measured.

Source: Zheng, Hua and Zhang, "Detecting and Mitigating Backdoor Attacks with Dynamic and Invisible
Triggers", Tables 1 and 2; all of it is about WaNet, ten seeds each.
"""

from __future__ import annotations

from typing import NamedTuple


class PaperDetection(NamedTuple):
    """A row of Table 1."""

    clean: float  # mean index of the clean models
    backdoored: float
    cases: tuple[int, int, int, int]  # of ten backdoored models


class PaperCleaning(NamedTuple):
    """Accuracy and attack success after cleaning, in per cent."""

    acc: float
    asr: float


ATTACK = "wanet"
SEEDS = 10
# data, network, detector, index clean and backdoored, cases 1 to 4
_TABLE1 = """
mnist   wanet-mnist    nc      1.10 0.75 0 0 0 10
mnist   wanet-mnist    reverse 1.07 5.41 9 1 0 0
cifar10 preactresnet18 nc      2.52 2.32 0 0 6 4
cifar10 preactresnet18 reverse 1.66 5.06 9 1 0 0
cifar10 vgg16          nc      1.91 4.00 0 4 3 3
cifar10 vgg16          reverse 1.94 4.01 8 1 0 1
cifar10 mobilenetv2    nc      1.30 1.59 0 0 1 9
cifar10 mobilenetv2    reverse 1.30 2.98 9 1 0 0
gtsrb   preactresnet18 nc      2.65 1.52 0 3 1 6
gtsrb   preactresnet18 reverse 1.99 4.92 9 1 0 0
gtsrb   vgg16          nc      1.94 1.94 0 0 3 7
gtsrb   vgg16          reverse 1.89 6.36 6 4 0 0
gtsrb   mobilenetv2    nc      2.42 3.98 2 8 0 0
gtsrb   mobilenetv2    reverse 1.95 3.24 5 4 0 1
"""
# data, share, without reversed images (ACC, ASR), with them (ACC, ASR)
_TABLE2 = """
mnist   0.01 99.37 99.77 99.09  0.07
mnist   0.03 99.34 99.55 99.16  0.08
mnist   0.05 99.38 98.49 99.26  0.09
cifar10 0.01 93.74 97.66 93.88 19.20
cifar10 0.03 94.08 83.28 93.93  9.45
cifar10 0.05 92.50 82.04 92.96  2.58
gtsrb   0.01 98.76 93.60 98.89  0.79
gtsrb   0.03 99.03 94.63 99.00  0.43
gtsrb   0.05 99.03 94.65 99.03  0.19
"""
# Table 2 does not say which network; these are the ones that WaNet's own code trains.
NETWORKS = {"mnist": "wanet-mnist", "cifar10": "preactresnet18", "gtsrb": "preactresnet18"}


def _detection() -> dict[tuple[str, str, str], PaperDetection]:
    found = {}
    for line in _TABLE1.strip().splitlines():
        data, model, detector, clean, backdoored, *cases = line.split()
        one, two, three, four = map(int, cases)
        row = PaperDetection(float(clean), float(backdoored), (one, two, three, four))
        found[data, model, detector] = row
    return found


def _cleaning() -> dict[tuple[str, float, str], PaperCleaning]:
    found = {}
    for line in _TABLE2.strip().splitlines():
        data, share, *rates = line.split()
        a, b, c, d = map(float, rates)
        found[data, float(share), "fine-tuning"] = PaperCleaning(a, b)
        found[data, float(share), "reverse"] = PaperCleaning(c, d)
    return found


# By data set, network and detector; by data set, share and method.
PAPER_TABLE1 = _detection()
PAPER_TABLE2 = _cleaning()

__all__ = [
    "ATTACK",
    "NETWORKS",
    "PAPER_TABLE1",
    "PAPER_TABLE2",
    "SEEDS",
    "PaperCleaning",
    "PaperDetection",
]
