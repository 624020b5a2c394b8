"""What a study measures, as plain JSON-ready values: pure functions of modules and images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from defense_nc import ScanReport, mad_index
from wm_eval.intervals import exact_lower, exact_upper
from wm_eval.robustness import Metrics, constant_score, corrupt_alike, stream
from wm_extract import Corruption, MarkDetector, UNetExtractor, balanced_bit_accuracy
from wm_inject import Lpips, LpipsUnavailable, linf, psnr, ssim
from wm_inject.stealth import COMPARED, comparable_changes, image_dependence

BATCH = 256


def stealth_values(poisoned: Tensor, images: Tensor) -> dict[str, Any]:
    """PSNR, SSIM, largest change and LPIPS, each with mean and 5th and 95th percentile.

    "common" is the share of the change's energy that is the same in all images; None where fewer
    than two changed. LPIPS needs weights; where there are none it is absent, and the reason stands
    beside it.
    """
    changes = comparable_changes(poisoned[:COMPARED], images[:COMPARED])
    values: dict[str, Any] = {
        "psnr": _spread(psnr(poisoned, images)),
        "ssim": _spread(ssim(poisoned, images)),
        "linf": _spread(linf(poisoned, images)),
        "common": image_dependence(changes).universal if len(changes) > 1 else None,
    }
    try:
        metric = Lpips().to(images.device)
    except LpipsUnavailable as error:
        return values | {"lpips": None, "lpips_absent": " ".join(str(error).split())}
    with torch.no_grad():
        pairs = zip(poisoned.split(BATCH), images.split(BATCH), strict=True)
        distances = torch.cat([metric(marked, clean) for marked, clean in pairs])
    return values | {"lpips": _spread(distances)}


def mark_values(
    extractor: UNetExtractor,
    watermark: Tensor,
    images: Tensor,
    poisoned: Tensor,
    *,
    corruptions: Mapping[str, Corruption],
    false_positive_rate: float,
    seed: int,
) -> dict[str, Any]:
    """Bit accuracy under each corruption, and whether marked and unmarked images are told apart.

    The threshold is chosen on every other image, from the first, unmarked and marked; all counts
    come from the images in between, which chose nothing.

    Args:
        extractor: In eval mode.
        watermark: float32 ``(1, H, W)``.
        images: Held-out clean images ``(N, C, H, W)``.
        poisoned: The same images with the watermark, on the 8-bit grid.
        corruptions: By name; "none" must be among them.
        false_positive_rate: What the threshold aims at.

    Raises:
        ValueError: Bad images, too few of them, or no "none" among the corruptions.
    """
    if "none" not in corruptions:
        raise ValueError('expected the corruption "none" among those to measure')
    detector = MarkDetector.calibrate(
        extractor,
        watermark,
        images[0::2],
        marked=poisoned[0::2],
        false_positive_rate=false_positive_rate,
    )
    held_out = torch.arange(len(images)) % 2 == 1
    bits: dict[str, dict[str, Any]] = {}
    for name, corruption in corruptions.items():
        generator = torch.Generator().manual_seed(stream(seed, name))
        plain, marked = corrupt_alike(corruption, generator, images, poisoned)
        on_plain, on_marked = detector.detect(plain), detector.detect(marked)
        bits[name] = {
            "marked": float(balanced_bit_accuracy(on_marked.maps, watermark).mean()),
            "unmarked": float(balanced_bit_accuracy(on_plain.maps, watermark).mean()),
            "true_positives": int(on_marked.marked.cpu()[held_out].sum()),
            "false_positives": int(on_plain.marked.cpu()[held_out].sum()),
            "false_n": int(held_out.sum()),
        }
    n, none = int(held_out.sum()), bits["none"]
    detection = {
        "threshold": detector.threshold,
        "aimed_fpr": false_positive_rate,
        "n_calibration": detector.calibrated_on,
        "n": n,
        "true_positives": none["true_positives"],
        "tpr": none["true_positives"] / n,
        "tpr_lower": exact_lower(none["true_positives"], n),
        "false_positives": none["false_positives"],
        "fpr": none["false_positives"] / n,
        "fpr_upper": exact_upper(none["false_positives"], n),
    }
    return {
        "n": len(images),
        "fixed_mark": True,
        "constant_score": constant_score(watermark),
        "bits": bits,
        "detection": detection,
    }


def metrics_values(metrics: Metrics) -> dict[str, Any]:
    """Rates, counts and intervals of one corruption."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in asdict(metrics).items()
    }


def scan_values(report: ScanReport) -> dict[str, Any]:
    """A scan as measured: both rules, every label, and the lines that a plot draws."""
    paper = mad_index(torch.tensor([label.score for label in report.labels]).double())
    converged = [label.score for label in report.labels if label.converged]
    compared = torch.tensor(converged or [label.score for label in report.labels]).double()
    return report.to_dict() | {
        "score_median": float(compared.quantile(0.5)),
        "paper_line": paper.median - 2 * paper.mad,
    }


def parameters(module: nn.Module) -> int:
    """How many trainable numbers a module has."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def _spread(values: Tensor) -> dict[str, float]:
    values = values.detach().double().cpu()
    low, high = values.quantile(torch.tensor([0.05, 0.95], dtype=torch.float64)).tolist()
    return {"mean": float(values.mean()), "p05": low, "p95": high}
