"""Plots from records as SVG: text stays text, and the same records draw the same bytes."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

from wm_eval import sheets
from wm_eval.numbers import keys
from wm_eval.pages.detection import THRESHOLD, scans_by_attack, scans_of
from wm_eval.pages.story import VICTIMS, Story
from wm_eval.records import Record, StudyRecords, read_study
from wm_eval.titles import (
    ATTACKS,
    CLEAN,
    attack_title,
    detector_title,
    in_order,
    method_title,
    short_attack_title,
)
from wm_inject.core.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT, BLUE, RED = "#1d2024", "#d9dbd7", "#2a6aa8", "#c0392b"
_MARKERS = "osD^v*"
DASHES = (0, (4, 3))


class Figures(NamedTuple):
    """The files that were drawn, and why others were not."""

    drawn: tuple[Path, ...]
    skipped: tuple[str, ...]


def draw_figures(folder: str | Path, *, dataset_images: bool = True) -> Figures:
    """Draw every figure that a study's records and pictures suffice for, into ``figures/``.

    Of attacks: ``figure1.png``. Of scans of several attacks: ``index-DETECTOR.svg``. Of clean and
    backdoored models, by attack: ``figure2-ATTACK.svg`` (scores), ``figure5-ATTACK.svg`` (learning
    rates), and of the first seed ``figure3-DETECTOR-ATTACK.png`` (labels),
    ``figure4-DETECTOR-ATTACK.png`` (triggers) and ``figure6-ATTACK.png`` (LPIPS).

    Of one watermark: ``watermark.png`` and ``reversed-DETECTOR.png``.

    Args:
        folder: The study's folder.
        dataset_images: False leaves the data set's images out of the last two.

    Raises:
        ValueError: No records, or a picture that is missing.
        RuntimeError: matplotlib is not installed.
    """
    folder = Path(folder)
    study = read_study(folder)
    out, pictures = folder / "figures", folder / "pictures"
    if study.select(kind="mark"):
        return Figures(tuple(_draw_story(Story(study), pictures, out, dataset_images)), ())
    drawn: list[Path] = []
    skipped: list[str] = []
    if not pictures.is_dir():
        skipped.append("sheets of pictures: the study has no pictures")
    elif study.select(kind="tiles"):
        drawn.append(sheets.draw_attacks(study, pictures, out / "figure1.png"))
    detectors = keys(study, "scan", "detector")
    attacks = in_order(set(keys(study, "scan", "attack")) - {CLEAN}, ATTACKS)
    if keys(study, "scan", "split"):
        attacks, skipped = [], []
    elif len(attacks) > 2:
        drawn += [draw_index(study, name, out / f"index-{name}.svg") for name in detectors]
        attacks = []
    for attack in attacks:
        drawn.append(draw_scores(study, attack, out / f"figure2-{attack}.svg"))
        first = {}
        for detector in detectors if pictures.is_dir() else ():
            records = study.select(kind="closeness", detector=detector, attack=attack)
            if records:
                first[detector] = min(records, key=lambda r: r.key["seed"])
                values, name = first[detector].values, f"{detector}-{attack}.png"
                drawn.append(sheets.draw_labels(values, pictures, out / f"figure3-{name}"))
                drawn.append(sheets.draw_triggers(values, pictures, out / f"figure4-{name}"))
        if any(r.values["done"] for r in _sweep(study, attack)):
            drawn.append(draw_rates(study, attack, out / f"figure5-{attack}.svg"))
        if not first:
            continue
        if {"reverse", "reverse-lpips"} <= first.keys():
            pair = (first["reverse"].values, first["reverse-lpips"].values)
            drawn.append(sheets.draw_perceptual(*pair, pictures, out / f"figure6-{attack}.png"))
        else:
            reasons = [f.reason for f in study.failures if f.key.get("detector") == "reverse-lpips"]
            why = reasons[0] if reasons else "the detector reverse-lpips was not run"
            skipped.append(f"figure 6, {attack}: {why}")
    return Figures(tuple(drawn), tuple(skipped))


def draw_scores(study: StudyRecords, attack: str, path: Path) -> Path:
    """For each detector the labels' scores over their model's median, and the models' indices.

    A box spans the quartiles, its whiskers everything.

    Raises:
        ValueError: No scan of a model with this attack.

    Source: Zheng, Hua and Zhang, figure 2.
    """
    detectors = [d for d in keys(study, "scan", "detector") if scans_of(study, d, attack)]
    if not detectors:
        raise ValueError(f"expected scans of models with {attack}, found none")
    figure = new_figure(8.5, 3.2 * len(detectors))
    panels = figure.subplots(len(detectors), 2, squeeze=False)
    for (left, right), detector in zip(panels, detectors, strict=True):
        bad, clean = scans_of(study, detector, attack), scans_of(study, detector, CLEAN)
        title = detector_title(detector)
        left.set_title(f"{title}: scores", loc="left")
        groups = {
            "clean models,\nall labels": [x for scan in clean for x in _ratios(scan, None)],
            "backdoored,\nclean labels": [x for scan in bad for x in _ratios(scan, False)],
            "backdoored,\ntarget label": [x for scan in bad for x in _ratios(scan, True)],
        }
        _boxes(left, groups, (BLUE, BLUE, RED))
        left.set_ylabel("score / median of its model")
        right.set_title(f"{title}: anomaly index", loc="left")
        indices = {
            f"{name}\n(n = {len(scans)})": [
                scan["paper_index"] for scan in scans if scan["paper_index"] is not None
            ]
            for name, scans in (("clean", clean), (attack_title(attack), bad))
        }
        _boxes(right, indices, (BLUE, RED))
        right.axhline(THRESHOLD, color=INK, linestyle=DASHES, linewidth=1)
        right.set_ylim(0, max(2.2, right.get_ylim()[1]))  # the threshold stays in sight
        right.set_ylabel("index of the model")
    return save_svg(figure, path)


def draw_rates(study: StudyRecords, attack: str, path: Path) -> Path:
    """Accuracy and attack success after mitigation, against the learning rate.

    Raises:
        ValueError: No sweep of learning rates, or one in which nothing was cleaned.

    Source: Zheng, Hua and Zhang, figure 5.
    """
    series: dict[str, dict[float, list[Mapping[str, Any]]]] = {}
    for record in sorted(_sweep(study, attack), key=lambda r: (r.key["method"], r.key["lr"])):
        if record.values["done"]:
            rates = series.setdefault(str(record.key["method"]), {})
            rates.setdefault(float(record.key["lr"]), []).append(record.values["after"])
    if not series:
        raise ValueError(f"expected a sweep of learning rates on {attack}, found none")
    figure = new_figure(8.5, 3.4)
    panels = figure.subplots(1, 2, squeeze=False)[0]
    titles = ("Accuracy (ACC)", "Attack success (ASR)")
    for axes, measure, title in zip(panels, ("cda", "asr"), titles, strict=True):
        for marker, (method, rates) in zip(_MARKERS, series.items(), strict=False):
            means = [100 * fmean(v[measure] for v in values) for values in rates.values()]
            axes.plot(list(rates), means, marker=marker, label=method_title(method))
        axes.set_xscale("log")
        axes.set_ylim(-3, 103)
        axes.set_xlabel("learning rate")
        axes.set_ylabel("% of test images")
        axes.set_title(title, loc="left")
    panels[1].legend(frameon=False, fontsize=8)
    return save_svg(figure, path)


def draw_index(study: StudyRecords, detector: str, path: Path) -> Path:
    """A bar an attack, a dot a seed; what is infinite is drawn to the top and said so.

    Source: Wang et al., "Spy-Watermark", figure 3.
    """
    values = {
        attack: [r.values["paper_index"] for r in records]
        for attack, records in scans_by_attack(study, detector).items()
    }
    finite = [x for indices in values.values() for x in indices if x is not None]
    top = 1.1 * max([*finite, THRESHOLD])
    figure = new_figure(max(5.0, 0.75 * len(values) + 1), 3.6)
    axes = figure.subplots()
    for x, (attack, indices) in enumerate(values.items()):
        shown = [top if value is None else value for value in indices]
        axes.bar(x, fmean(shown), 0.6, color=BLUE if attack == CLEAN else INK, alpha=0.35)
        axes.plot([x] * len(shown), shown, ".", color=INK)
        if None in indices:
            axes.annotate("infinite", (x, top), ha="center", va="bottom", fontsize=8)
    axes.axhline(THRESHOLD, color=RED, linestyle=DASHES, linewidth=1.2)
    names = [short_attack_title(attack) for attack in values]
    axes.set_xticks(range(len(values)), names, rotation=45, ha="right")
    axes.set_ylim(0, 1.08 * top)
    axes.set_ylabel("anomaly index")
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
    """Write a figure on white."""
    for axes in figure.axes:
        axes.grid(axis="y", color=FAINT, linewidth=0.6)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as part:
        part.write_text(svg_text(figure, path.stem), encoding="utf-8")
    return path


def svg_text(figure: Figure, name: str, **how: Any) -> str:
    """SVG with a fixed salt and without a date."""
    import matplotlib

    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": f"wm-eval-{name}"}):
        figure.savefig(buffer, format="svg", metadata=nothing, **how)
    return buffer.getvalue()


def _draw_story(story: Story, pictures: Path, out: Path, dataset_images: bool) -> Iterator[Path]:
    if (tiles := story.get("tiles")) is not None:
        path, images = out / "watermark.png", dataset_images
        yield sheets.draw_watermark(tiles, pictures, path, dataset_images=images)
    for detector in story.detectors:
        records, suspected = {}, {}
        for victim in VICTIMS:
            record = story.victims("reversed", victim, detector=detector)
            scan = story.scan(detector, victim)
            if record is not None and scan is not None:
                records[victim], suspected[victim] = record, scan["suspected"]
        if records:
            path = out / f"reversed-{detector}.png"
            yield sheets.draw_reversed(records, suspected, pictures, path)


def _sweep(study: StudyRecords, attack: str) -> list[Record]:
    """The mitigations of the sweep of learning rates."""
    return [r for r in study.select(kind="mitigation", attack=attack) if "lr" in r.key]


def _ratios(scan: Mapping[str, Any], target: bool | None) -> list[float]:
    """Scores over their model's median: of the target label, of the others, or of all (None)."""
    median = scan["score_median"]
    return [
        row["score"] / median if median > 0 else 1.0
        for row in scan["labels"]
        if target is None or (row["label"] == scan["true_target"]) == target
    ]


def _boxes(axes: Axes, groups: Mapping[str, Sequence[float]], colours: Sequence[str]) -> None:
    """A box a group with its values beside each other on top; nothing for an empty one."""
    for x, (values, colour) in enumerate(zip(groups.values(), colours, strict=True)):
        if not values:
            continue
        parts = ("boxprops", "whiskerprops", "capprops", "medianprops")
        style: dict[str, Any] = {part: {"color": colour} for part in parts}
        whole = (0, 100)
        axes.boxplot(list(values), positions=[x], widths=0.5, whis=whole, showfliers=False, **style)
        # Spread evenly, so that equal values stay apart and the same ones land the same way.
        across = [x - 0.15 + 0.3 * (i % 7) / 6 for i in range(len(values))]
        axes.plot(across, list(values), ".", color=colour, alpha=0.5, markersize=4)
    axes.set_xticks(range(len(groups)), list(groups))
    axes.set_xlim(-0.6, len(groups) - 0.4)
    axes.set_ylim(bottom=0)
