"""What the reverse-generator paper prints about mitigation, as data, to stand beside ours.

Source: Zheng, Hua and Zhang, "Detecting and Mitigating Backdoor Attacks with Dynamic and Invisible
Triggers", Table 2: WaNet, fine-tuning for ten epochs without and with reversed images.
"""

from __future__ import annotations

from typing import NamedTuple


class PaperMitigation(NamedTuple):
    """One row of Table 2, in percent."""

    acc_without: float
    asr_without: float
    acc_with: float
    asr_with: float


_TABLE2 = """
mnist   0.01  99.37 99.77  99.09  0.07
mnist   0.03  99.34 99.55  99.16  0.08
mnist   0.05  99.38 98.49  99.26  0.09
cifar10 0.01  93.74 97.66  93.88 19.20
cifar10 0.03  94.08 83.28  93.93  9.45
cifar10 0.05  92.50 82.04  92.96  2.58
gtsrb   0.01  98.76 93.60  98.89  0.79
gtsrb   0.03  99.03 94.63  99.00  0.43
gtsrb   0.05  99.03 94.65  99.03  0.19
"""


def _read(text: str) -> dict[str, dict[float, PaperMitigation]]:
    found: dict[str, dict[float, PaperMitigation]] = {}
    for line in text.strip().splitlines():
        data, share, *words = line.split()
        a, b, c, d = (float(word) for word in words)
        found.setdefault(data, {})[float(share)] = PaperMitigation(a, b, c, d)
    return found


# By data set and share of clean data.
PAPER_TABLE2 = _read(_TABLE2)
PAPER_ATTACK = "wanet"

__all__ = ["PAPER_ATTACK", "PAPER_TABLE2", "PaperMitigation"]
