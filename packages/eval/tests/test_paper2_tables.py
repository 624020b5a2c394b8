"""Tables and figures of the reverse-generator paper's experiment, from made-up records."""

from __future__ import annotations

import xml.dom.minidom
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from wm_eval.attacks.render import markdown
from wm_eval.paper2.cells import where
from wm_eval.paper2.figures import write_figures
from wm_eval.paper2.paper import PAPER_TABLE1, PAPER_TABLE2
from wm_eval.paper2.plots import draw_rates, draw_scores
from wm_eval.paper2.sheets import draw_labels, draw_triggers
from wm_eval.paper2.summary import (
    DetectRecords,
    named,
    read_detection,
    sort_records,
    summarise_detection,
)
from wm_eval.paper2.table1 import cases, detection_page
from wm_eval.paper2.table2 import cleaning_page
from wm_eval.paper2.tables import write_tables
from wm_eval.pictures import save_picture
from wm_eval.records import Record, read_records, write_record

RESULTS = Path(__file__).resolve().parents[3] / "results"
DATA = {"name": "mnist", "n_train": 60_000, "n_test": 10_000, "n_measured": 10_000}


def write(out: Path, name: str, seed: int, values: Mapping[str, Any], **settings: Any) -> None:
    record = Record(name, {"settings": settings}, seed, "abc", values)
    write_record(out / "records" / f"{name}.json", record)


def scan(
    out: Path,
    detector: str,
    attack: str,
    seed: int,
    index: float | None,
    suspected: tuple[int, ...] = (),
    paper: tuple[int, ...] = (),
    **more: Any,
) -> None:
    target = None if attack in ("clean", "none") else 0
    labels = [
        {"label": k, "score": 2.0 if k in suspected else 8.0 + k, "success_rate": 1.0}
        for k in range(5)
    ]
    values: dict[str, Any] = {
        "attack": attack,
        "defence": detector,
        "true_target": target,
        "paper_index": index,
        "paper_flagged": list(paper),
        "suspected": list(suspected),
        "verdict": "backdoored" if suspected else "clean",
        "p_value": 0.01 if suspected else 0.6,
        "score_median": 10.0,
        "labels": labels,
    }
    if target is not None:
        values["case"] = 4 if not suspected else 1 if suspected == (0,) else 2
        values["paper_case"] = 4 if not paper else 1 if paper == (0,) else 2
    write(out, f"scan-{detector}-{attack}-{seed}", seed, values | more)


def victim(out: Path, attack: str, seed: int, cda: float, asr: float) -> None:
    values = {"attack": attack, "cda": cda, "asr": asr}
    network = {"model": "wanet-mnist", "width": None}
    write(out, f"victim-{attack}-{seed}", seed, values)
    write(out, f"victim-plain-{attack}-{seed}", seed, {"attack": attack}, victim=network)


def cleaning(out: Path, way: str, share: float, seed: int, asr: float | None, **more: Any) -> None:
    values: dict[str, Any] = {"attack": "wanet", "method": way, "share": share, "lr": 1e-3}
    values["done"] = asr is not None
    if asr is not None:
        values["after"] = {"cda": 0.98, "asr": asr}
    values |= more
    kind = "rate" if "lr" in more else "cleaning"
    write(
        out,
        f"{kind}-{way}-{values[{'rate': 'lr', 'cleaning': 'share'}[kind]]}-wanet-{seed}",
        seed,
        values,
    )


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Two seeds on MNIST with WaNet's network. No figure in it was measured."""
    out = tmp_path / "study"
    write(out, "data", 0, DATA)
    for seed in (0, 1):
        victim(out, "wanet", seed, 0.99, 0.995 - 0.01 * seed)
        victim(out, "clean", seed, 0.992, 0.001)
        scan(out, "reverse", "wanet", seed, 5.0 + 2 * seed, (0,), (0, 2)[: 1 + seed])
        scan(out, "nc", "wanet", seed, 1.0, (), ())
        scan(out, "nc", "clean", seed, 1.5 + seed, (), (4,)[:seed])
        cleaning(out, "fine-tuning", 0.01, seed, 0.9)
        cleaning(out, "reverse", 0.01, seed, 0.0 if seed else 0.01)
        cleaning(out, "nc", 0.01, seed, None)
    scan(out, "reverse", "clean", 0, 1.2)
    scan(out, "reverse", "clean", 1, None, (3,), (3,), verdict="inconclusive")
    return out


def test_table_1_stands_beside_the_papers(study: Path) -> None:
    page = detection_page([read_detection(study)])
    rows = {row[3]: row[4:] for row in page.tables[0].rows}
    assert rows["Reverse generators"] == (
        "1.20, 1 infinite (1.07)",
        "6.00 ± 1.41 (5.41)",
        "1/1/0/0 (9/1/0/0)",
        "2/0/0/0",
        "1 of 2",
        "0 of 2, 1 inconclusive",
        "2 + 2",
        "98.5 %",
    )
    assert rows["Neural Cleanse"][:4] == (
        "2.00 ± 0.71 (1.10)",
        "1.00 ± 0.00 (0.75)",
        "0/0/0/2 (0/0/0/10)",
        "0/0/0/2",
    )
    assert page.tables[0].rows[0][:3] == ("MNIST", "3 ConvBlocks + fcs", "WaNet")
    values = {(n.source, n.attack, n.measure, n.column, n.seed): n.value for n in page.numbers}
    assert values["paper", "clean", "paper_index", "reverse", None] == 1.07
    assert values["measured", "wanet", "case", "reverse", 1] == 1
    assert ("measured", "clean", "paper_index", "reverse", 1) not in values, "infinite is no number"


def test_table_2_stands_beside_the_papers(study: Path) -> None:
    rows = {row[4]: row[5:] for row in cleaning_page([read_detection(study)]).tables[0].rows}
    assert next(iter(rows)) == "fine-tuning alone"
    assert rows["fine-tuning alone"] == (
        "99.00 ± 0.00",
        "98.00 ± 0.00 (99.37)",
        "99.00 ± 0.71",
        "90.00 ± 0.00 (99.77)",
        "2",
    )
    reverse = rows["unlearning, Reverse generators"]
    assert reverse[3:] == ("0.50 ± 0.71 (0.07)", "2")
    assert rows["unlearning, Neural Cleanse"] == ("–", "–", "–", "–", "0 of 2")


def test_the_papers_figures_are_whole() -> None:
    assert len(PAPER_TABLE1) == 14 and len(PAPER_TABLE2) == 18
    assert all(sum(row.cases) == 10 for row in PAPER_TABLE1.values())
    assert PAPER_TABLE1["cifar10", "vgg16", "reverse"].cases == (8, 1, 0, 1)
    assert PAPER_TABLE2["cifar10", 0.05, "reverse"] == (92.96, 2.58)


def test_other_networks_and_attacks_have_nothing_printed(study: Path) -> None:
    found = read_detection(study)
    other = DetectRecords(
        found.data, "resnet10", 16, found.victims, found.scans, found.cleanings, {}, {}
    )
    pages = (detection_page([other]), cleaning_page([other]))
    assert all("(" not in cell for page in pages for row in page.tables[0].rows for cell in row)
    assert where(other, "badnets") == ("MNIST", "ResNet-10, width 16", "BadNets")
    both = detection_page([found, other])
    assert len(both.tables[0].rows) == 4 and "60000 training images" in both.about


def test_files_repeat(study: Path) -> None:
    first = {path: path.read_bytes() for path in write_tables(study)}
    assert {path.name for path in first} == {
        f"{name}.{end}"
        for name in ("detection", "cleaning")
        for end in ("md", "tex", "csv", "html")
    }
    assert {path: path.read_bytes() for path in write_tables(study)} == first


def test_cases_are_counted() -> None:
    scans = [{"case": k, "paper_case": 4} for k in (1, 1, 2, 3, 4, 1)]
    assert cases(scans) == (3, 1, 1, 1) and cases(scans, "paper_") == (0, 0, 0, 6)
    assert cases([]) == (0, 0, 0, 0)


def test_only_a_verdict_names_labels() -> None:
    values = {"suspected": [1], "paper_flagged": [2], "verdict": "inconclusive"}
    assert named(values) == [] and named(values, "paper_") == [2]
    assert named(values | {"verdict": "backdoored"}) == [1]


def test_the_older_records_are_read_too() -> None:
    records = read_records(RESULTS / "mnist-detection" / "records")
    rows = {(row["defence"], row["attack"]): row for row in summarise_detection(records)}
    assert set(rows) == {
        ("nc", "none"),
        ("nc", "badnets"),
        ("reverse", "none"),
        ("reverse", "wanet"),
    }
    assert all(row["n"] == 5 and 0 <= row["asr_min"] <= 1 for row in rows.values())
    found = sort_records(records)
    assert (found.name, found.model, found.attacks()) == ("", "wanet-mnist", ["badnets", "wanet"])
    assert len(found.of("reverse", "clean")) == len(found.rates_of("wanet")) == 5
    page = detection_page([found])
    wanet = next(row for row in page.tables[0].rows if row[2] == "WaNet")
    assert wanet[7] == f"{rows['reverse', 'wanet']['named_target']}/0/0/0"
    assert wanet[10] == "5 + 5"
    single = read_records(RESULTS / "mnist-detection-single-start" / "records")
    assert {row["defence"] for row in summarise_detection(single)} == {"nc"}


def test_records_of_something_else_are_refused(study: Path) -> None:
    with pytest.raises(ValueError, match="expected records of the detection experiment"):
        sort_records({})
    with pytest.raises(ValueError, match="expected 'defence' in the record scan-x-y-0"):
        sort_records({"scan-x-y-0": Record("scan-x-y-0", {}, 0, "abc", {"attack": "y"})})


def test_a_missing_asr_and_an_infinite_index_are_said(tmp_path: Path) -> None:
    scan(tmp_path, "nc", "badnets", 0, None, (0,))
    (row,) = summarise_detection(read_records(tmp_path / "records"))
    assert row["paper_index_mean"] is None and row["asr_min"] is None
    text = markdown(detection_page([read_detection(tmp_path)]))
    assert "–, 1 infinite" in text


def pictures(out: Path, detector: str = "reverse", size: int = 8) -> None:
    def picture(name: str) -> dict[str, Any]:
        image = torch.linspace(0, 1, size * size).view(1, size, size)
        return save_picture(out / "pictures", f"{detector}-{name}", image, "a caption")

    kinds = ("original", "planted", "planted-change", "reversed", "reversed-change")
    values = {
        "attack": "wanet",
        "defence": detector,
        "target": 0,
        "gain": 5,
        "labels_gain": 2,
        "cosine": 0.5,
        "cosine_others": 0.1,
        "psnr_between": 25.0,
        "rows": [{kind: picture(f"{i}-{kind}") for kind in kinds} for i in range(2)],
        "labels": {
            str(k): {kind: picture(f"{k}-{kind}") for kind in ("reversed", "change")}
            for k in range(5)
        },
    }
    write(out, f"pictures-{detector}-wanet-0", 0, values)


def test_every_figure_is_drawn_and_repeats(study: Path) -> None:
    for detector in ("reverse", "reverse-lpips"):
        pictures(study, detector)
    scan(study, "reverse-lpips", "wanet", 0, 3.0, (0,))
    for way in ("fine-tuning", "reverse"):
        for rate in (1e-3, 1e-2):
            cleaning(study, way, 0.05, 0, 0.2, lr=rate)
    figures = write_figures(study)
    assert {path.name for path in figures.drawn} == {
        "figure2-wanet.svg",
        "figure3-reverse-wanet.png",
        "figure3-reverse-lpips-wanet.png",
        "figure4-reverse-wanet.png",
        "figure4-reverse-lpips-wanet.png",
        "figure5-wanet.svg",
        "figure6-wanet.png",
    }
    assert not figures.skipped
    first = {path: path.read_bytes() for path in figures.drawn}
    assert {path: path.read_bytes() for path in write_figures(study).drawn} == first
    for path, content in first.items():
        if path.suffix == ".svg":
            xml.dom.minidom.parseString(content)
    with Image.open(study / "figures" / "figure3-reverse-wanet.png") as sheet:
        assert sheet.width >= 5 * 96 and sheet.height >= 2 * 96


def test_what_was_not_run_is_skipped_with_a_reason(study: Path) -> None:
    figures = write_figures(study)
    assert [path.name for path in figures.drawn] == ["figure2-wanet.svg"]
    assert figures.skipped == (
        "figure 6, wanet: the detector reverse-lpips and its pictures were not run",
    )


def test_figures_without_records_are_refused(study: Path, tmp_path: Path) -> None:
    found = read_detection(study)
    with pytest.raises(ValueError, match="expected scans of models with badnets, found none"):
        draw_scores(found, "badnets", tmp_path / "x.svg")
    with pytest.raises(ValueError, match="expected a sweep of learning rates on wanet, found none"):
        draw_rates(found, "wanet", tmp_path / "x.svg")


@pytest.mark.parametrize("file", ["gone.png", "../records/data.json"])
def test_a_picture_that_is_missing_or_elsewhere_is_refused(study: Path, file: str) -> None:
    pictures(study)
    record = read_records(study / "records")["pictures-reverse-wanet-0"]
    rows = [{kind: {"file": file} for kind in record.values["rows"][0]}]
    with pytest.raises(ValueError, match=r"^expected the picture .* found none$"):
        draw_triggers({**record.values, "rows": rows}, study / "pictures", study / "x.png")


def test_pictures_of_two_sizes_are_refused(study: Path) -> None:
    pictures(study)
    values = dict(read_records(study / "records")["pictures-reverse-wanet-0"].values)
    image = torch.zeros(1, 4, 4)
    odd = save_picture(study / "pictures", "odd", image, "another size")
    values["labels"] = {**values["labels"], "1": {"reversed": odd, "change": odd}}
    with pytest.raises(ValueError, match="expected pictures of one size, found 4 x 4 and 8 x 8"):
        draw_labels(values, study / "pictures", study / "x.png")
