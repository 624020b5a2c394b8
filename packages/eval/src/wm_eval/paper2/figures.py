"""Every figure of the experiment that its records have something for; the others say why not."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from wm_eval.paper2.plots import draw_rates, draw_scores
from wm_eval.paper2.sheets import draw_labels, draw_perceptual, draw_triggers
from wm_eval.paper2.summary import DetectRecords, Scan, read_detection

_PLAIN, _PERCEPTUAL = "reverse", "reverse-lpips"


class Figures(NamedTuple):
    """What was drawn, and why the rest was not."""

    drawn: tuple[Path, ...]
    skipped: tuple[str, ...]


def write_figures(out: str | Path) -> Figures:
    """Draw figures 2 to 6 of the paper from an experiment's records and pictures.

    Args:
        out: The experiment's folder. Into ``figures/`` go, by attack, ``figure2-ATTACK.svg``
            (scores and indices), ``figure5-ATTACK.svg`` (learning rates), and of the first seed
            ``figure3-DETECTOR-ATTACK.png`` (labels), ``figure4-DETECTOR-ATTACK.png`` (triggers)
            and ``figure6-ATTACK.png`` (with and without LPIPS).

    Raises:
        ValueError: No records of this experiment, or a picture that is missing.
        RuntimeError: matplotlib is not installed.
    """
    out = Path(out)
    records = read_detection(out)
    folder, pictures = out / "figures", out / "pictures"
    drawn: list[Path] = []
    skipped: list[str] = []
    for attack in records.attacks():
        if any(records.of(detector, attack) for detector in records.detectors()):
            drawn.append(draw_scores(records, attack, folder / f"figure2-{attack}.svg"))
        for detector in records.detectors():
            mine = [s for s in records.pictures if (s.detector, s.attack) == (detector, attack)]
            if mine:
                values, name = records.pictures[min(mine)], f"{detector}-{attack}.png"
                drawn.append(draw_labels(values, pictures, folder / f"figure3-{name}"))
                drawn.append(draw_triggers(values, pictures, folder / f"figure4-{name}"))
        if any(way.attack == attack and v["done"] for way, v in records.rates.items()):
            drawn.append(draw_rates(records, attack, folder / f"figure5-{attack}.svg"))
        seeds = {s.seed for s in records.pictures if (s.detector, s.attack) == (_PLAIN, attack)}
        both = [s for s in sorted(seeds) if Scan(_PERCEPTUAL, attack, s) in records.pictures]
        if both:
            without, with_ = (
                records.pictures[Scan(d, attack, both[0])] for d in (_PLAIN, _PERCEPTUAL)
            )
            path = folder / f"figure6-{attack}.png"
            drawn.append(draw_perceptual(without, with_, pictures, path))
        else:
            skipped.append(f"figure 6, {attack}: {_why(records, attack)}")
    return Figures(tuple(drawn), tuple(skipped))


def _why(records: DetectRecords, attack: str) -> str:
    """Why there is nothing with LPIPS."""
    stage = f"-{_PERCEPTUAL}-{attack}-"
    reasons = [failure.reason for failure in records.failures if stage in failure.stage]
    return reasons[0] if reasons else f"the detector {_PERCEPTUAL} and its pictures were not run"


__all__ = ["Figures", "write_figures"]
