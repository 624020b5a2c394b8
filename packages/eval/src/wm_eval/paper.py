"""What the two papers print, as data, to stand beside measurements; percentages as printed.

Sources: Wang et al., "Spy-Watermark: Robust Invisible Watermarking for Backdoor Attack", ICASSP
2024, Tables 1 and 2; Zheng, Hua and Zhang, "Detecting and Mitigating Backdoor Attacks with Dynamic
and Invisible Triggers", Tables 1 and 2, all of it WaNet, ten seeds each.
"""

from __future__ import annotations

from typing import NamedTuple

COLUMNS = ("None", "RM", "Ro", "Noise", "RS")  # of the attack paper's Table 1


class Rates(NamedTuple):
    """A row of the attack paper's Table 1; its AVG is the mean of all five columns."""

    columns: tuple[float, ...]  # in the order of COLUMNS
    average: float


class Stealth(NamedTuple):
    """A column of the attack paper's Table 2."""

    psnr: float  # dB
    ssim: float
    lpips: float  # the paper does not name the network


class Detection(NamedTuple):
    """A row of the defence paper's Table 1."""

    clean: float  # mean anomaly index of the clean models
    backdoored: float
    cases: tuple[int, ...]  # 1 to 4, of ten backdoored models


class Mitigated(NamedTuple):
    """Accuracy and attack success after mitigation, in percent."""

    acc: float
    asr: float


# data set, attack, CDA: None RM Ro Noise RS AVG, ASR: None RM Ro Noise RS AVG
_RATES = """
cifar10 badnets    91.5 13.2 72.7 89.2 84.8  70.3   96.2  74.5  33.9  95.5  94.5  78.9
cifar10 blend      93.4 16.1 79.7 92.7 87.5  73.9   99.9   0.0  49.3  99.9  66.5  63.1
cifar10 refool     77.0 25.5 52.4 76.6 75.6  61.4   87.0   5.8  19.6  86.8  85.0  56.8
cifar10 blindnet   85.4 27.0 51.4 85.0 65.8  62.9   88.6  41.6  30.6  88.8  36.6  57.2
cifar10 ssba       92.8 10.1 78.1 91.0 86.8  71.8   98.6  99.0  60.2  98.8  67.5  84.8
cifar10 sig        84.5 15.4 72.3 84.2 79.0  67.1   98.6  15.6  54.5  97.1  96.5  72.5
cifar10 ftrojan    93.5 13.3 79.5 92.4 87.8  73.3  100.0 100.0  16.8 100.0  59.1  75.2
cifar10 lf         77.0 11.8 64.6 76.6 70.2  60.0   95.9   2.8  95.8  95.5  95.4  77.1
cifar10 wanet      91.6 12.9 77.7 91.1 83.5  71.4   85.6  66.0  87.8  85.0  87.4  82.4
cifar10 marksman   58.1 47.9 49.8 58.5 55.1  53.9   99.7  99.6  99.7  99.7  99.7  99.7
cifar10 watermark  94.7 51.6 93.0 94.4 94.2  85.6  100.0  34.1 100.0  99.9 100.0  86.8
gtsrb badnets      96.7  8.8 82.3 96.8 96.5  76.2   92.7  95.3  14.8  92.6  50.0  69.1
gtsrb blend        98.4 15.7 87.0 98.3 98.1  79.5  100.0  99.7  96.3 100.0  99.3  99.1
gtsrb refool       98.6 61.6 78.2 98.5 98.3  87.0   62.9  43.8  25.7  62.9  58.6  50.8
gtsrb blindnet    100.0  4.4 75.7 98.8 92.2  74.2   91.5  95.4  18.9  91.7  23.2  64.1
gtsrb ssba         98.2  0.5 86.0 98.2 97.9  76.2  100.0 100.0  99.5 100.0  97.6  99.4
gtsrb sig          98.4 28.1 86.5 98.4 98.1  81.9   68.8  70.4  43.2  68.3  67.5  63.6
gtsrb ftrojan      98.2  7.4 86.4 98.2 97.9  77.6  100.0 100.0  14.9 100.0  51.6  73.3
gtsrb lf           98.2 35.5 86.5 98.2 97.8  83.2  100.0  99.9 100.0 100.0 100.0 100.0
gtsrb wanet        98.7  6.0 89.5 98.5 96.7  77.9   98.1   1.3  88.8  93.1  96.7  75.6
gtsrb marksman     50.3 44.1 46.6 54.4 52.9  49.7   98.8  99.1  99.0  99.1  99.0  99.0
gtsrb watermark   100.0 43.1 96.8 97.1 97.2  86.8  100.0 100.0 100.0 100.0 100.0 100.0
imagenet10 badnets   94.0 63.8 88.2 92.4 93.2 86.3  100.0   4.0  40.0   4.0 100.0  49.6
imagenet10 blend     91.8 60.4 87.8 90.6 92.0 84.5   98.8  42.0  96.0  46.0 100.0  76.6
imagenet10 refool    80.0 58.0 67.9 78.6 79.6 72.8   80.0  40.0  29.1  80.0  80.0  61.8
imagenet10 blindnet  97.0 69.0 94.4 97.0 92.6 90.0   13.6  15.9  11.6  13.6  11.5  13.2
imagenet10 ssba      85.2 49.8 83.2 78.2 86.6 76.6   68.0 100.0  76.0 100.0  32.0  75.2
imagenet10 sig       90.2 60.2 88.0 89.2 89.4 83.4   12.0   8.0   6.0   6.0   6.0   7.6
imagenet10 ftrojan   89.8 61.2 85.2 89.2 90.0 83.1  100.0  84.0  14.0  84.0  44.0  65.2
imagenet10 lf        91.2 63.6 87.6 90.2 90.2 84.6   25.1  24.6  25.1  24.4  25.1  24.9
imagenet10 wanet     86.6 56.4 86.0 86.0 85.4 80.1   86.7 100.0 100.0  84.4  86.7  91.6
imagenet10 marksman  38.0 36.2 39.6 39.0 41.2 38.8   76.6  76.6  75.4  76.2  76.0  76.2
imagenet10 watermark 93.2 77.2 91.2 91.8 92.8 89.2  100.0 100.0 100.0 100.0 100.0 100.0
"""
# attack, PSNR, SSIM, LPIPS, all on CIFAR-10
_STEALTH = """
badnets   27.23 0.992 0.104
blend     20.75 0.803 0.123
refool    15.26 0.574 0.117
blindnet  34.29 0.992 0.001
ssba      24.83 0.900 0.113
sig       19.32 0.620 0.201
ftrojan   33.78 0.962 0.110
lf        23.03 0.963 0.123
wanet     23.23 0.920 0.113
marksman  24.56 0.853 0.176
watermark 38.73 0.995 0.001
"""
# data set, network, detector, index of clean and of backdoored models, cases 1 to 4
_DETECTION = """
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
# data set, fraction of clean data, without reversed images (ACC, ASR), with them (ACC, ASR)
_MITIGATION = """
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

STEALTH_DATA = "cifar10"
DEFENCE_ATTACK = "wanet"
DEFENCE_SEEDS = 10
# Table 2 does not name the network; these are the ones that WaNet's own code trains.
MITIGATION_NETWORKS = {
    "mnist": "wanet-mnist",
    "cifar10": "preactresnet18",
    "gtsrb": "preactresnet18",
}


def _lines(text: str) -> list[list[str]]:
    return [line.split() for line in text.strip().splitlines()]


RATES: dict[tuple[str, str, str], Rates] = {}  # by data set, attack and measure ("cda", "asr")
for _data, _attack, *_words in _lines(_RATES):
    _values = tuple(map(float, _words))
    RATES[_data, _attack, "cda"] = Rates(_values[:5], _values[5])
    RATES[_data, _attack, "asr"] = Rates(_values[6:11], _values[11])
STEALTH = {attack: Stealth(*map(float, words)) for attack, *words in _lines(_STEALTH)}
DETECTION = {  # by data set, network and detector
    (data, network, detector): Detection(float(clean), float(bad), tuple(map(int, cases)))
    for data, network, detector, clean, bad, *cases in _lines(_DETECTION)
}
MITIGATION: dict[tuple[str, float, str], Mitigated] = {}  # by data set, fraction and method
for _data, _fraction, *_words in _lines(_MITIGATION):
    _values = tuple(map(float, _words))
    for _method in ("control", "fine-tuning"):
        MITIGATION[_data, float(_fraction), _method] = Mitigated(*_values[:2])
    MITIGATION[_data, float(_fraction), "unlearning-reverse"] = Mitigated(*_values[2:])
