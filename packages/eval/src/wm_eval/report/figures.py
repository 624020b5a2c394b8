"""The plots of a report as inline SVG: text stays text, colours follow the page, bytes repeat."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from wm_eval.records import Record
from wm_eval.tables import DEFENCES, VICTIMS, in_order

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.legend import Legend

# Stand-ins: matplotlib wants colours, the page has variables that change with light and dark.
INK, FAINT, BLUE, RED = "#010203", "#020304", "#030405", "#040506"
_VARIABLES = {INK: "--ink", FAINT: "--line", BLUE: "--clean", RED: "--bad"}
_ROW = 0.42  # inches that one corruption takes


def robustness_figure(record: Record) -> str:
    """Accuracy of both victims, and how often the backdoor opens, under each corruption."""
    clean, bad = (record.values["victims"][victim] for victim in VICTIMS)
    names = in_order(clean)
    figure = _figure(9, 1.5 + _ROW * len(names))
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, found, what, colour, marker, label, shift in (
        (left, clean, "cda", BLUE, "o", "clean victim", 0.12),
        (left, bad, "cda", RED, "s", "backdoored victim", -0.12),
        (right, bad, "asr", RED, "s", "with the trigger", 0.12),
        (right, bad, "ftr", BLUE, "o", "without it", -0.12),
    ):
        rates = [found[name][what] for name in names]
        ends = [found[name][f"{what}_interval"] for name in names]
        _dots(axes, rates, ends, colour=colour, marker=marker, label=label, shift=shift)
    left.set_title("Clean accuracy (CDA)", loc="left", color=INK, pad=26)
    right.set_title("Backdoored victim: target label given", loc="left", color=INK, pad=26)
    for axes in (left, right):
        _percent_axis(axes)
    _names_axis(left, names)
    return _svg(figure, "robustness", "Accuracy and attack success under each corruption")


def scores_figure(records: Mapping[str, Record], defence: str) -> str:
    """Every label's score on both victims, with the line that a named label must lie below."""
    figure = _figure(9, 3.4)
    panels = figure.subplots(1, 2, sharey=True)
    shown: dict[str, Any] = {}
    for axes, victim in zip(panels, VICTIMS, strict=True):
        record = records.get(f"scan-{defence}-{victim}")
        axes.set_title(f"{victim} victim", loc="left", color=INK)
        axes.set_xlabel("label")
        if record is not None:
            _scores(axes, record.values)
        handles, labels = axes.get_legend_handles_labels()
        shown.update(zip(labels, handles, strict=True))
    panels[0].set_ylabel("score (small: easy to reach)")
    panels[0].set_ylim(bottom=0)
    legend = figure.legend(
        shown.values(), shown.keys(), loc="outside lower center", ncols=6, frameon=False
    )
    _colour(legend)
    return _svg(figure, f"scores-{defence}", f"{DEFENCES[defence]}: score of every label")


def cleaning_figure(records: Mapping[str, Record]) -> str | None:
    """Accuracy and attack success before and after; None if nothing was cleaned."""
    done = [
        (title, records[f"cleaning-{defence}"].values)
        for defence, title in DEFENCES.items()
        if f"cleaning-{defence}" in records and records[f"cleaning-{defence}"].values["done"]
    ]
    if not done:
        return None
    rows = [(f"{title}: {what.upper()}", v, what) for title, v in done for what in ("cda", "asr")]
    figure = _figure(9, 1.2 + _ROW * len(rows))
    axes = figure.subplots()
    for y, (_, v, what) in enumerate(rows):
        ends = [100 * v["before"][what], 100 * v["after"][what]]
        axes.plot(ends, [y, y], color=FAINT, linewidth=2, zorder=1)
    for key, colour, marker in (("before", RED, "s"), ("after", BLUE, "o")):
        rates = [v[key][what] for _, v, what in rows]
        intervals = [v[key][f"{what}_interval"] for _, v, what in rows]
        _dots(axes, rates, intervals, colour=colour, marker=marker, label=key)
    _percent_axis(axes)
    _names_axis(axes, [name for name, *_ in rows])
    return _svg(figure, "cleaning", "Accuracy and attack success before and after cleaning")


def _scores(axes: Axes, values: Mapping[str, Any]) -> None:
    labels, median = values["labels"], values["score_median"]
    axes.axhline(median, color=FAINT, linewidth=1.5, label="median")
    line = values["max_ratio"] * median
    axes.axhline(line, color=RED, linewidth=1.5, label="default rule's line")
    if values["paper_line"] > 0:
        dashes = (0, (4, 3))
        axes.axhline(
            values["paper_line"], color=INK, linewidth=1, linestyle=dashes, label="paper's line"
        )
    named = [x for x in labels if x["label"] in values["suspected"]]
    rest = [x for x in labels if x["label"] not in values["suspected"]]
    for label, shown, colour, marker, fill in (
        ("not named", [x for x in rest if x["converged"]], BLUE, "o", BLUE),
        ("never reached", [x for x in rest if not x["converged"]], BLUE, "o", "none"),
        ("named", named, RED, "s", RED),
    ):
        if shown:
            places, scores = [x["label"] for x in shown], [x["score"] for x in shown]
            axes.plot(
                places,
                scores,
                marker,
                label=label,
                markersize=7,
                color=colour,
                markerfacecolor=fill,
            )
    if len(labels) <= 12:
        axes.set_xticks([x["label"] for x in labels])


def _dots(
    axes: Axes,
    rates: Sequence[float],
    ends: Sequence[Sequence[float]],
    *,
    colour: str,
    marker: str,
    label: str,
    shift: float = 0.0,
) -> None:
    """A column of points with their intervals, a little above or below the line of each name."""
    # Rounded records leave -1e-8 where a rate sits on the end of its interval.
    low = [max(0.0, 100 * (rate - end[0])) for rate, end in zip(rates, ends, strict=True)]
    high = [max(0.0, 100 * (end[1] - rate)) for rate, end in zip(rates, ends, strict=True)]
    axes.errorbar(
        [100 * rate for rate in rates],
        [y - shift for y in range(len(rates))],
        xerr=[low, high],
        fmt=marker,
        color=colour,
        markersize=6,
        elinewidth=1.5,
        label=label,
    )


def _percent_axis(axes: Axes) -> None:
    axes.set_xlim(-3, 103)
    axes.set_xlabel("% of test images")
    _colour(axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 0.99), ncols=3, frameon=False))


def _names_axis(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)


def _colour(legend: Legend) -> None:
    for text in legend.get_texts():
        text.set_color(INK)


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError("expected matplotlib for plots: pip install wm-eval") from error
    return Figure(figsize=(width, height), layout="constrained")


def _svg(figure: Figure, name: str, title: str) -> str:
    """The figure as an ``<svg>`` element that takes its colours and its font from the page."""
    import matplotlib

    for axes in figure.axes:
        axes.grid(axis="both", color=FAINT, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(colors=INK, length=0)
        axes.xaxis.label.set_color(INK)
        axes.yaxis.label.set_color(INK)
        for spine in axes.spines.values():
            spine.set_visible(False)
    buffer = io.StringIO()
    # No date and a fixed salt: the same records draw the same bytes.
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": f"wm-eval-{name}"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
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
