"""A whole study: plant a backdoor, measure it, look for it, remove it, tell the story.

Stages run in order. Each keeps its result, so a study that was killed goes on where it stopped and
ends with the same bytes; a study that is done is only told again.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from wm_eval.config import StudyConfig as StudyConfig
from wm_eval.config import load_study as load_study
from wm_eval.exports import export_models
from wm_eval.records import Record, hardware, read_records
from wm_eval.report import render_report
from wm_eval.stages import (
    DEFENCES,
    clean_victim,
    describe_data,
    measure_mark,
    measure_victims,
    scan_victim,
    stage_settings,
    take_mark,
    train_mark,
    train_victim,
)
from wm_eval.study import Study
from wm_eval.workspace import Made, Workspace, file_digest
from wm_inject import pretrained_card
from wm_victim import load_dataset

ATTACK = ("data", "joint", "watermark", "strength")
READY_MADE = ("data", "pretrained", "strength")


@dataclass(frozen=True)
class StudyResult:
    """A finished study: its folder, its records by name, and its page."""

    folder: Path
    records: dict[str, Record]
    report: Path


def run_study(
    config: StudyConfig,
    out: str | Path,
    *,
    device: str = "cpu",
    progress: bool = True,
    say: Callable[[str], None] | None = None,
) -> StudyResult:
    """Run a study, or the rest of it.

    Args:
        config: The study.
        out: Its folder; ``records/``, ``models/``, ``pictures/`` and ``report.html`` go there.
        device: "cpu" or a cuda device.
        progress: Show how far long stages are.
        say: Called with a line when a stage starts or is skipped; writes to stderr if None.

    Returns:
        The folder, every record and the report.

    Raises:
        ValueError: Data that cannot be loaded, or settings that do not fit them.
        RuntimeError: A training run that diverged.
    """
    hardware(device)  # refuses a device that is none before any work is done
    out = Path(out)
    data = load_dataset(
        config.data.name,
        image_size=config.data.image_size,
        limit=config.data.limit,
        seed=config.seed,
    )
    if config.plan.target >= data.num_classes:
        raise ValueError(
            f"expected a target label below {data.num_classes} classes, got {config.plan.target}"
        )
    speak = say if say is not None else (_stderr if progress else _silent)
    space = Workspace(out, config.seed, data.fingerprint, device, speak)
    _stages(Study(config, data, space, progress))
    return StudyResult(out, read_records(out / "records"), render_report(out))


def _stages(study: Study) -> None:
    """Every stage with the settings and the earlier stages that it depends on."""
    do = study.space.stage

    def settings(*sections: str) -> dict[str, Any]:
        return stage_settings(study.config, *sections)

    do("data", settings("data", "measure"), (), lambda _: describe_data(study))
    # A picture or weights may change under their name; the injector depends on what is in them.
    if study.config.pretrained is None:
        mark = {"watermark_sha256": file_digest(study.config.watermark)}
        do("injector", settings(*ATTACK) | mark, ("data",), lambda at: train_mark(study, at))
    else:
        card = {"card": pretrained_card(study.config.pretrained)["sha256"]}
        do("injector", settings(*READY_MADE) | card, ("data",), lambda _: take_mark(study))
    do("watermark", settings("measure"), ("injector",), lambda _: measure_mark(study))
    training = ("data", "victim", "train")
    do(
        "victim-clean",
        settings(*training),
        ("data",),
        lambda at: train_victim(study, "clean", at),
    )
    do(
        "victim-backdoored",
        settings(*training, "plan"),
        ("data", "injector"),
        lambda at: train_victim(study, "backdoored", at),
    )
    do(
        "robustness",
        settings("measure", "plan"),
        ("injector", "victim-clean", "victim-backdoored"),
        lambda _: measure_victims(study),
    )
    for defence in DEFENCES:
        for victim in ("clean", "backdoored"):
            do(
                f"scan-{defence}-{victim}",
                settings("defence", defence, "plan"),
                (f"victim-{victim}",),
                partial(_scan, study, defence, victim),
            )
        do(
            f"cleaning-{defence}",
            settings("defence", f"{defence}_cleaning", "measure", "plan"),
            ("injector", "victim-backdoored", f"scan-{defence}-backdoored"),
            partial(_clean, study, defence),
        )
    do(
        "exports",
        settings("measure"),
        ("injector", "victim-backdoored", "scan-reverse-backdoored"),
        lambda _: export_models(study),
    )


def _scan(study: Study, defence: str, victim: str, _: Path) -> Made:
    return scan_victim(study, defence, victim)


def _clean(study: Study, defence: str, _: Path) -> Made:
    return clean_victim(study, defence)


def _stderr(line: str) -> None:
    sys.stderr.write(line + "\n")


def _silent(line: str) -> None:
    """Say nothing."""
