"""What the Spy-Watermark paper prints in its Tables 1 and 2, as data, to stand beside ours.

Source: Wang et al., "Spy-Watermark: Robust Invisible Watermarking for Backdoor Attack", ICASSP
2024, Table 1 (section 3.2) and Table 2 (section 3.4). Percentages as printed, averages included:
the paper's AVG is the mean of its five columns, None among them, in all 66 rows.
"""

from __future__ import annotations

from typing import NamedTuple

# The paper's columns of Table 1: nothing, random masking, rotation, noise, re-scaling.
PAPER_COLUMNS = ("None", "RM", "Ro", "Noise", "RS")


class PaperRow(NamedTuple):
    """One measure of one attack on one data set, in percent."""

    columns: tuple[float, float, float, float, float]  # in the order of PAPER_COLUMNS
    average: float  # as printed


class PaperStealth(NamedTuple):
    """One column of Table 2, measured on CIFAR-10."""

    psnr: float  # dB
    ssim: float
    lpips: float  # the paper does not name the network


_TABLE1 = """
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


def _read(text: str) -> dict[str, dict[str, dict[str, PaperRow]]]:
    found: dict[str, dict[str, dict[str, PaperRow]]] = {}
    for line in text.strip().splitlines():
        data, attack, *words = line.split()
        a, b, c, d, e, cda, v, w, x, y, z, asr = (float(word) for word in words)
        rows = {"cda": PaperRow((a, b, c, d, e), cda), "asr": PaperRow((v, w, x, y, z), asr)}
        found.setdefault(data, {})[attack] = rows
    return found


# By data set, attack and measure ("cda", "asr").
PAPER_TABLE1 = _read(_TABLE1)

PAPER_TABLE2 = {
    "badnets": PaperStealth(27.23, 0.992, 0.104),
    "blend": PaperStealth(20.75, 0.803, 0.123),
    "refool": PaperStealth(15.26, 0.574, 0.117),
    "blindnet": PaperStealth(34.29, 0.992, 0.001),
    "ssba": PaperStealth(24.83, 0.900, 0.113),
    "sig": PaperStealth(19.32, 0.620, 0.201),
    "ftrojan": PaperStealth(33.78, 0.962, 0.110),
    "lf": PaperStealth(23.03, 0.963, 0.123),
    "wanet": PaperStealth(23.23, 0.920, 0.113),
    "marksman": PaperStealth(24.56, 0.853, 0.176),
    "watermark": PaperStealth(38.73, 0.995, 0.001),
}
PAPER_TABLE2_DATA = "cifar10"


__all__ = [
    "PAPER_COLUMNS",
    "PAPER_TABLE1",
    "PAPER_TABLE2",
    "PAPER_TABLE2_DATA",
    "PaperRow",
    "PaperStealth",
]
