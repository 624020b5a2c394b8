"""What wm_eval refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tools.tests.refusals import evaluation_studies
from tools.tests.refusals.common import IMAGES, LABELS, SIZE, Call, Table, images, write
from tools.tests.refusals.extract import watermark
from tools.tests.refusals.victim import DATA, MODEL, sets
from torch import nn

import wm_eval as ev
import wm_victim as wv
from wm_extract import Identity
from wm_inject import BadNetsTrigger, PoisonPlan, default_watermark

MARK = default_watermark(SIZE)
PATCH = BadNetsTrigger(image_size=SIZE)
YES = torch.tensor([True, True, False, False])
RECORD = ev.Record(what="test", config={}, seed=0, data="none", values={})


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
        (tmp / "records").mkdir()
        write(tmp / "records" / "data.json")
        return write(tmp / "data.json").parent

    return {
        "no folder": lambda tmp: call(tmp / "missing"),
        "no records": lambda tmp: call(tmp),
        "no record": lambda tmp: call(broken(tmp)),
    }


def study(text: str) -> Call:
    return lambda tmp: ev.load_study(write(tmp / "study.toml", text.encode()))


TABLE = Table(
    module="wm_eval",
    cases={
        **evaluation_studies.CASES,
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
            "what": lambda _: ev.Record("No Name", {}, 0, "none", {}),
            "seed": lambda _: ev.Record("test", {}, -1, "none", {}),
            "nan": lambda _: ev.Record("test", {}, 0, "none", {"psnr": float("nan")}),
            "tensor": lambda _: ev.Record("test", {}, 0, "none", {"mask": YES}),
        },
        "write_record": {
            "name": lambda tmp: ev.write_record(tmp / "record.txt", RECORD),
            "env name": lambda tmp: ev.write_record(tmp / "record.env.json", RECORD),
        },
        "read_record": {
            "no file": lambda tmp: ev.read_record(tmp / "missing.json"),
            "no json": lambda tmp: ev.read_record(write(tmp / "text.json")),
            "no record": lambda tmp: ev.read_record(write(tmp / "other.json", b"{}")),
            "a list": lambda tmp: ev.read_record(write(tmp / "other.json", b"[]")),
        },
        "read_records": folders(ev.read_records),
        "render_markdown": folders(ev.render_markdown),
        "render_report": folders(ev.render_report),
        "DataConfig": {
            "image_size": lambda _: ev.DataConfig(image_size=0),
            "limit": lambda _: ev.DataConfig(limit=0),
        },
        "VictimConfig": {"width": lambda _: ev.VictimConfig(width=0)},
        "MeasureConfig": {
            "corruption": lambda _: ev.MeasureConfig(corruptions=("nothing",)),
            "rate": lambda _: ev.MeasureConfig(false_positive_rate=0.5),
            "limit": lambda _: ev.MeasureConfig(limit=1),
            "pictures": lambda _: ev.MeasureConfig(pictures=0),
        },
        "DefenceConfig": {
            "images": lambda _: ev.DefenceConfig(images=0),
            "alpha": lambda _: ev.DefenceConfig(alpha=1.0),
            "max_ratio": lambda _: ev.DefenceConfig(max_ratio=0.0),
        },
        "StudyConfig": {
            "seed": lambda _: ev.StudyConfig(seed=-1),
            "strength": lambda _: ev.StudyConfig(strength=0.0),
            "plan": lambda _: ev.StudyConfig(plan=PoisonPlan(mode="per_batch")),
        },
        "study_preset": {"preset": lambda _: ev.study_preset("secret")},
        "load_study": {
            "no file": lambda tmp: ev.load_study(tmp / "missing.toml"),
            "no toml": study("["),
            "preset": study('preset = "secret"'),
            "unknown key": study("colour = 1"),
            "unknown key inside": study("[data]\ncolour = 1"),
            "another type": study('strength = "much"'),
            "value": study("strength = -1.0"),
            "a second seed": study("[train]\nseed = 1"),
            "table": study("data = 3"),
        },
        "run_study": {
            "device": lambda tmp: ev.run_study(ev.StudyConfig(), tmp, device="abacus"),
            "target": lambda tmp: ev.run_study(
                ev.StudyConfig(plan=PoisonPlan(target=99)), tmp, progress=False
            ),
            "data": lambda tmp: ev.run_study(
                ev.StudyConfig(data=ev.DataConfig(name=str(tmp))), tmp / "out", progress=False
            ),
        },
    },
    nothing={
        "Metrics": "a result: summarize fills it in from outcomes that it has checked",
        "StudyResult": "a result: run_study fills it in",
    },
)
