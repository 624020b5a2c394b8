"""Write results/README.md from the records under results/: every number there comes from a record.

Run ``python tools/render_results.py`` after records were added; a test holds the page to them.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wm_eval.artefact_section import artefact_parts
from wm_eval.attacks.config import RECIPES
from wm_eval.attacks.gather import read_study
from wm_eval.attacks.learning import learning
from wm_eval.attacks.render import markdown
from wm_eval.attacks.tables import table1, table2
from wm_eval.defence_sections import defence_parts
from wm_eval.paper2.summary import summarise_detection
from wm_eval.records import Record, read_records, write_text
from wm_eval.speed_section import speed_parts
from wm_eval.summary import headline, story
from wm_eval.tables import DEFENCES, Table, percent, to_markdown, with_interval
from wm_inject.command.common import run_cli

RESULTS = Path(__file__).resolve().parents[1] / "results"
STUDIES = {
    "demo": ("The demo: bundled handwritten digits", "hatch run demo --out results/demo"),
    "cifar10": (
        "CIFAR-10, 20 thousand training images",
        "hatch run wm-eval run docs/studies/cifar10.toml --out results/cifar10",
    ),
}
DETECTIONS = {
    "mnist-detection": (
        "Five seeds of detection",
        "`hatch run wm-eval detect --out results/mnist-detection` makes it.",
    ),
    "mnist-detection-single-start": (
        "The same with one search per label",
        "What Neural Cleanse found when each label was searched once, from a random mask: the "
        "reason for three searches, whose starts were then chosen on other seeds (100 to 102).",
    ),
}
ATTACKS = {
    "attacks-cifar10": (
        "Twelve attacks on CIFAR-10",
        "wm-eval table1 --profile small --data cifar10",
    ),
    "attacks-mnist": (
        "The three attacks that take part in training, on MNIST",
        "wm-eval table1 --profile small --data mnist",
    ),
}
HEAD = """# Results

Every number on this page is rendered from the records beside it (`tools/render_results.py`). A
record holds its settings, seed, data fingerprint and versions; wall time and hardware stand in its
`.env.json`. All of this ran on two shared CPU cores. Pictures of data sets that may not be passed
on are left out of the reports.
"""


def detection_table(records: Mapping[str, Record]) -> Table:
    """Seeds in which each defence named the target, or another label, under both rules."""
    rows = [
        (
            DEFENCES[row["defence"]],
            row["attack"],
            str(row["n"]),
            percent(row["asr_min"]),
            _of(row["named_target"], row),
            _of(row["named_other"], row, always=True),
            _of(row["paper_named_target"], row),
            _of(row["paper_named_other"], row, always=True),
            f"{row['paper_index_mean']:.2f}",
        )
        for row in summarise_detection(records)
    ]
    headers = (
        "defence",
        "victims",
        "seeds",
        "lowest ASR",
        "target named",
        "another label named",
        "paper's rule: target",
        "paper's rule: another",
        "mean paper's index",
    )
    note = (
        "A clean victim has no target; its ASR is what a BadNets patch does to it. The paper's "
        "rule is an index above 2 (ordinary median); ours is in docs/recipes.md."
    )
    return Table("detection", "MNIST, WaNet's network", headers, tuple(rows), note)


def _of(count: int, row: Mapping[str, Any], *, always: bool = False) -> str:
    if row["attack"] == "none" and not always:
        return "–"
    return f"{count} of {row['n']}"


def ablation_table(records: Mapping[str, Record]) -> Table:
    """Stealth and bits of injectors that differ in one thing."""
    rows = []
    for name, record in records.items():
        v = record.values
        d = v["detection"]
        four = {k: v["bits"][k]["marked"] for k in ("mask", "rotation", "noise", "rescale")}
        rows.append(
            (
                name.removeprefix("injector-"),
                str(record.config["settings"]["recipe"]["iterations"]),
                f"{v['stealth']['psnr']['mean']:.2f}",
                f"{255 * v['stealth']['linf']['mean']:.0f}",
                percent(v["bits"]["none"]["marked"]),
                *(percent(value) for value in four.values()),
                percent(v["bits"]["jpeg"]["marked"]),
                f"{percent(d['tpr'])} / {percent(d['fpr'])}",
            )
        )
    headers = (
        "recipe",
        "steps",
        "PSNR (dB)",
        "largest change (of 255)",
        "bits, none",
        "mask",
        "rotation",
        "noise",
        "re-scale",
        "JPEG",
        "marked found / false",
    )
    note = (
        "Balanced bit accuracy of the one fixed mark on held-out images; a constant output scores "
        "50 %."
    )
    return Table(
        "ablation", "Injectors on CIFAR-10 that differ in one thing", headers, tuple(rows), note
    )


def gap_table(study: Mapping[str, Record], gap: Mapping[str, Record]) -> Table:
    """The clean accuracy of the study's victims beside those that differ in one thing."""
    victims = study["robustness"].values["victims"]
    rows = {
        "clean data": victims["clean"]["none"],
        "clean data without the images that the plan poisons": gap["victim-fewer"].values,
        "the plan with a BadNets patch": gap["victim-badnets"].values,
        "the plan with the watermark": victims["backdoored"]["none"],
    }
    cells = tuple(
        (name, with_interval(v["cda"], v["cda_interval"]), str(v["n_clean"]))
        for name, v in rows.items()
    )
    note = (
        "One recipe, one seed. Intervals are of each rate alone (Wilson); the pairs share images."
    )
    return Table(
        "gap", "CIFAR-10: where the accuracy goes", ("trained on", "CDA", "n"), cells, note
    )


def learning_table(records: Mapping[str, Record]) -> Table:
    """When victims that differ in one thing learned their backdoor."""
    rows = []
    for name, record in records.items():
        values = record.values
        learned, last = values["learned"], values["watched"][-1]
        rows.append(
            (
                name,
                str(len(values["watched"])),
                str(learned["epoch"]) if learned else "not learned",
                str(learned["exposures"]) if learned else "–",
                str(learned["steps"]) if learned else "–",
                percent(last["asr"]),
                f"{last['poison_loss']:.2f}",
                percent(last["cda"]),
            )
        )
    headers = (
        "victim",
        "epochs",
        "learned in epoch",
        "after exposures",
        "after steps",
        "ASR at the end",
        "loss on poisoned images",
        "CDA",
    )
    note = (
        "Learned: attack success of 90 % on held-out images at the end of an epoch. The base is "
        "BadNets, ResNet-10 of width 16, 20,000 images, batches of 32, peak rate 0.03, 4 epochs, "
        "no augmentation, from scratch; one seed. Names say what differs."
    )
    return Table("learning", "One thing at a time", headers, tuple(rows), note)


def recipes_table(records: Mapping[str, Record]) -> Table:
    """The accuracy that recipes and layouts of training reach."""
    rows = []
    for name, record in records.items():
        told, reached = record.config["settings"], record.values["watched"]
        rows.append(
            (
                name.partition("-")[0],
                told.get("layout", "channels-last"),
                str(told["epochs"]),
                str(told["batch_size"]),
                *(percent(reached[len(reached) * k // 4 - 1]["accuracy"]) for k in (1, 2, 3, 4)),
                str(record.values["n"]),
            )
        )
    headers = ("recipe", "layout", "epochs", "batch", "¼", "½", "¾", "at the end", "n")
    note = (
        "Clean accuracy on CIFAR-10's test images after a share of the epochs, ResNet-18 of width "
        "16, 20,000 training images, one seed; nothing was chosen by it. The published recipe is "
        "for all images and a network of its own."
    )
    return Table("recipes", "As many epochs for each", headers, tuple(rows), note)


def attack_parts(folder: Path, title: str, command: str) -> list[str]:
    """A study of attacks: its tables, and where their other forms are."""
    study = read_study(folder)
    pages = [table1(study, recipe) for recipe in RECIPES if study.started(recipe)]
    pages += [table2(study), learning(study)]
    here = folder.name
    parts = [f"## {title}", "", f"`{command}` and `table2` make it; "]
    parts[-1] += f"[tables]({here}/tables) as LaTeX, CSV and HTML too, [records]({here}/records)."
    for page in pages:
        parts += ["", to_heading(markdown(page))]
    return [*parts, ""]


def to_heading(text: str) -> str:
    """A page's headings, one level down."""
    return "\n".join(f"#{line}" if line.startswith("#") else line for line in text.splitlines())


def render(results: Path) -> str:
    """The page for the folders of records that are there."""
    parts = [HEAD]
    if (results / "tiny" / "README.md").is_file():
        parts += [
            "## Both papers, small",
            "",
            "`hatch run python tools/reproduce.py --profile tiny --workers 2 --out results/tiny` "
            "makes a [page of its own](tiny/README.md): every table and figure, on the bundled "
            "digits.",
            "",
        ]
    for name, (title, command) in STUDIES.items():
        if not (results / name / "records").is_dir():
            continue
        records = read_records(results / name / "records")
        parts += [f"## {title}", "", f"`{command}` makes it; [report]({name}/report.html), ", ""]
        parts[-2] += f"[tables]({name}/tables.md), [records]({name}/records)."
        parts += ["```", *story(records), "```", "", *(f"{s}\n" for s in headline(records))]
    if (results / "cifar10-gap" / "records").is_dir():
        study = read_records(results / "cifar10" / "records")
        parts += [
            "`hatch run python tools/explain_gap.py docs/studies/cifar10.toml --out "
            "results/cifar10-gap` makes the two in the middle; [records](cifar10-gap/records).",
            "",
            to_markdown(gap_table(study, read_records(results / "cifar10-gap" / "records"))),
        ]
    parts += artefact_parts(results / "artefacts-cifar10")
    parts += speed_parts(results / "speed")
    parts += defence_parts(results)
    for name, (title, text) in DETECTIONS.items():
        if (results / name / "records").is_dir():
            table = detection_table(read_records(results / name / "records"))
            parts += [f"## {title}", "", f"{text} [Records]({name}/records).", ""]
            parts.append(to_markdown(table))
    if (results / "ablation-injector" / "records").is_dir():
        parts += [
            "## What each part of the injector's recipe is worth",
            "",
            "`hatch run python tools/ablate_injector.py --limit 20000 --out "
            "results/ablation-injector` makes it; [records](ablation-injector/records).",
            "",
            to_markdown(ablation_table(read_records(results / "ablation-injector" / "records"))),
        ]
    for name, (title, command) in ATTACKS.items():
        if (results / name / "records").is_dir():
            parts += attack_parts(results / name, title, command)
    if (results / "learning" / "records").is_dir():
        parts += [
            "## What decides whether a backdoor is learned",
            "",
            "`hatch run python tools/explain_learning.py --out results/learning` makes it; "
            "[records](learning/records).",
            "",
            to_markdown(learning_table(read_records(results / "learning" / "records"))),
        ]
    if (results / "recipes-cifar10" / "records").is_dir():
        parts += [
            "## Recipes of training",
            "",
            "`hatch run python tools/compare_recipes.py --out results/recipes-cifar10` makes it; "
            "[records](recipes-cifar10/records).",
            "",
            to_markdown(recipes_table(read_records(results / "recipes-cifar10" / "records"))),
        ]
    return "\n".join(parts)


def _main(argv: Sequence[str] | None) -> int:
    write_text(RESULTS / "README.md", render(RESULTS))
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(_main))
