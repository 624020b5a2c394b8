"""Tables of a made-up cleaning, and its command. No figure in it was measured."""

from __future__ import annotations

import argparse
import csv
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from wm_eval.cleaning import cli
from wm_eval.cleaning.cli import add_mitigate, mitigate_command, mitigate_config
from wm_eval.cleaning.gather import figures, read_cleaning
from wm_eval.cleaning.measures import der
from wm_eval.cleaning.mitigation import mitigation_page
from wm_eval.cleaning.paper import PAPER_TABLE2
from wm_eval.cleaning.tables import cleaning_headlines, cleaning_page, write_cleaning_tables
from wm_eval.records import Record, write_record, write_text
from wm_eval.tables import Table
from wm_inject.command.common import Parser, add_common
from wm_inject.command.config import add_config

METHODS = ("fine-tuning", "unlearning-reverse", "nad")


def rates(cda: float, asr: float) -> dict[str, Any]:
    intervals = {f"{n}_interval": [r - 0.02, r + 0.02] for n, r in (("cda", cda), ("asr", asr))}
    return {"cda": cda, "asr": asr, "ftr": 0.01, "n_clean": 1000, "n_attack": 900, **intervals}


def change(value: float) -> dict[str, Any]:
    return {"value": value, "low": value - 0.01, "high": value + 0.01, "n": 1000}


class Study:
    """Writes records in the format of the runner."""

    def __init__(self, folder: Path, name: str = "mnist", seeds: tuple[int, ...] = (0,)) -> None:
        self.folder = folder
        planned = {"attacks": ["clean", "wanet"], "methods": list(METHODS)}
        planned |= {"shares": [0.01, 0.05], "seeds": list(seeds)}
        about = {"name": name, "n_train": 60_000, "n_measured": 10_000, "model": "wanet-mnist"}
        self.write("cleaning", about | {"profile": "small", "planned": planned})

    def write(self, name: str, values: dict[str, Any], seed: int = 0, data: str = "abc") -> None:
        record = Record(name, {"settings": {}}, seed, data, {**values, "files": {}})
        write_record(self.folder / "records" / f"{name}.json", record, environment={"seconds": 1})

    def clean(
        self,
        method: str,
        share: float = 0.05,
        seed: int = 0,
        *,
        attack: str = "wanet",
        forced: bool = False,
        cleaned: bool = True,
        before: tuple[float, float] = (0.99, 1.0),
        after: tuple[float, float] = (0.98, 0.01),
    ) -> None:
        backdoored = attack != "clean"
        rating = der(*before, *after) if backdoored else None
        values = {
            "attack": attack,
            "method": method,
            "share": share,
            "forced": forced,
            "cleaned": cleaned,
            "why": "because",
            "labels": [0] if method.startswith("unlearning") and cleaned else [],
            "images": round(60_000 * share),
            "steps": 400 if cleaned else 0,
            "log": {},
            "before": rates(*before),
            "after": rates(*after),
            "acc_change": change(after[0] - before[0]),
            "asr_change": change(after[1] - before[1]) if backdoored else None,
            "der": rating,
            "der_interval": None if rating is None else [rating - 0.01, rating + 0.01],
        }
        kind = "forced" if forced else "clean"
        self.write(f"{kind}-{method}-{share:g}-{attack}-{seed}", values, seed)

    def scan(self, named: list[int], *, attack: str = "wanet") -> None:
        verdict = "backdoored" if named else "clean"
        values = {"attack": attack, "defence": "reverse", "verdict": verdict, "named": named}
        self.write(f"scan-reverse-{attack}-0", values | {"forced_label": 0, "reason": "a | b"})

    def rescan(self, named: list[int]) -> None:
        values = {"attack": "wanet", "method": "unlearning-reverse", "share": 0.05}
        values |= {"verdict": "backdoored" if named else "clean", "named": named}
        values |= {"verdict_before": "backdoored", "named_before": [0], "agrees": not named}
        self.write("rescan-reverse-unlearning-reverse-0.05-wanet-0", values)

    def failure(self, stage: str, reason: str) -> None:
        told = {"stage": stage, "attack": "wanet", "recipe": "plain", "seed": 0, "reason": reason}
        write_text(self.folder / "failures" / f"{stage}.json", json.dumps(told))


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return Study(tmp_path / "study")


def table(study: Study, name: str) -> Table:
    page = cleaning_page(read_cleaning(study.folder))
    return next(t for t in page.tables if t.name == name)


def names(study: Study) -> set[str]:
    return {t.name for t in cleaning_page(read_cleaning(study.folder)).tables}


def rows(found: Table) -> list[dict[str, str]]:
    assert all(len(cells) == len(found.headers) for cells in found.rows)
    return [dict(zip(found.headers, cells, strict=True)) for cells in found.rows]


def test_a_row_has_both_models_and_every_share(study: Study) -> None:
    study.clean("fine-tuning", 0.01, after=(0.985, 0.9))
    study.clean("fine-tuning", 0.05, after=(0.99, 0.5))
    (row,) = rows(table(study, "cleaning"))
    assert (row["attack"], row["method"], row["cleaned"]) == ("WaNet", "Fine-tuning", "2 of 2")
    assert (row["ACC before"], row["ASR before"]) == ("99.0", "100.0")
    assert (row["ACC, 1 %"], row["ASR, 1 %"], row["DER, 1 %"]) == ("98.5", "90.0", "0.547")
    assert (row["ACC, 5 %"], row["ASR, 5 %"], row["DER, 5 %"]) == ("99.0", "50.0", "0.750")
    assert (row["steps"], row["seeds"]) == ("400", "1")


def test_seeds_are_summed_up(tmp_path: Path) -> None:
    study = Study(tmp_path, seeds=(0, 1))
    for seed, asr in ((0, 0.1), (1, 0.3)):
        study.clean("nad", 0.05, seed, after=(0.99, asr))
    (row,) = rows(table(study, "cleaning"))
    assert row["ASR, 5 %"] == "20.0 ± 14.1" and row["seeds"] == "2" and row["ASR, 1 %"] == "–"
    assert row["ASR before"] == "100.0 ± 0.0"


def test_what_was_forced_is_a_row_of_its_own(study: Study) -> None:
    nothing = (0.99, 1.0)
    study.clean("unlearning-reverse", cleaned=False, before=nothing, after=nothing)
    study.clean("unlearning-reverse", forced=True)
    named, forced = rows(table(study, "cleaning"))
    assert named["method"] == "Unlearning, reverse generators" and named["cleaned"] == "0 of 1"
    assert (named["ASR, 5 %"], named["DER, 5 %"], named["steps"]) == ("100.0", "0.500", "–")
    assert forced["method"] == "Unlearning, reverse generators, forced"
    assert (forced["cleaned"], forced["ASR, 5 %"]) == ("1 of 1", "1.0")
    first, second = rows(table(study, "cleaning-details"))
    assert first["ACC after"] == "not cleaned" and first["DER"] == "–"
    assert second["DER"] == "0.990 (0.980 to 1.000)" and second["labels"] == "0"
    assert second["change of ASR, points"] == "-99.0 (-100.0 to -98.0)"


def test_clean_models_have_a_table_of_their_own(study: Study) -> None:
    study.clean("nad", attack="clean", after=(0.93, 0.01))
    study.clean("unlearning-reverse", attack="clean", cleaned=False, after=(0.99, 0.01))
    told = rows(table(study, "cleaning-clean"))
    by_method = {row["method"]: row for row in told}
    assert by_method["NAD"]["change, 5 %"] == "-6.0" and by_method["NAD"]["ACC, 5 %"] == "93.0"
    assert by_method["Unlearning, reverse generators"]["cleaned"] == "0 of 1"
    assert "cleaning" not in names(study)
    detail = next(r for r in rows(table(study, "cleaning-details")) if r["method"] == "NAD")
    assert detail["ASR after"] == detail["DER"] == "–"


def test_scans_before_and_after(study: Study) -> None:
    study.clean("unlearning-reverse")
    study.scan([0])
    study.scan([], attack="clean")
    study.rescan([])
    clean, wanet = rows(table(study, "cleaning-scans"))
    assert (clean["labels named"], clean["true target"]) == ("–", "–")
    assert (wanet["verdict"], wanet["labels named"], wanet["true target"]) == (
        "backdoored",
        "0",
        "0",
    )
    found = table(study, "cleaning-rescans")
    (again,) = rows(found)
    assert (again["before"], again["after"], again["agrees"]) == (
        "backdoored (0)",
        "clean (–)",
        "yes",
    )
    assert found.note.startswith("1 of 1 cleaned models")
    study.rescan([4])
    (again,) = rows(table(study, "cleaning-rescans"))
    assert (again["after"], again["agrees"]) == ("backdoored (4)", "no")


def test_what_is_missing_says_why(study: Study) -> None:
    study.clean("fine-tuning")
    study.failure("clean-nad-0.05-wanet-0", "no <layers> there")
    missing = rows(table(study, "cleaning-missing"))
    assert len(missing) == 11  # of 2 victims x 3 methods x 2 shares
    why = {(r["victim"], r["method"], r["clean data"]): r["reason"] for r in missing}
    assert why["WaNet", "NAD", "5 %"] == "no <layers> there"
    assert why["WaNet", "NAD", "1 %"] == "not run"


def test_papers_table_beside_ours(study: Study) -> None:
    study.clean("control", 0.01, after=(0.992, 0.88))
    study.clean("unlearning-reverse", 0.01, after=(0.989, 0.002))
    study.clean("unlearning-reverse", 0.01, forced=True, after=(0.989, 0.5))
    (found,) = mitigation_page(read_cleaning(study.folder)).tables
    first, forced, paper, *rest = rows(found)
    assert [first[h] for h in found.headers] == [
        *("1 %", "measured", "99.20", "88.00", "98.90", "0.20", "1")
    ]
    assert (forced["source"], forced["ASR with"]) == ("measured, forced", "50.00")
    assert [paper[h] for h in found.headers] == [
        *("1 %", "paper", "99.37", "99.77", "99.09", "0.07", "–")
    ]
    assert [r["clean data"] for r in rest] == ["3 %", "5 %"]


def test_the_papers_figures_as_printed() -> None:
    assert {data: len(found) for data, found in PAPER_TABLE2.items()} == {
        "mnist": 3,
        "cifar10": 3,
        "gtsrb": 3,
    }
    assert PAPER_TABLE2["cifar10"][0.05] == (92.50, 82.04, 92.96, 2.58)
    # Section 4.3: less than 1 % attack success on MNIST and GTSRB even with 1 % of the data.
    assert all(PAPER_TABLE2[data][0.01].asr_with < 1 for data in ("mnist", "gtsrb"))


def test_other_data_has_no_paper_rows(tmp_path: Path) -> None:
    study = Study(tmp_path, name="digits")
    study.clean("unlearning-reverse")
    (found,) = mitigation_page(read_cleaning(study.folder)).tables
    (row,) = rows(found)
    assert row["source"] == "measured" and row["ACC without"] == "–"


def test_headlines(study: Study) -> None:
    study.clean("fine-tuning", 0.01, after=(0.99, 0.9))
    study.clean("fine-tuning", 0.05, after=(0.98, 0.4))
    nothing = (0.99, 1.0)
    study.clean("unlearning-reverse", cleaned=False, before=nothing, after=nothing)
    second, first = cleaning_headlines(read_cleaning(study.folder))
    assert first == (
        "WaNet, Fine-tuning, 5 % clean data: ASR 100.0 % to 40.0 %, ACC 99.0 % to 98.0 %, DER 0.795"
    )
    assert second.endswith("DER 0.500; cleaned 0 of 1")


def test_files_in_four_forms_with_the_same_bytes(study: Study) -> None:
    study.clean("fine-tuning")
    study.clean("unlearning-reverse")
    study.scan([0])
    paths = write_cleaning_tables(study.folder)
    endings = ("md", "tex", "csv", "html")
    assert [p.name for p in paths] == [
        f"{name}.{ending}" for name in ("cleaning", "mitigation") for ending in endings
    ]
    first = [p.read_bytes() for p in paths]
    assert [p.read_bytes() for p in write_cleaning_tables(study.folder)] == first
    found = list(csv.DictReader(io.StringIO((study.folder / "tables/cleaning.csv").read_text())))
    mine = [r for r in found if (r["method"], r["measure"]) == ("fine-tuning", "asr")]
    assert [(r["value"], r["share"], r["seed"], r["forced"]) for r in mine] == [
        ("0.01", "0.05", "0", "False")
    ]
    assert len(found) == len(figures(read_cleaning(study.folder))) == 10
    text = (study.folder / "tables/cleaning.md").read_text()
    assert "60000 training images" in text and "a \\| b" in text


def test_reading_refuses(study: Study) -> None:
    study.write("clean-nad-0.05-wanet-0", {"attack": "wanet"})
    with pytest.raises(ValueError, match=r"expected method, .* in the record clean-nad"):
        read_cleaning(study.folder)
    study.clean("nad")
    study.write("scan-nc-wanet-0", {"attack": "wanet"}, data="another")
    with pytest.raises(ValueError, match="in the record scan-nc-wanet-0"):
        read_cleaning(study.folder)
    values = {"attack": "wanet", "defence": "nc", "verdict": "clean", "named": []}
    study.write("scan-nc-wanet-0", values | {"forced_label": 0}, data="another")
    with pytest.raises(ValueError, match="one data set"):
        read_cleaning(study.folder)
    (study.folder / "records" / "cleaning.json").unlink()
    with pytest.raises(ValueError, match=r"expected the record cleaning\.json"):
        read_cleaning(study.folder)


# The command.


def parse(*argv: str) -> argparse.Namespace:
    parser = Parser(prog="wm-eval")
    add_common(parser, version="0")
    add_config(parser)
    add_mitigate(parser)
    return parser.parse_args(argv)


def test_options_become_settings() -> None:
    config = mitigate_config(
        parse(
            *("--profile", "tiny", "--data", "digits", "--attacks", "badnets,wanet"),
            *("--shares", "0.01,0.05", "--methods", "nad,fine-tuning", "--seeds", "2"),
            *("--seed", "5", "--steps", "9", "--no-rescan"),
        )
    )
    assert config.attacks == ("badnets", "wanet") and config.shares == (0.01, 0.05)
    assert config.rows == ("fine-tuning", "nad") and config.study.seeds == (5, 6)
    assert config.steps == 9 and not config.rescan and config.study.profile == "tiny"
    usual = mitigate_config(parse())
    assert usual.study.data.name == "cifar10" and usual.rescan


@pytest.mark.parametrize(
    "argv", [["--shares", "much"], ["--profile", "vast"], ["--minutes", "soon"], ["--soap"]]
)
def test_wrong_usage_exits_64(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        parse(*argv)
    assert leaving.value.code == 64


def test_the_command_says_what_it_made(
    study: Study, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: dict[str, Any] = {}

    def pretend(config: Any, out: Path, **rest: Any) -> Path:
        asked.update(rest, config=config)
        return out / "records"

    monkeypatch.setattr("wm_eval.cleaning.run.run_cleaning", pretend)
    study.clean("fine-tuning")
    study.failure("clean-nad-0.05-wanet-0", "no layers")
    given = ("--data", "mnist", "--device", "cpu", "--minutes", "3", "--victims", "there")
    assert mitigate_command(parse(*given, "--out", str(study.folder))) == 0
    said = capsys.readouterr().out
    assert "WaNet, Fine-tuning, 5 % clean data: ASR 100.0 % to 1.0 %" in said
    assert "cleaning.md" in said and "(1 stages" in said
    assert (asked["minutes"], asked["victims"], asked["device"]) == (3, Path("there"), "cpu")
    empty = study.folder / "empty"
    (empty / "records").mkdir(parents=True)
    assert mitigate_command(parse("--device", "cpu", "--out", str(empty))) == 0
    assert "nothing measured yet" in capsys.readouterr().out


def test_help_is_there_without_torch() -> None:
    program = f"import sys; import {cli.__name__}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
