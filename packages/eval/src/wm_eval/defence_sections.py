"""Sections of a results page about defences, each rendered from its folder of records."""

from __future__ import annotations

import json
from pathlib import Path

from wm_eval.attacks.render import markdown
from wm_eval.cleaning.gather import read_cleaning
from wm_eval.cleaning.tables import cleaning_page
from wm_eval.paper2.index_figure import index_page
from wm_eval.paper2.tables import pages as detect_pages
from wm_eval.population.summary import read_scans, summarise
from wm_eval.population.tables import population_tables
from wm_eval.tables import ABSENT, Table, number, percent, to_markdown

POPULATION = "population"
CLEANINGS = {
    "cleaning-cifar10": (
        "Cleaning on CIFAR-10",
        "`wm-eval mitigate --data cifar10 --shares 0.05 --seed 1` makes it: victims that no "
        "setting was chosen on.",
    ),
    "cleaning-cifar10-first": (
        "Cleaning on CIFAR-10, 400 steps",
        "The same with `--steps 400` on the victims of the table of attacks, which settings were "
        "chosen on.",
    ),
    "cleaning-gtsrb": (
        "Cleaning on GTSRB",
        "`wm-eval mitigate --data gtsrb --shares 0.05` makes it.",
    ),
}
DETECTS = {
    "detect-mnist": (
        "The reverse-generator paper's experiment on MNIST",
        "`wm-eval detect --data mnist` makes it.",
    ),
    "detect-gtsrb-vgg16": (
        "The reverse-generator paper's experiment on GTSRB, VGG16",
        "`wm-eval detect --data gtsrb --arch vgg16 --seeds 1 --parts detection` makes it.",
    ),
    "detect-cifar10-vgg16": (
        "The reverse-generator paper's experiment on CIFAR-10, VGG16",
        "`wm-eval detect --data cifar10 --arch vgg16 --seeds 1 --parts detection` makes it.",
    ),
}
INDICES = (
    "figure3-cifar10",
    "figure3-cifar10-reverse",
    "figure3-cifar10-feature-re",
    "figure3-cifar10-bti-dbf",
)
SPEED = {
    "speed-nc": "python packages/defense-nc/benchmarks/bench_inversion.py --out FILE",
    "speed-reverse": "python packages/defense-reverse/benchmarks/bench_reverse.py --out FILE",
}


def defence_parts(results: Path) -> list[str]:
    """Every section whose records are there, in Markdown.

    Args:
        results: A folder with one folder of records for each.
    """
    return [
        *_population(results / POPULATION),
        *(part for name, told in CLEANINGS.items() for part in _cleaning(results / name, *told)),
        *(part for name, told in DETECTS.items() for part in _detect(results / name, *told)),
        *(part for name in INDICES for part in _index(results / name)),
        *_speed(results),
    ]


def _population(folder: Path) -> list[str]:
    if not any(folder.glob("*/records")):
        return []
    found = summarise(read_scans(folder))
    head = [
        "## Error rates of the defences, on many small models",
        "",
        "`hatch run wm-eval population --out results/population` makes it; "
        f"[records]({folder.name}). [What a verdict rests on](../docs/verdicts.md).",
        "",
    ]
    return [*head, *(to_markdown(table) for table in population_tables(found))]


def _cleaning(folder: Path, title: str, told: str) -> list[str]:
    if not (folder / "records").is_dir():
        return []
    study = read_cleaning(folder)
    lines = [f"## {title}", "", f"{told} [Records]({folder.name}/records).", ""]
    return [*lines, _lower(markdown(cleaning_page(study))), ""]


def _detect(folder: Path, title: str, told: str) -> list[str]:
    if not (folder / "records").is_dir():
        return []
    lines = [f"## {title}", "", f"{told} [Records]({folder.name}/records).", ""]
    return [*lines, *(_lower(markdown(page)) for page in detect_pages(folder)), ""]


def _index(folder: Path) -> list[str]:
    if not (folder / "records").is_dir():
        return []
    made = "`wm-eval figure3` on the victims of the table of attacks makes it;"
    links = f"[figure]({folder.name}/figure3.svg), [records]({folder.name}/records)."
    return [markdown(index_page(folder)), f"{made} {links}", ""]


def _speed(results: Path) -> list[str]:
    rows = []
    for name in SPEED:
        path = results / "speed" / f"{name}.json"
        if path.is_file():
            values = json.loads(path.read_text(encoding="utf-8"))
            rows += [
                (
                    values["detector"],
                    way,
                    number(row["factor"]),
                    number(row["cpu_seconds"], digits=1),
                    row["verdict"],
                    ABSENT if row.get("overlap") is None else percent(row["overlap"]),
                )
                for way, row in values["ways"].items()
            ]
    if not rows:
        return []
    headers = ("detector", "way", "times as fast", "CPU seconds", "verdict", "mask overlap")
    note = (
        "PreActResNet-18 of width 16 on CIFAR-10, with a BadNets backdoor for Neural Cleanse and "
        "FTrojan's for the generators, one thread, all ways of a detector in turns in one run. The "
        "factor is the median over rounds of CPU seconds against the reference: one label after "
        "the other, float32, the same stopping rule."
    )
    table = Table("speed", "What a scan costs", headers, tuple(rows), note)
    made = " and ".join(f"`{command}`" for command in SPEED.values())
    return [
        "## Time to a verdict",
        "",
        f"{made} make it; [records](speed).",
        "",
        to_markdown(table),
    ]


def _lower(text: str) -> str:
    """A page's headings, one level down."""
    return "\n".join(f"#{line}" if line.startswith("#") else line for line in text.splitlines())


__all__ = ["defence_parts"]
