"""Write the pages under results/, one a question, and the CSV of every table, from the records.

Run ``python tools/render_results.py`` after records were added; a test holds the pages to them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from wm_eval.numbers import keys
from wm_eval.pages import page_text
from wm_eval.pages.attacks import attack_pages
from wm_eval.pages.calibration import calibration_page, shipped_table
from wm_eval.pages.detection import detection_page, index_page
from wm_eval.pages.mitigation import mitigation_page, paper_page
from wm_eval.pages.story import story_page
from wm_eval.pages.story_text import headline, story_lines
from wm_eval.records import StudyRecords, read_study
from wm_eval.render import Page, Table, markdown, tidy_csv, to_markdown
from wm_eval.titles import in_order
from wm_inject.command.common import run_cli
from wm_inject.core.files import write_text

# Run as a script, Python would look for `tools` inside tools/.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from tools import result_tables as tables

RESULTS = Path(__file__).resolve().parents[1] / "results"
STORIES = {
    "demo": "The demo: bundled handwritten digits",
    "cifar10": "CIFAR-10, 20 thousand training images",
}
ATTACKS = {
    "attacks-cifar10": "Twelve attacks on CIFAR-10",
    "bpp-cifar10": "BppAttack beside WaNet on CIFAR-10",
    "attacks-mnist": "The three attacks that take part in training, on MNIST",
}
DIFFERENCES = """\
What differs from the paper:

- The network and the recipe are [airbench](../docs/training.md), 12 epochs in bfloat16, label
  smoothing 0.2; the paper's are ResNet-18 and 100 epochs.
- Victims marked *plain* never saw a corrupted image. A clean accuracy of 93 % under rotation, as
  the paper prints for its own attack, needs victims that did, which it does not say. Those are
  marked *corrupted* here.
- Attacks that poison every batch anew take more steps: 16 epochs in batches of 512. WaNet has three
  times its published strength, which gives the PSNR of the paper's Table 2 but a lower SSIM: no
  strength gives both. What they poison is rounded to 8 bits in training too: unrounded, WaNet's
  victim learned that values lay between the 256, and its attack was lost in stored images.
  Input-aware triggers reach 73 % all the same.
- Marksman's generator and its victim take 6 epochs, half of the others': the generator trains a
  classifier beside it. Its clean accuracy is that of 6 epochs and of its poison.
- Verdicts are those of the calibrations at the time of the scan: Neural Cleanse's null came from
  four networks, and accuses a clean victim; the patch sweep had none. The last table of
  [calibration](calibration.md) judges the same scans by what ships now."""
# Victims at the accuracy that the papers print.
FULL = {
    "p1-cifar10": "CIFAR-10",
    "p1-gtsrb": "GTSRB",
    "p1-imagenet10": "Ten ImageNet classes, 64 pixels",
    "p1-imagenet10-224": "Ten ImageNet classes, 224 pixels, EfficientNet-Lite0",
    "marks-cifar10": "Watermarks that ship, CIFAR-10, airbench at half its width",
    "pairs-cifar10": "All-to-all and source-specific, CIFAR-10, airbench at half its width",
}
REVERSE_DIFFERENCES = """\
- On CIFAR-10 WaNet has three times its published strength: a victim of 24 epochs, trained on
  unrounded images, did not keep the published one in 8 bits. A stronger warp is a larger change to
  reverse: the generators find none of these three, and accuse a clean victim.
- Networks are a quarter as wide as the paper's but for MNIST's, and train for fewer epochs; a third
  of GTSRB's training images is at hand.
- Where n is below ten, fewer victims: the paper has ten of each kind."""
INDICES = ("nc", "reverse", "feature-re", "bti-dbf")  # on attacks-cifar10
# Clean and WaNet's victims of the reverse-generator paper.
DETECTIONS = {
    "detection-mnist": "MNIST, WaNet's network",
    "p2-cifar10": "CIFAR-10, PreActResNet-18",
    "p2-cifar10-vgg16": "CIFAR-10, VGG16",
    "p2-cifar10-mobilenetv2": "CIFAR-10, MobileNetV2",
    "p2-gtsrb": "GTSRB, PreActResNet-18",
    "p2-gtsrb-vgg16": "GTSRB, VGG16",
    "p2-gtsrb-mobilenetv2": "GTSRB, MobileNetV2",
    "detection-cifar10-vgg16": "CIFAR-10, VGG16, 20,000 training images",
    "detection-gtsrb-vgg16": "GTSRB, VGG16, one seed",
}
SEEDS = {
    "detection-mnist-badnets": ("Five seeds of detection", ""),
    "detection-mnist-badnets-single-start": (
        "The same with one search per label",
        "What Neural Cleanse found when each label was searched once, from a random mask: the "
        "reason for three searches, whose starts were then chosen on other seeds (100 to 102).",
    ),
}
_DEVELOPED = (
    "The batches of 128 were chosen on the victim of the image-dependent mark below and its clean "
    "twin, before any of these was cleaned."
)
MITIGATIONS = {
    "mitigation-cifar10": ("Mitigation on CIFAR-10", "Victims that no setting was chosen on."),
    "mitigation-gtsrb": ("Mitigation on GTSRB", ""),
    "cleaning-cifar10": ("Accurate victims, CIFAR-10", _DEVELOPED),
    "cleaning-marks-cifar10": ("The image-dependent mark, CIFAR-10", ""),
}
TIMED = ("cleaning-cifar10",)  # their records come with the seconds that they took


class Question(NamedTuple):
    """A page of results."""

    file: str
    title: str
    body: Callable[[Path], Iterator[str]]


def recorded(results: Path, names: Iterable[str]) -> list[str]:
    """Those studies that have records."""
    return [name for name in names if (results / name).exists()]


def _demo(results: Path) -> Iterator[str]:
    yield "Small victims, in minutes. At full accuracy, beside the papers' figures:"
    yield "[Spy-Watermark](spy-watermark.md) and"
    yield "[reverse-engineered generators](reverse-generators.md).\n"
    for name, title in STORIES.items():
        study = read_study(results / name)
        yield from _head(title, name)
        yield "\n".join(["```", *story_lines(study), "```", ""])
        yield from (f"{sentence}\n" for sentence in headline(study))
        yield f"[Every table]({name}/tables/story.md).\n"
        yield from _figures(results / name)
    gap = tables.gap_table(read_study(results / "cifar10"), read_study(results / "cifar10-gap"))
    yield from _made_by(gap, "explain_gap.py", "cifar10-gap")


def _attacks(results: Path) -> Iterator[str]:
    yield "WaNet, input-aware, BppAttack and Marksman poison every batch anew. Here their victims"
    yield "were trained on images that were not rounded to 8 bits, as they are since"
    yield "([why](../docs/attacks/wanet.md)).\n"
    for name, title in ATTACKS.items():
        yield from _head(title, name)
        yield from (markdown(page, level=3) for page in attack_pages(read_study(results / name)))


def _spy_watermark(results: Path) -> Iterator[str]:
    yield "Victims trained on all images at hand, each table beside the paper's. A study that is"
    yield "not finished says under *Coverage* what is there.\n"
    yield f"{DIFFERENCES}\n"
    for name in recorded(results, FULL):
        study = read_study(results / name)
        yield from _head(FULL[name], name)
        yield to_markdown(tables.victims_table(results / name))
        yield from (markdown(page, level=3) for page in attack_pages(study))
        for detector in in_order(keys(study, "scan", "detector"), INDICES):
            yield markdown(index_page(study, detector), level=3)


def _reverse_generators(results: Path) -> Iterator[str]:
    yield "Clean victims and victims of WaNet, each table beside the paper's (in brackets). What"
    yield "differs from the paper:\n"
    yield f"{REVERSE_DIFFERENCES}\n"
    for name in recorded(results, DETECTIONS):
        study = read_study(results / name)
        yield from _head(DETECTIONS[name], name)
        if name.startswith("p2-"):  # of the others nobody knows how many threads they had
            yield to_markdown(tables.victims_table(results / name))
        yield markdown(detection_page(study), level=3)
        if study.select(kind="mitigation"):
            yield markdown(paper_page(study), level=3)


def _training(results: Path) -> Iterator[str]:
    learning = tables.learning_table(read_study(results / "learning"))
    yield from _made_by(learning, "explain_learning.py", "learning")
    recipes = tables.recipes_table(read_study(results / "recipes-cifar10"))
    yield from _made_by(recipes, "compare_recipes.py", "recipes-cifar10")
    if read_study(results / "recipes-cifar10").select(kind="option"):
        options = tables.options_table(read_study(results / "recipes-cifar10"))
        yield from _made_by(options, "compare_recipes.py", "recipes-cifar10")


def _injector(results: Path) -> Iterator[str]:
    table = tables.ablation_table(read_study(results / "ablation-injector"))
    yield from _made_by(table, "ablate_injector.py", "ablation-injector")


@cache  # several pages and a CSV are made of it
def population_page(folder: Path) -> Page:
    """The page of a population, with the clean models of another where it joins them."""
    beside = [read_study(folder.with_name(name)) for name in BESIDE.get(folder.name, ())]
    return calibration_page(read_study(folder), beside=beside)


def _calibration(results: Path) -> Iterator[str]:
    page = population_page(results / "population")
    yield from _head(page.title, "population")
    yield "[What a verdict rests on](../docs/verdicts.md).\n"
    yield from (to_markdown(table) for table in page.tables)
    strangers = population_page(results / "population-strangers")
    yield from _head("The same for kinds of network that were never seen", "population-strangers")
    yield "Every network is judged by what clean models of all *other* networks calibrate.\n"
    yield from (to_markdown(table) for table in strangers.tables[:-1])
    joint = population_page(results / "population-audit")
    yield from _head("The detectors of an audit, on the same networks", "population-audit")
    yield (
        "Networks of the same kinds, trained anew, that all three have seen; judged by clean "
        "networks of other kinds, those of population-pairs among them. The calibrations that ship "
        "are fitted to the clean ones of both.\n"
    )
    yield from (to_markdown(table) for table in joint.tables[:-1])
    few = population_page(results / "population-few-classes")
    yield from _head("Two and three classes", "population-few-classes")
    yield (
        "Judged in the same way, by each other alone: a clean network may prefer one of so few "
        "classes by far. The calibrations that ship for two and three classes are fitted to "
        "these.\n"
    )
    yield from (to_markdown(table) for table in few.tables[:-1])
    many = population_page(results / "population-many-classes")
    yield from _head("44 classes and more", "population-many-classes")
    yield (
        "By the patch sweep alone, each judged by these networks and those of population-audit, "
        "of all other kinds. The calibration that ships for more than 43 classes is fitted to all "
        "of them. Classes are combinations of real digits, signs and objects that stand side by "
        "side.\n"
    )
    yield from (to_markdown(table) for table in many.tables[:-1])
    pairs = population_page(results / "population-pairs")
    yield from _head("One class to another, and each to its own", "population-pairs")
    yield (
        "All-to-all: class y becomes y + 1. Source-specific: the class after the target alone "
        "becomes the target, and as many images of other classes carry the trigger in training "
        "and keep their labels. Named: every class with its goal. Judged by clean networks of "
        "other kinds.\n"
    )
    yield from (to_markdown(table) for table in pairs.tables[:-1])
    adaptive = population_page(results / "population-adaptive")
    yield from _head("An attacker who knows the detectors", "population-adaptive")
    yield (
        "Victims that are trained against universal perturbations, with a last layer that is fixed "
        "([how](../docs/verdicts.md#an-attacker-who-knows-the-detectors)), beside ordinary ones of "
        "the same networks. Judged by clean networks of other kinds, those of population-audit and "
        "population-pairs.\n"
    )
    yield from (to_markdown(table) for table in adaptive.tables[:-1])
    attacks = population_page(results / "population-attacks")
    yield from _head("Every attack", "population-attacks")
    yield (
        "The detectors of an audit on small networks, with every attack that can be trained on the "
        "data. Judged by clean networks of other kinds, those of population-audit and "
        "population-pairs. No setting of a detector was chosen on these networks.\n"
    )
    yield from (to_markdown(table) for table in attacks.tables[:-1])
    names = ("population", *recorded(results, FULL), *recorded(results, DETECTIONS))
    studies = {name: read_study(results / name) for name in dict.fromkeys(names)}
    yield to_markdown(shipped_table(studies), level=2)


def _detection(results: Path) -> Iterator[str]:
    study = read_study(results / "attacks-cifar10")
    yield from _head("Every detector on one victim of each attack, CIFAR-10", "attacks-cifar10")
    for detector in INDICES:
        yield markdown(index_page(study, detector), level=3)
        yield f"![Anomaly index](attacks-cifar10/figures/index-{detector}.svg)\n"
    for name, (title, note) in SEEDS.items():
        yield from _head(title, name)
        yield from ([f"{note}\n"] if note else [])
        yield to_markdown(tables.seeds_table(read_study(results / name)))


def _mitigation(results: Path) -> Iterator[str]:
    for name, (title, note) in MITIGATIONS.items():
        yield from _head(title, name)
        yield from ([f"{note}\n"] if note else [])
        yield markdown(mitigation_page(read_study(results / name)), level=3)
        if name in TIMED:
            yield to_markdown(tables.cleaning_seconds_table(results / name), level=3)


def _exports(results: Path) -> Iterator[str]:
    study = read_study(results / "artefacts-cifar10")
    yield "`tools/check_artefacts.py` makes it from the CIFAR-10 study and the table of attacks;"
    yield "[records](artefacts-cifar10/records.jsonl). [The files](../docs/artefacts.md).\n"
    for table in (tables.parity_table, tables.injector_table, tables.filter_table):
        yield to_markdown(table(study), level=2)


def _speed(results: Path) -> Iterator[str]:
    folder = results / "speed"
    record = json.loads((folder / tables.BENCHMARKS).read_text(encoding="utf-8"))
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    yield f"`hatch run bench --record results/speed/{tables.BENCHMARKS}` makes the first two; "
    yield f"[record](speed/{tables.BENCHMARKS}). [What is measured](../docs/speed.md). One thread "
    yield f"of: {record['processor']}; {versions}.\n"
    yield from (to_markdown(table, level=2) for table in tables.network_tables(record))
    commands = " and ".join(f"`{command}`" for command in tables.SCANS.values())
    yield to_markdown(tables.scan_speed_table(folder), level=2)
    yield f"{commands} make it; [records](speed).\n"
    yield to_markdown(tables.scan_cost_table(folder), level=2)
    yield "`python tools/measure_scan_costs.py MODEL --data NAME --out FILE` makes it; "
    yield f"[record](speed/{tables.SCAN_COSTS}).\n"


POPULATIONS = (
    "population",
    "population-strangers",
    "population-audit",
    "population-few-classes",
    "population-many-classes",
    "population-pairs",
    "population-adaptive",
    "population-attacks",
)
# The studies whose clean models join those of another.
BESIDE = {
    "population-audit": ("population-pairs",),
    "population-many-classes": ("population-audit",),
    "population-pairs": ("population-audit",),
    "population-adaptive": ("population-audit", "population-pairs"),
    "population-attacks": ("population-audit", "population-pairs"),
}
QUESTIONS = (
    Question("demo.md", "Can a backdoor be planted, found and removed?", _demo),
    Question("attacks.md", "How well do the attacks work, and under corruption?", _attacks),
    Question("spy-watermark.md", "Spy-Watermark: the paper's tables beside ours", _spy_watermark),
    Question(
        "reverse-generators.md",
        "Reverse-engineered generators: the paper's tables beside ours",
        _reverse_generators,
    ),
    Question("training.md", "When is a backdoor learned, and how is a victim trained?", _training),
    Question("injector.md", "What is each part of the injector's training worth?", _injector),
    Question("calibration.md", "How often are the detectors right and wrong?", _calibration),
    Question("detection.md", "What do the detectors say, beside the papers?", _detection),
    Question("mitigation.md", "What do mitigations leave, and what do they cost?", _mitigation),
    Question("exports.md", "Do exported files answer like the models?", _exports),
    Question("speed.md", "How fast is it?", _speed),
)
HEAD = """# Results

Every number on these pages is rendered from the records beside them (`tools/render_results.py`).
A study's folder holds `records.jsonl` (settings, seed, data fingerprint, versions and values),
`environments.jsonl` (wall time and hardware), `tables/*.csv` (the numbers of its main tables, one
a row; `wm-eval tables` writes all) and `figures/`. All of this ran on two shared CPU cores.
Pictures of data sets that may not be passed on are left out.

| question | page |
| --- | --- |
"""


def render(results: Path) -> Iterator[tuple[Path, str]]:
    """Every page and every CSV below ``results``, with what belongs in it."""
    more = (
        (
            "Are branches of ONNX graphs that pictures steer found, and harmless ones left alone?",
            "../docs/audit.md#what-was-measured",
        ),
        ("How good are the ready-made weights?", "../docs/weights.md"),
        ("Both papers, small, on the bundled digits", "tiny/README.md"),
    )
    rows = [*((q.title, q.file) for q in QUESTIONS), *more]
    names = [file.removeprefix("../").partition("#")[0] for _, file in rows]
    index = "".join(
        f"| {title} | [{name}]({file}) |\n" for (title, file), name in zip(rows, names, strict=True)
    )
    yield Path("README.md"), HEAD + index
    for question in QUESTIONS:
        body = "\n".join(question.body(results)).rstrip("\n")
        yield Path(question.file), f"# {question.title}\n\n{body}\n"
    yield Path("tiny", "README.md"), page_text(results / "tiny", title="Both papers, small")
    for name in STORIES:
        yield Path(name, "tables", "story.md"), markdown(story_page(read_study(results / name)))
    for name, pages in _csv_pages(results):
        for page in pages:
            yield Path(name, "tables", f"{page.name}.csv"), tidy_csv(page)


def _csv_pages(results: Path) -> Iterator[tuple[str, list[Page]]]:
    def study(name: str) -> StudyRecords:
        return read_study(results / name)

    for name in (*ATTACKS, *recorded(results, FULL)):
        # When a backdoor was learned is on the pages alone: its numbers are those of the records.
        yield name, [page for page in attack_pages(study(name)) if page.name != "learning"]
    for name in recorded(results, FULL):
        if detectors := keys(study(name), "scan", "detector"):
            yield name, [_indices(study(name), detectors)]
    yield "attacks-cifar10", [_indices(study("attacks-cifar10"), INDICES)]
    for name in POPULATIONS:
        yield name, [population_page(results / name)]
    for name in recorded(results, DETECTIONS):
        yield name, [detection_page(study(name))]
        if study(name).select(kind="mitigation"):
            yield name, [paper_page(study(name))]
    for name in SEEDS:
        yield name, [detection_page(study(name))]
    for name in MITIGATIONS:
        yield name, [mitigation_page(study(name))]


def _indices(study: StudyRecords, detectors: Iterable[str]) -> Page:
    """The indices of all detectors, for one file."""
    pages = [index_page(study, detector) for detector in detectors]
    numbers = tuple(number for page in pages for number in page.numbers)
    return Page("index", "Anomaly indices", pages[0].about, (), numbers)


def _head(title: str, name: str) -> Iterator[str]:
    yield f"## {title}\n"
    yield f"`wm-eval run {name}` makes it; [records]({name}/records.jsonl).\n"


def _figures(folder: Path) -> Iterator[str]:
    for path in sorted((folder / "figures").glob("*")):
        yield f"![{path.stem}]({folder.name}/figures/{path.name})\n"


def _made_by(table: Table, tool: str, name: str) -> Iterator[str]:
    yield to_markdown(table, level=2)
    yield f"`tools/{tool}` makes it; [records]({name}/records.jsonl).\n"


def _main(argv: Sequence[str] | None) -> int:
    for name, text in render(RESULTS):
        path = RESULTS / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(_main))
