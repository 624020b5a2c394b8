"""The plots of a report, as SVG elements that take their colours and font from the page."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from wm_eval.figures import BLUE, DASHES, FAINT, INK, RED, new_figure, svg_text
from wm_eval.pages.story import VICTIMS, Story, corruptions_in_order
from wm_eval.titles import detector_title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The page has these as variables that change with light and dark.
_VARIABLES = {INK: "--ink", FAINT: "--line", BLUE: "--clean", RED: "--bad"}
_ROW = 0.42  # inches of a row of points


def robustness_figure(story: Story) -> str:
    """Accuracy of both victims, and how often the backdoor opens, under each corruption."""
    clean, bad = story.rates["clean"], story.rates["backdoored"]
    names = corruptions_in_order(clean)
    figure = new_figure(9, 1.5 + _ROW * len(names))
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, metrics, measure, colour, marker, label, shift in (
        (left, clean, "cda", BLUE, "o", "clean victim", 0.12),
        (left, bad, "cda", RED, "s", "backdoored victim", -0.12),
        (right, bad, "asr", RED, "s", "with the trigger", 0.12),
        (right, bad, "ftr", BLUE, "o", "without it", -0.12),
    ):
        rows = [metrics[name] for name in names]
        _points(axes, rows, measure, colour=colour, marker=marker, label=label, shift=shift)
    left.set_title("Clean accuracy (CDA)", loc="left", color=INK, pad=26)
    right.set_title("Backdoored victim: target label given", loc="left", color=INK, pad=26)
    for axes in (left, right):
        _percent_axis(axes)
    _names_axis(left, names)
    return inline_svg(figure, "robustness", "Accuracy and attack success under each corruption")


def scores_figure(story: Story, detector: str) -> str:
    """Every label's score on both victims, with the line that a named label must lie below."""
    figure = new_figure(9, 3.4)
    panels = figure.subplots(1, 2, sharey=True)
    shown: dict[str, Any] = {}
    for axes, victim in zip(panels, VICTIMS, strict=True):
        scan = story.scan(detector, victim)
        axes.set_title(f"{victim} victim", loc="left", color=INK)
        axes.set_xlabel("label")
        if scan is not None:
            _scores(axes, scan)
        handles, labels = axes.get_legend_handles_labels()
        shown.update(zip(labels, handles, strict=True))
    panels[0].set_ylabel("score (small: easy to reach)")
    panels[0].set_ylim(bottom=0)
    style: dict[str, Any] = {"ncols": 6, "frameon": False, "labelcolor": INK}
    figure.legend(list(shown.values()), list(shown), loc="outside lower center", **style)
    title = f"{detector_title(detector)}: score of every label"
    return inline_svg(figure, f"scores-{detector}", title)


def mitigation_figure(story: Story) -> str | None:
    """Accuracy and attack success before and after; None if nothing was cleaned."""
    rows = [
        (f"{detector_title(detector)}: {measure.upper()}", values, measure)
        for detector, values, _ in story.mitigations()
        if values["done"]
        for measure in ("cda", "asr")
    ]
    if not rows:
        return None
    figure = new_figure(9, 1.2 + _ROW * len(rows))
    axes = figure.subplots()
    for y, (_, v, measure) in enumerate(rows):
        ends = [100 * v["before"][measure], 100 * v["after"][measure]]
        axes.plot(ends, [y, y], color=FAINT, linewidth=2, zorder=1)
    for when, colour, marker in (("before", RED, "s"), ("after", BLUE, "o")):
        metrics = [
            {"rate": v[when][m], "rate_interval": v[when][f"{m}_interval"]} for _, v, m in rows
        ]
        _points(axes, metrics, "rate", colour=colour, marker=marker, label=when)
    _percent_axis(axes)
    _names_axis(axes, [name for name, *_ in rows])
    return inline_svg(figure, "mitigation", "Accuracy and attack success before and after cleaning")


def inline_svg(figure: Figure, name: str, title: str) -> str:
    """An ``<svg>`` element that takes its colours and font from the page around it."""
    for axes in figure.axes:
        axes.grid(axis="both", color=FAINT, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(colors=INK, length=0)
        axes.xaxis.label.set_color(INK)
        axes.yaxis.label.set_color(INK)
        for spine in axes.spines.values():
            spine.set_visible(False)
    text = svg_text(figure, name, transparent=True)
    text = text[text.index("<svg") :]
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)
    # Several figures share a page: their ids must not.
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = text.replace("url(#", f"url(#{name}-")
    text = re.sub(r'(?:xlink:)?href="#', f'href="#{name}-', text)
    text = re.sub(r'\s(width|height)="[\d.]+pt"', "", text, count=2)
    return text.replace("<svg", f'<svg role="img" aria-label="{title}"', 1).strip()


def _scores(axes: Axes, scan: Mapping[str, Any]) -> None:
    labels, median = scan["labels"], scan["score_median"]
    axes.axhline(median, color=FAINT, linewidth=1.5, label="median")
    line = scan["max_ratio"] * median
    axes.axhline(line, color=RED, linewidth=1.5, label="default rule's line")
    if scan["paper_line"] > 0:
        line = scan["paper_line"]
        axes.axhline(line, color=INK, linewidth=1, linestyle=DASHES, label="paper's line")
    named = [x for x in labels if x["label"] in scan["suspected"]]
    rest = [x for x in labels if x["label"] not in scan["suspected"]]
    for label, shown, colour, marker, fill in (
        ("not named", [x for x in rest if x["converged"]], BLUE, "o", BLUE),
        ("never reached", [x for x in rest if not x["converged"]], BLUE, "o", "none"),
        ("named", named, RED, "s", RED),
    ):
        if shown:
            xs, ys = [x["label"] for x in shown], [x["score"] for x in shown]
            style: dict[str, Any] = {"color": colour, "markerfacecolor": fill, "markersize": 7}
            axes.plot(xs, ys, marker, label=label, **style)
    if len(labels) <= 12:
        axes.set_xticks([x["label"] for x in labels])


def _points(
    axes: Axes,
    rows: Sequence[Mapping[str, Any]],
    measure: str,
    *,
    colour: str,
    marker: str,
    label: str,
    shift: float = 0.0,
) -> None:
    """Rates with their intervals, a little above or below the line of each row."""
    rates = [row[measure] for row in rows]
    ends = [row[f"{measure}_interval"] for row in rows]
    # Rounded records leave -1e-8 where a rate sits on the end of its interval.
    low = [max(0.0, 100 * (rate - end[0])) for rate, end in zip(rates, ends, strict=True)]
    high = [max(0.0, 100 * (end[1] - rate)) for rate, end in zip(rates, ends, strict=True)]
    ys = [y - shift for y in range(len(rates))]
    style: dict[str, Any] = {"color": colour, "markersize": 6, "elinewidth": 1.5, "label": label}
    axes.errorbar([100 * rate for rate in rates], ys, xerr=[low, high], fmt=marker, **style)


def _percent_axis(axes: Axes) -> None:
    axes.set_xlim(-3, 103)
    axes.set_xlabel("% of test images")
    anchor = (-0.02, 0.99)
    axes.legend(loc="lower left", bbox_to_anchor=anchor, ncols=3, frameon=False, labelcolor=INK)


def _names_axis(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
