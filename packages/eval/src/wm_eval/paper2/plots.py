"""The paper's plots from records, as SVG: figure 2 (indices) and figure 5 (learning rates)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from wm_eval.attacks.config import CLEAN
from wm_eval.attacks.gather import TITLES
from wm_eval.paper2.cells import detector_title, method_title
from wm_eval.paper2.summary import DetectRecords
from wm_inject.core.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT, BLUE, RED = "#1d2024", "#d9dbd7", "#2a6aa8", "#c0392b"
_MARKERS = "osD^v*"


def draw_scores(records: DetectRecords, attack: str, path: Path) -> Path:
    """Figure 2: what the labels score, and the index of clean and backdoored models.

    For each detector, at the left the paper's figure: the scores of clean labels, as shares of
    their own model's median, with the target labels beside them. At the right what the rule makes
    of them, with its threshold. A box spans the quartiles, its whiskers everything.

    Args:
        records: Of one folder.
        attack: Whose backdoored models.
        path: The SVG file. The same records and matplotlib give the same bytes.

    Raises:
        ValueError: No scan of such a model.
        RuntimeError: matplotlib is not installed.
    """
    detectors = [d for d in records.detectors() if records.of(d, attack)]
    if not detectors:
        raise ValueError(f"expected scans of models with {attack}, found none")
    figure = new_figure(8.5, 3.2 * len(detectors))
    panels = figure.subplots(len(detectors), 2, squeeze=False)
    for (left, right), detector in zip(panels, detectors, strict=True):
        bad, clean = records.of(detector, attack), records.of(detector, CLEAN)
        title = detector_title(detector)
        left.set_title(f"{title}: scores", loc="left")
        groups = {
            "clean models,\nall labels": [x for scan in clean for x in _shares(scan, None)],
            "backdoored,\nclean labels": [x for scan in bad for x in _shares(scan, False)],
            "backdoored,\ntarget label": [x for scan in bad for x in _shares(scan, True)],
        }
        _boxes(left, groups, (BLUE, BLUE, RED))
        left.set_ylabel("score / median of its model")
        right.set_title(f"{title}: anomaly index", loc="left")
        indices = {
            f"{name}\n(n = {len(scans)})": [
                scan["paper_index"] for scan in scans if scan["paper_index"] is not None
            ]
            for name, scans in (("clean", clean), (TITLES.get(attack, attack), bad))
        }
        _boxes(right, indices, (BLUE, RED))
        right.axhline(2, color=INK, linestyle=(0, (4, 3)), linewidth=1)
        right.set_ylim(0, max(2.2, right.get_ylim()[1]))  # the threshold stays in sight
        right.set_ylabel("index of the model")
    return save_svg(figure, path)


def draw_rates(records: DetectRecords, attack: str, path: Path) -> Path:
    """Figure 5: accuracy and attack success after cleaning, against the learning rate.

    Args:
        records: Of one folder, with a sweep.
        attack: Whose backdoored models.
        path: The SVG file.

    Raises:
        ValueError: No sweep of such a model, or one in which nothing was cleaned.
        RuntimeError: matplotlib is not installed.
    """
    found: dict[str, dict[float, list[Mapping[str, Any]]]] = {}
    for way, values in sorted(records.rates.items()):
        if way.attack == attack and values["done"]:
            found.setdefault(way.method, {}).setdefault(way.lr, []).append(values["after"])
    if not found:
        raise ValueError(f"expected a sweep of learning rates on {attack}, found none")
    figure = new_figure(8.5, 3.4)
    panels = figure.subplots(1, 2, squeeze=False)[0]
    for axes, rate, title in zip(
        panels, ("cda", "asr"), ("Accuracy (ACC)", "Attack success (ASR)"), strict=True
    ):
        for marker, (method, points) in zip(_MARKERS, found.items(), strict=False):
            rates = [100 * fmean(v[rate] for v in points[lr]) for lr in points]
            axes.plot(list(points), rates, marker=marker, label=method_title(method))
        axes.set_xscale("log")
        axes.set_ylim(-3, 103)
        axes.set_xlabel("learning rate")
        axes.set_ylabel("% of test images")
        axes.set_title(title, loc="left")
    panels[1].legend(frameon=False, fontsize=8)
    return save_svg(figure, path)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches.

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError("expected matplotlib for plots: pip install wm-eval") from error
    return Figure(figsize=(width, height), layout="constrained")


def save_svg(figure: Figure, path: Path) -> Path:
    """Write a figure as an SVG file on white; text stays text, and bytes repeat."""
    import matplotlib

    for axes in figure.axes:
        axes.grid(axis="y", color=FAINT, linewidth=0.6)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    # No date and a fixed salt: the same records draw the same bytes.
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    salt = f"wm-eval-{path.stem}"
    with (
        matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}),
        atomic_path(path) as part,
    ):
        figure.savefig(part, format="svg", metadata=nothing)
    return path


def _shares(scan: Mapping[str, Any], target: bool | None) -> list[float]:
    """Scores over their model's median: of the target label, of the others, or of all (None)."""
    median = scan["score_median"]
    return [
        row["score"] / median if median > 0 else 1.0
        for row in scan["labels"]
        if target is None or (row["label"] == scan["true_target"]) == target
    ]


def _boxes(axes: Axes, groups: Mapping[str, Sequence[float]], colours: Sequence[str]) -> None:
    """A box a group with its points beside each other on top; nothing for an empty one."""
    for place, (values, colour) in enumerate(zip(groups.values(), colours, strict=True)):
        if not values:
            continue
        axes.boxplot(
            list(values),
            positions=[place],
            widths=0.5,
            whis=(0, 100),
            showfliers=False,
            boxprops={"color": colour},
            whiskerprops={"color": colour},
            capprops={"color": colour},
            medianprops={"color": colour},
        )
        # Spread evenly, so that equal values stay apart and the same ones land the same way.
        across = [place - 0.15 + 0.3 * (i % 7) / 6 for i in range(len(values))]
        axes.plot(across, list(values), ".", color=colour, alpha=0.5, markersize=4)
    axes.set_xticks(range(len(groups)), list(groups))
    axes.set_xlim(-0.6, len(groups) - 0.4)
    axes.set_ylim(bottom=0)


__all__ = ["draw_rates", "draw_scores", "new_figure", "save_svg"]
