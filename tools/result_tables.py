"""Tables of records that one tool makes alone: exported files, speed, training, the injector."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from wm_eval.intervals import wilson
from wm_eval.numbers import keys, named, spread
from wm_eval.pages.detection import scans_of, victim_rates
from wm_eval.records import StudyRecords, read_environments, read_study
from wm_eval.render import (
    ABSENT,
    Table,
    count_range,
    decimal,
    percent,
    plus_minus,
    split_headers,
    with_interval,
)
from wm_eval.titles import (
    ATTACKS,
    CLEAN,
    DETECTORS,
    METHODS,
    attack_title,
    detector_title,
    in_order,
    method_title,
)

BENCHMARKS = "speed-bench.json"
SCAN_COSTS = "scan-costs.json"
SCANS = {
    "speed-nc": "python packages/defense-nc/benchmarks/bench_inversion.py --out FILE",
    "speed-reverse": "python packages/defense-reverse/benchmarks/bench_reverse.py --out FILE",
}
_FORMS = (
    ("onnx", "float32", False),
    ("onnx", "float32", True),
    ("onnx", "float16", True),
    ("onnx", "int8", True),
    ("torchscript", "float32", False),
    ("torchscript", "bfloat16", False),
)
_BENCHMARK = re.compile(r".*::test_(?P<test>\w+)(\[(?P<case>.*)\])?")


def seeds_table(study: StudyRecords) -> Table:
    """How many seeds each detector named the target in, by both rules."""
    rows = []
    for detector in keys(study, "scan", "detector"):
        for attack in keys(study, "scan", "attack", detector=detector):
            scans = scans_of(study, detector, attack)
            asr = [rates["asr"] for rates in victim_rates(study, attack).values()]
            indices = [scan["paper_index"] for scan in scans]
            infinite = None in indices
            cells = [
                detector_title(detector),
                "none" if attack == CLEAN else attack,
                str(len(scans)),
                percent(min(asr, default=None)),
            ]
            for is_paper in (False, True):
                target = sum(s["true_target"] in named(s, paper=is_paper) for s in scans)
                other = sum(bool({*named(s, paper=is_paper)} - {s["true_target"]}) for s in scans)
                cells.append(ABSENT if attack == CLEAN else f"{target} of {len(scans)}")
                cells.append(f"{other} of {len(scans)}")
            mean = None if infinite else spread(indices)
            rows.append((*cells, ABSENT if mean is None else f"{mean.mean:.2f}"))
    headers = split_headers(
        "defence | victims | seeds | lowest ASR | target named | another label named | paper's "
        "rule: target | paper's rule: another | mean paper's index"
    )
    note = (
        "A clean victim has no target; its ASR is what a BadNets patch does to it. The paper's "
        "rule is an index above 2 (ordinary median); ours is in docs/recipes.md."
    )
    return Table("detection", "MNIST, WaNet's network", headers, tuple(rows), note)


def gap_table(study: StudyRecords, gap: StudyRecords) -> Table:
    """The clean accuracy of the study's victims beside those that differ in one thing."""
    clean, bad, fewer, badnets = (
        records[0].values
        for records in (
            study.select(kind="rates", attack="clean"),
            study.select(kind="rates", attack="watermark"),
            gap.select(kind="rates", variant="fewer"),
            gap.select(kind="rates", variant="badnets"),
        )
    )
    rows = {
        "clean data": clean["corruptions"]["none"],
        "clean data without the images that the plan poisons": fewer,
        "the plan with a BadNets patch": badnets,
        "the plan with the watermark": bad["corruptions"]["none"],
    }
    cells = tuple(
        (name, with_interval(v["cda"], v["cda_interval"]), str(v["n_clean"]))
        for name, v in rows.items()
    )
    note = (
        "One recipe, one seed. Intervals are of each rate alone (Wilson); the pairs share images."
    )
    title = "CIFAR-10: where the accuracy goes"
    return Table("gap", title, ("trained on", "CDA", "n"), cells, note)


def ablation_table(study: StudyRecords) -> Table:
    """Stealth and bits of injectors that differ in one thing."""
    rows = []
    for record in study.select(kind="injector"):
        v, detection = record.values, record.values["detection"]
        names = ("none", "mask", "rotation", "noise", "rescale", "jpeg")
        rows.append(
            (
                str(record.key["variant"]),
                str(record.settings["recipe"]["iterations"]),
                f"{v['stealth']['psnr']['mean']:.2f}",
                f"{255 * v['stealth']['linf']['mean']:.0f}",
                *(percent(v["bits"][name]["marked"]) for name in names),
                f"{percent(detection['tpr'])} / {percent(detection['fpr'])}",
            )
        )
    headers = split_headers(
        "recipe | steps | PSNR (dB) | largest change (of 255) | bits, none | mask | rotation | "
        "noise | re-scale | JPEG | marked found / false"
    )
    note = (
        "Balanced bit accuracy of the one fixed mark on held-out images; a constant output scores "
        "50 %."
    )
    title = "Injectors on CIFAR-10 that differ in one thing"
    return Table("ablation", title, headers, tuple(rows), note)


def victims_table(folder: Path) -> Table:
    """What the victims of a table of attacks reach, and what their training takes."""
    study, runs = read_study(folder), read_environments(folder)
    images = study.select(kind="images")[0].values["n_train"]
    rows = []
    for corruptions in keys(study, "victim", "corruptions"):
        attacks = keys(study, "victim", "attack", corruptions=corruptions)
        for attack in in_order(attacks, ATTACKS):
            key = {"attack": attack, "corruptions": corruptions}
            rates = [r.values["corruptions"]["none"] for r in study.select(kind="rates", **key)]
            success = spread(r["asr"] for r in rates)
            victims = study.select(kind="victim", **key)
            minutes = [runs[victim.id]["seconds"] / 60 for victim in victims]
            passes = [len(victim.values["history"]["losses"]) for victim in victims]
            speeds = [images * n / (60 * each) for n, each in zip(passes, minutes, strict=True)]
            rows.append(
                (
                    attack_title(attack),
                    corruptions,
                    str(len(rates)),
                    plus_minus(spread(r["cda"] for r in rates), factor=100),
                    ABSENT if attack == CLEAN else plus_minus(success, factor=100),
                    count_range(passes),
                    plus_minus(spread(minutes), digits=1),
                    plus_minus(spread(speeds), digits=0),
                )
            )
    headers = split_headers(
        "attack | trained on images | seeds | clean accuracy (%) | ASR (%) | epochs | minutes | "
        "images/s"
    )
    machines = {runs[victim.id]["cpu"] for victim in study.select(kind="victim")}
    note = (
        f"Wall time of one process with one thread on a shared {', '.join(sorted(machines))}, "
        "watching after every epoch among it. Accuracy and attack success are of images without "
        "corruption, none mirrored or shifted at test time."
    )
    return Table("victims", "Victims and what they cost", headers, tuple(rows), note)


def learning_table(study: StudyRecords) -> Table:
    """When victims that differ in one thing learned their backdoor."""
    rows = []
    for record in study.select(kind="learning"):
        values = record.values
        learned, last = values["learned"], values["watched"][-1]
        rows.append(
            (
                str(record.key["variant"]),
                str(len(values["watched"])),
                str(learned["epoch"]) if learned else "not learned",
                str(learned["exposures"]) if learned else ABSENT,
                str(learned["steps"]) if learned else ABSENT,
                percent(last["asr"]),
                f"{last['poison_loss']:.2f}",
                percent(last["cda"]),
            )
        )
    headers = split_headers(
        "victim | epochs | learned in epoch | after exposures | after steps | ASR at the end | "
        "loss on poisoned images | CDA"
    )
    note = (
        "Learned: attack success of 90 % on held-out images at the end of an epoch. The base is "
        "BadNets, ResNet-10 of width 16, 20,000 images, batches of 32, peak rate 0.03, 4 epochs, "
        "no augmentation, from scratch; one seed. Names say what differs."
    )
    return Table("learning", "One thing at a time", headers, tuple(rows), note)


def recipes_table(study: StudyRecords) -> Table:
    """The accuracy that recipes and layouts of training reach."""
    rows = []
    for record in study.select(kind="recipe"):
        settings, watched = record.settings, record.values["watched"]
        rows.append(
            (
                str(record.key["recipe"]),
                settings.get("layout", "channels-last"),
                str(settings["epochs"]),
                str(settings["batch_size"]),
                *(percent(watched[len(watched) * k // 4 - 1]["accuracy"]) for k in (1, 2, 3, 4)),
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


def options_table(study: StudyRecords) -> Table:
    """The accuracy that options of training are worth, one at a time."""
    records = study.select(kind="option")
    accuracy = {str(r.key["option"]): r.values["watched"][-1]["accuracy"] for r in records}
    rows = [
        (
            str(r.key["option"]),
            str(r.settings["epochs"]),
            percent(accuracy[str(r.key["option"])]),
            f"{100 * (accuracy[str(r.key['option'])] - accuracy['none']):+.1f}",
            str(r.values["n"]),
        )
        for r in records
    ]
    headers = ("option", "epochs", "clean accuracy", "points more than without", "n")
    note = (
        "PreActResNet-18 of width 16, all images of CIFAR-10, the paper's recipe shortened, in the "
        "blocked layout, one seed: half a point may be chance."
    )
    title = "Options of the speed records' recipe, one at a time"
    return Table("options", title, headers, tuple(rows), note)


def parity_table(study: StudyRecords) -> Table:
    """The largest difference between every exported file and the module that it came from."""
    cells: dict[str, dict[tuple[str, str, bool], str]] = {}
    for row in study.select(kind="artefacts")[0].values["artefacts"]:
        value = ABSENT
        if "absent" not in row:
            difference = row["max_rel"] if row["relative"] else row["max_abs"]
            value = "0" if difference == 0 else f"{difference:.1e}"
        cells.setdefault(row["artefact"], {})[row["form"], row["precision"], row["uint8"]] = value
    rows = tuple((name, *(forms[form] for form in _FORMS)) for name, forms in cells.items())
    titles = (
        f"{'ONNX' if form == 'onnx' else 'TorchScript'} {precision}"
        f"{', stored pixels' if uint8 else ''}"
        for form, precision, uint8 in _FORMS
    )
    note = (
        "Largest difference on eight test images: absolute, of values in [0, 1]; of the largest "
        "logit for classifiers. With stored pixels, 1 / 255 is one step of one value. A dash: the "
        "exporter refuses this precision, because the network has no matrix products or mostly "
        "convolutions (int8), or because the file was not within the tolerance."
    )
    return Table("export-parity", "Parity", ("artefact", *titles), rows, note)


def injector_table(study: StudyRecords) -> Table:
    """What is seen in images that each form of the injector has poisoned."""
    injectors = study.select(kind="injectors")[0].values["injectors"]
    rates = ("found_by_torch", "found_by_file", "asr_by_torch", "asr_by_file", "values_differing")
    rows = tuple(
        (
            row["injector"] if row["injector"] == "torch" else f"ONNX, {row['injector']}",
            decimal(row["psnr"]),
            *(percent(row[name], digits=2) for name in rates),
            str(row["largest_step"]),
        )
        for row in injectors
    )
    headers = split_headers(
        "injector | PSNR (dB) | marked, detector in torch | marked, its ONNX file | ASR, "
        "classifier in torch | ASR, its ONNX file | 8-bit values unlike torch's | by at most"
    )
    n = injectors[0]["n"]
    note = f"{n} test images of other classes than the target, poisoned and stored in 8 bits."
    return Table("export-injectors", "The watermark from each form", headers, rows, note)


def filter_table(study: StudyRecords) -> Table:
    """False alarms and hits of the exported filters for incoming images."""
    filters = study.select(kind="filters")[0].values["filters"]

    def rate(count: int, n: int) -> str:
        return with_interval(count / n, wilson(count, n))

    rows = tuple(
        (
            detector_title(row["filter"]),
            "the classifier's training images" if row["trained_on"] == "yes" else "new ones",
            percent(row["stated_rate"]),
            rate(row["false_alarms"], row["n_clean"]),
            rate(row["hits"], row["n_poisoned"]),
        )
        for row in filters
    )
    headers = ("reversed trigger of", "calibrated on", "stated rate", "false alarms", "hits")
    note = (
        f"{filters[0]['images']} clean images of the defender: half fit the direction, half the "
        "threshold. The rate is stated for images that are drawn as those were. Judged on test "
        "images that chose nothing."
    )
    return Table("filters", "Filters for incoming images", headers, rows, note)


def network_tables(record: Mapping[str, Any]) -> Iterator[Table]:
    """Share of the machine's matrix rate, and the service, from ``hatch run bench --record``."""
    benchmarks = record["benchmarks"]
    shares = tuple(
        (
            _short(name),
            f"{row['images_per_second']:.0f}",
            decimal(row["fraction_of_matmul"]),
            decimal(row["fraction_spread"], digits=3),
            decimal(row["fraction_of_torch_mm"]),
            row["matmul"],
        )
        for name, row in benchmarks.items()
        if "fraction_of_matmul" in row
    )
    headers: tuple[str, ...] = split_headers(
        "network | images/s | share of the best matrix product | spread | share of the best by "
        "torch.mm | best product"
    )
    note = (
        "32 pixels; the numbers in a name are the batch or the width. Seconds of the processor; "
        "medians over rounds that take network and products in turns. int8 is held against "
        "float32 products."
    )
    yield Table("speed-shares", "Share of the matrix rate", headers, shares, note)
    service = tuple(
        (
            name.split("[")[1].split("-")[0],
            str(row["images_a_second_alone"]),
            str(row["images_a_second_served"]),
            decimal(row["served_times_alone"]),
            decimal(row["goal"]),
        )
        for name, row in benchmarks.items()
        if "served_times_alone" in row
    )
    headers = ("images a request", "images/s in one process", "images/s served", "share", "goal")
    note = (
        "The tiny injector behind `wm-inject serve`: binary tensors, eight clients on the same "
        "machine, against the model alone in batches of 32 on one thread; in turns."
    )
    yield Table("speed-service", "The service", headers, service, note)


def scan_speed_table(folder: Path) -> Table:
    """CPU seconds of a scan in several ways of running it."""
    rows = []
    for name in SCANS:
        values = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        rows += [
            (
                values["detector"],
                way,
                decimal(row["factor"]),
                decimal(row["cpu_seconds"], digits=1),
                row["verdict"],
                percent(row.get("overlap")),
            )
            for way, row in values["ways"].items()
        ]
    headers = ("detector", "way", "times as fast", "CPU seconds", "verdict", "mask overlap")
    note = (
        "PreActResNet-18 of width 16 on CIFAR-10, with a BadNets backdoor for Neural Cleanse and "
        "FTrojan's for the generators, one thread, all ways of a detector in turns in one run. The "
        "factor is the median over rounds of CPU seconds against the reference: one label after "
        "the other, float32, the same stopping rule."
    )
    return Table("speed-scans", "What a scan costs", headers, tuple(rows), note)


def scan_cost_table(folder: Path) -> Table:
    """Time and memory to the verdict of each detector, on a network as wide as the papers'."""
    models = json.loads((folder / SCAN_COSTS).read_text(encoding="utf-8"))
    rows = []
    for model in models.values():
        for name in in_order(model["detectors"], DETECTORS):
            row = model["detectors"][name]
            fast, paper = (row[f"passes_{preset}"] / 1000 for preset in ("fast", "paper"))
            seconds = decimal(row["cpu_seconds"], digits=0)
            cells = [str(model["classes"]), detector_title(name)]
            cells.append(seconds if row["finished"] else f"more than {seconds}: broken off")
            cells += [str(row["mebibytes"]), decimal(fast, digits=1), decimal(paper, digits=1)]
            rows.append((*cells, row["verdict"] if row["finished"] else ABSENT))
    headers = split_headers(
        "classes | detector | CPU seconds | MiB at most | thousand images, fast | "
        "thousand images, paper | verdict"
    )
    note = (
        "ResNet-18 of width 64 with a BadNets backdoor, on CIFAR-10 and GTSRB, 500 images; one "
        "thread, a process for each detector with the preset `fast`, opening and checking the "
        "model included (the row of head weights is little else). Thousand images: that go through "
        "the network and back at most, for these settings and for those of `paper`, which were not "
        "run; searches end early. The networks were trained for minutes: the verdicts are no "
        "measure of the detectors."
    )
    return Table("scan-costs", "Time and memory to a verdict", headers, tuple(rows), note)


def cleaning_seconds_table(folder: Path) -> Table:
    """How long each mitigation took."""
    study, runs = read_study(folder), read_environments(folder)
    repairs = [
        r for r in study.select(kind="mitigation") if r.values["done"] and not r.key["oracle_label"]
    ]
    fractions = sorted({float(r.key["fraction"]) for r in repairs})
    rows = []
    for method in in_order({str(r.key["method"]) for r in repairs}, METHODS):
        cells = [method_title(method)]
        for fraction in fractions:
            same = [
                r for r in repairs if r.key["method"] == method and r.key["fraction"] == fraction
            ]
            seconds = [runs[r.id]["seconds"] for r in same if r.id in runs]
            cells.append(_span(seconds) if seconds else ABSENT)
        rows.append(tuple(cells))
    headers = ("method", *(f"seconds, {100 * fraction:g} %" for fraction in fractions))
    note = (
        "Wall time of one thread beside one or two other processes on two cores: median over the "
        "victims, and range. Among it are reading the images and the answers to 10,000 test "
        "images, which pruning by channel does little beside; the scans are not."
    )
    return Table("cleaning-seconds", "How long it takes", headers, tuple(rows), note)


def _span(values: Sequence[float]) -> str:
    """Median, range and number."""
    low, middle, high = min(values), median(values), max(values)
    return f"{middle:.0f} ({low:.0f} to {high:.0f}), n = {len(values)}"


def _short(name: str) -> str:
    match = _BENCHMARK.fullmatch(name)
    if match is None:
        return name
    words = match["test"].replace("_", " ")
    return f"{words}, {match['case']}" if match["case"] else words
