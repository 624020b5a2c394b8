"""The section of results/README.md about exported files, from the records of check_artefacts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wm_eval.intervals import wilson
from wm_eval.records import Record, read_records
from wm_eval.tables import ABSENT, Table, number, percent, to_markdown, with_interval

COLUMNS = (
    ("onnx", "float32", False),
    ("onnx", "float32", True),
    ("onnx", "float16", True),
    ("onnx", "int8", True),
    ("torchscript", "float32", False),
    ("torchscript", "bfloat16", False),
)


def artefact_parts(folder: Path) -> list[str]:
    """The section, in Markdown; nothing where there are no records."""
    if not (folder / "records").is_dir():
        return []
    records = read_records(folder / "records")
    tables = (parity_table(records), injector_table(records), filter_table(records))
    return [
        "## Exported files, in every form",
        "",
        "`tools/check_artefacts.py` makes it from the CIFAR-10 study and the table of attacks; "
        f"[records]({folder.name}/records). [What these files are](../docs/artefacts.md).",
        "",
        *(f"{to_markdown(table)}\n" for table in tables),
    ]


def parity_table(records: Mapping[str, Record]) -> Table:
    """The largest difference between every file and the module that it came from."""
    found: dict[str, dict[tuple[str, str, bool], Mapping[str, Any]]] = {}
    for row in records["artefacts"].values["artefacts"]:
        forms = found.setdefault(row["artefact"], {})
        forms[(row["form"], row["precision"], row["uint8"])] = row
    rows = [
        (name, *(_difference(forms[column]) for column in COLUMNS)) for name, forms in found.items()
    ]
    headers = ("artefact", *(_heading(*column) for column in COLUMNS))
    note = (
        "Largest difference on eight test images: absolute, of values in [0, 1]; of the largest "
        "logit for classifiers. With stored pixels, 1 / 255 is one step of one value. A dash: the "
        "exporter refuses this precision, because the network has no matrix products or mostly "
        "convolutions (int8), or because the file was not within the tolerance."
    )
    return Table("artefact-parity", "Parity", headers, tuple(rows), note)


def injector_table(records: Mapping[str, Record]) -> Table:
    """What is seen in images that each form of the injector has poisoned."""
    rows = [
        (
            row["injector"] if row["injector"] == "torch" else f"ONNX, {row['injector']}",
            number(row["psnr"]),
            percent(row["found_by_torch"], digits=2),
            percent(row["found_by_file"], digits=2),
            percent(row["asr_by_torch"], digits=2),
            percent(row["asr_by_file"], digits=2),
            percent(row["values_differing"], digits=2),
            str(row["largest_step"]),
        )
        for row in records["injectors"].values["injectors"]
    ]
    headers = (
        "injector",
        "PSNR (dB)",
        "marked, detector in torch",
        "marked, its ONNX file",
        "ASR, classifier in torch",
        "ASR, its ONNX file",
        "8-bit values unlike torch's",
        "by at most",
    )
    n = records["injectors"].values["injectors"][0]["n"]
    note = f"{n} test images of other classes than the target, poisoned and stored in 8 bits."
    return Table("artefact-injectors", "The watermark from each form", headers, tuple(rows), note)


def filter_table(records: Mapping[str, Record]) -> Table:
    """False alarms and hits of the exported filters for incoming images."""
    names = {"nc": "Neural Cleanse", "reverse": "Reverse generators"}
    rows = [
        (
            names[row["filter"]],
            "the classifier's training images" if row["trained_on"] == "yes" else "new ones",
            percent(row["stated_rate"]),
            _rate(row["false_alarms"], row["n_clean"]),
            _rate(row["hits"], row["n_poisoned"]),
        )
        for row in records["filters"].values["filters"]
    ]
    headers = ("reversed trigger of", "calibrated on", "stated rate", "false alarms", "hits")
    images = records["filters"].values["filters"][0]["images"]
    note = (
        f"{images} clean images of the defender: half fit the direction, half the threshold. The "
        "rate is stated for images that are drawn as those were. Judged on test images that chose "
        "nothing."
    )
    return Table("artefact-filters", "Filters for incoming images", headers, tuple(rows), note)


def _difference(row: Mapping[str, Any]) -> str:
    if "absent" in row:
        return ABSENT
    value = row["max_rel"] if row["relative"] else row["max_abs"]
    return "0" if value == 0 else f"{value:.1e}"


def _heading(form: str, precision: str, uint8: bool) -> str:
    name = "ONNX" if form == "onnx" else "TorchScript"
    return f"{name} {precision}{', stored pixels' if uint8 else ''}"


def _rate(count: int, n: int) -> str:
    return with_interval(count / n, wilson(count, n))


__all__ = ["artefact_parts"]
