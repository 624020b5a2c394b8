"""How close reversed images come to the planted ones: a number, and the pictures of the figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from defense_reverse.closeness import compare_images
from wm_eval.measure import poisoned_images
from wm_eval.paper2.trial import Trial
from wm_eval.pictures import amplified, residual_gain, save_picture
from wm_eval.workspace import Made
from wm_inject import psnr, quantize

SHOWN_LABELS = 10  # of more labels the figure shows the first, and the target


def compare_triggers(trial: Trial, detector: str, _: Path) -> Made:
    """How close the reversed images of the target come to the planted ones, with pictures.

    ``cosine``, ``psnr_planted`` and ``psnr_between`` are the ``cosine``, ``psnr_clean`` and
    ``psnr`` of `defense_reverse.closeness`; ``cosine_others`` is the cosine of the triggers of the
    other labels, which is what resembling nothing in particular amounts to.
    """
    config, target = trial.config, trial.config.target
    test = trial.others(config.compared)
    images = quantize(test.images)
    planted = poisoned_images(trial.trigger(), test, target=target)
    known = trial.study.space.record(f"scan-{detector}-{config.attack}-{trial.seed}").values
    labels = [row["label"] for row in known["labels"]]
    found = {k: poisoned_images(trial.reversed(detector, k), test) for k in labels}
    near = {k: compare_images(found[k], planted, images) for k in labels}
    others = [one.cosine for label, one in near.items() if label != target]
    values = {
        "attack": config.attack,
        "defence": detector,
        "target": target,
        "n": len(test),
        "cosine": near[target].cosine,
        "cosine_others": fmean(others),
        "psnr_planted": near[target].psnr_clean,
        "psnr_reversed": float(psnr(found[target], images).mean()),
        "psnr_between": near[target].psnr,
    }
    shown = _shown(labels, target)
    drawn = _draw(trial, detector, images, planted, {k: found[k] for k in shown})
    return Made(values | drawn, [f"pictures/{file}" for file in sorted(_files(drawn))])


def _shown(labels: Sequence[int], target: int) -> list[int]:
    first = [label for label in labels if label != target][: SHOWN_LABELS - 1]
    return sorted([target, *first])


def _draw(
    trial: Trial,
    detector: str,
    images: Tensor,
    planted: Tensor,
    found: Mapping[int, Tensor],
) -> dict[str, Any]:
    """A few images with both triggers, and the first one with the trigger of every label."""
    config, folder = trial.config, trial.study.space.folder / "pictures"
    prefix = f"{detector}-{config.attack}-{trial.seed}"
    mine = found[config.target]
    # One factor each for all pictures that are to be compared.
    gain = residual_gain(torch.cat([planted - images, mine - images])[: 2 * config.pictures])
    of_labels = residual_gain(torch.stack([one[0] - images[0] for one in found.values()]))

    def kept(name: str, image: Tensor, caption: str) -> dict[str, Any]:
        return save_picture(folder, f"{prefix}-{name}", image, caption)

    rows = [
        {
            "original": kept(f"{i}-original", images[i], "original"),
            "planted": kept(f"{i}-planted", planted[i], "with the planted trigger"),
            "planted-change": kept(
                f"{i}-planted-change", amplified(planted[i] - images[i], gain), f"change, x {gain}"
            ),
            "reversed": kept(f"{i}-reversed", mine[i], "with the reversed trigger"),
            "reversed-change": kept(
                f"{i}-reversed-change", amplified(mine[i] - images[i], gain), f"change, x {gain}"
            ),
        }
        for i in range(min(config.pictures, len(images)))
    ]
    labels = {
        str(label): {
            "reversed": kept(f"label-{label}", one[0], f"reversed for label {label}"),
            "change": kept(
                f"label-{label}-change",
                amplified(one[0] - images[0], of_labels),
                f"change, x {of_labels}",
            ),
        }
        for label, one in found.items()
    }
    return {"gain": gain, "labels_gain": of_labels, "rows": rows, "labels": labels}


def _files(drawn: Mapping[str, Any]) -> set[str]:
    rows = [*drawn["rows"], *drawn["labels"].values()]
    return {picture["file"] for row in rows for picture in row.values()}


__all__ = ["SHOWN_LABELS", "compare_triggers"]
