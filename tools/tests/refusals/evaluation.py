"""What wm_eval refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tools.tests.refusals.common import IMAGES, LABELS, SIZE, Call, Table, images, write
from tools.tests.refusals.extract import watermark
from tools.tests.refusals.victim import DATA, FLAT, MODEL, sets
from torch import nn

import wm_eval as ev
import wm_victim as wv
from wm_extract import Identity
from wm_inject import BadNetsTrigger, default_watermark

MARK = default_watermark(SIZE)
PATCH = BadNetsTrigger(image_size=SIZE)
YES = torch.tensor([True, True, False, False])


def measured(call: Callable[..., object]) -> dict[str, Call]:
    """The same for `evaluate` and `outcomes`."""

    def run(data: wv.ImageSet = DATA, model: nn.Module = MODEL, **more: Any) -> object:
        settings = {"target": 0, "corruptions": {"none": Identity()}, **more}
        return call(model, PATCH, data, **settings)

    return {
        **sets(run),
        "target": lambda _: run(target=-1),
        "target above K": lambda _: run(target=3),
        "label above K": lambda _: run(wv.ImageSet(IMAGES, LABELS + 5, DATA.ids)),
        "no corruption": lambda _: run(corruptions={}),
        "label_map": lambda _: run(label_map="nothing"),
        "batch_size": lambda _: run(batch_size=0),
        "seed": lambda _: run(seed=-1),
        "other size": lambda _: run(
            wv.ImageSet(torch.zeros(4, 1, SIZE, SIZE + 1), LABELS, DATA.ids)
        ),
    }


def columns(call: Callable[[Any], object]) -> dict[str, Call]:
    """The four kinds for a function of a bool column."""
    return {
        "shape": lambda _: call(YES[None]),
        "dtype": lambda _: call(YES.float()),
        "range": lambda _: call(YES.long() * 2),
        "empty": lambda _: call(YES[:0]),
    }


def outcomes(correct: Any = YES, attacked: Any = YES) -> ev.Outcomes:
    return ev.Outcomes(correct, attacked, YES[: len(attacked)], YES[: len(attacked)])


def counts(call: Callable[..., object]) -> dict[str, Call]:
    """Counts and levels that no interval has."""
    return {
        "range": lambda _: call(5, 4),
        "negative": lambda _: call(-1, 4),
        "empty": lambda _: call(0, 0),
        "dtype": lambda _: call(0.5, 4),
        "level": lambda _: call(1, 4, level=1.0),
    }


def folders(call: Callable[[Path], object]) -> dict[str, Call]:
    """Folders without a study's records."""

    def broken(tmp: Path) -> Path:
        return write(tmp / "records.jsonl", b"{}\n").parent

    return {
        "no folder": lambda tmp: call(tmp / "missing"),
        "no records": lambda tmp: call(tmp),
        "no record": lambda tmp: call(broken(tmp)),
    }


def stage(name: str, *inputs: str) -> ev.Stage:
    return ev.Stage(name, {}, lambda store, checkpoint: ev.Result({}), inputs=inputs)


def study(text: str) -> Call:
    return lambda tmp: ev.load_study(write(tmp / "study.toml", text.encode()))


TABLE = Table(
    module="wm_eval",
    cases={
        "evaluate": measured(ev.evaluate),
        "outcomes": measured(ev.outcomes),
        "summarize": {
            "lengths": lambda _: ev.summarize(outcomes(correct=YES[:2])),
            "dtype": lambda _: ev.summarize(outcomes(correct=YES.float())),
            "shape": lambda _: ev.summarize(ev.Outcomes(*[YES[None]] * 4)),
            "empty": lambda _: ev.summarize(ev.Outcomes(*[YES[:0]] * 4)),
            "none attacked": lambda _: ev.summarize(outcomes(attacked=~YES & YES)),
        },
        "compare": {
            **columns(lambda bad: ev.compare(bad, YES)),
            "lengths": lambda _: ev.compare(YES, YES[:2]),
        },
        "constant_score": {
            "shape": lambda _: ev.constant_score(MARK[0]),
            "dtype": lambda _: ev.constant_score(MARK.double()),
            "range": lambda _: ev.constant_score(MARK * 2),
            "empty": lambda _: ev.constant_score(MARK[:0]),
            "all dark": lambda _: ev.constant_score(MARK * 0),
        },
        "balanced_bit_accuracy": {
            **images(lambda bad: ev.balanced_bit_accuracy(bad, MARK)),
            **watermark(lambda bad: ev.balanced_bit_accuracy(IMAGES, bad)),
        },
        "wilson": counts(ev.wilson),
        "exact_interval": counts(ev.exact_interval),
        "exact_upper": counts(ev.exact_upper),
        "exact_lower": counts(ev.exact_lower),
        "paired_difference": {
            **counts(lambda k, n, **more: ev.paired_difference(k, 0, n, **more)),
            "too many": lambda _: ev.paired_difference(3, 3, 4),
        },
        "Record": {
            "kind": lambda _: ev.Record("No Name", {}, {}, {}, "none", {}),
            "key": lambda _: ev.Record("test", {"Seed": 0}, {}, {}, "none", {}),
            "nan": lambda _: ev.Record("test", {}, {}, {}, "none", {"psnr": float("nan")}).line,
            "tensor": lambda _: ev.Record("test", {}, {}, {}, "none", {"mask": YES}).line,
        },
        "Stage": {"kind": lambda _: stage("No Name")},
        "Store": {"no record": lambda tmp: ev.Store(tmp).record("test", {})},
        "run": {
            "minutes": lambda tmp: ev.run([], tmp, minutes=0),
            "device": lambda tmp: ev.run([], tmp, device="abacus"),
            "unknown input": lambda tmp: ev.run([stage("a", "b")], tmp),
            "circle": lambda tmp: ev.run([stage("a", "b"), stage("b", "a")], tmp),
        },
        "StudyRecords": {
            "several": lambda _: ev.StudyRecords(
                tuple(ev.Record("a", {"seed": k}, {}, {}, "", {}) for k in (0, 1))
            ).one("a")
        },
        "read_study": folders(ev.read_study),
        "render_report": folders(ev.render_report),
        "write_tables": folders(ev.write_tables),
        "write_page": {"no records": lambda tmp: ev.write_page(tmp)},
        "summarise": {
            "no scan": lambda _: ev.summarise([]),
            "floor": lambda _: ev.summarise([], floor=0.0),
            "alpha": lambda _: ev.summarise([], alpha=1.0),
        },
        "detector": {
            "name": lambda _: ev.detector("strip"),
            "preset": lambda _: ev.detector("nc", "secret"),
            "setting": lambda _: ev.detector("nc", steps=0),
            "images": lambda _: ev.detector("nc").scan(MODEL, IMAGES + 1, progress=False),
            "no logits": lambda _: ev.detector("nc").scan(FLAT, IMAGES, progress=False),
        },
        "der": {
            "acc_before": lambda _: ev.der(1.5, 1.0, 0.9, 0.0),
            "asr_after": lambda _: ev.der(0.9, 1.0, 0.9, float("nan")),
            "percent": lambda _: ev.der(90.0, 100.0, 90.0, 0.0),
        },
        "DataConfig": {
            "image_size": lambda _: ev.DataConfig(image_size=0),
            "limit": lambda _: ev.DataConfig(limit=0),
        },
        "VictimConfig": {"width": lambda _: ev.VictimConfig(width=0)},
        "MeasureConfig": {
            "corruption": lambda _: ev.MeasureConfig(corruptions=("nothing",)),
            "rate": lambda _: ev.MeasureConfig(false_positive_rate=0.5),
            "limit": lambda _: ev.MeasureConfig(limit=0),
            "pictures": lambda _: ev.MeasureConfig(pictures=0),
        },
        "DefenderConfig": {
            "images": lambda _: ev.DefenderConfig(images=1),
            "alpha": lambda _: ev.DefenderConfig(alpha=1.0),
            "fractions": lambda _: ev.DefenderConfig(fractions=(2.0,)),
        },
        "WatermarkConfig": {
            "strength": lambda _: ev.WatermarkConfig(strength=0.0),
            "pretrained": lambda _: ev.WatermarkConfig(pretrained="secret"),
        },
        "Setting": {
            "attack": lambda _: ev.Setting(test={"nothing": 1}),
            "count": lambda _: ev.Setting(calibration={"clean": -1}),
        },
        "Study": {
            "no attack": lambda _: ev.Study(),
            "attack": lambda _: ev.Study(attacks=("nothing",)),
            "name": lambda _: ev.Study(name="../elsewhere", attacks=("clean",)),
            "detector": lambda _: ev.Study(attacks=("clean",), detectors={"nothing": {}}),
        },
        "study_stages": {
            "target": lambda _: list(ev.study_stages(ev.Study(attacks=("clean",), target=99))),
            "data": lambda tmp: list(
                ev.study_stages(ev.Study(attacks=("clean",), data=ev.DataConfig(str(tmp))))
            ),
        },
        "load_study": {
            "no file": lambda tmp: ev.load_study(tmp / "missing.toml"),
            "name": lambda _: ev.load_study("secret"),
            "no toml": study("["),
            "base": study('base = "secret"'),
            "unknown key": study("colour = 1"),
            "unknown key inside": study("[data]\ncolour = 1"),
            "another type": study('target = "much"'),
            "value": study("target = -1"),
            "a second seed": study("[train]\nseed = 1"),
            "table": study("data = 3"),
        },
    },
    nothing={
        "Metrics": "a result: summarize fills it in from outcomes that it has checked",
        "Failure": "a result: a run fills it in",
        "shipped_studies": "takes nothing",
    },
)
