from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from tools import bench, speed
from torch import nn

Work = Callable[[], object]
Runs = Callable[..., list[list[str]]]


def report(**shares: float | None) -> dict[str, Any]:
    """As pytest-benchmark writes it; None is a benchmark of a ratio."""
    rows = [
        {
            "fullname": name,
            "group": None,
            "extra_info": {} if share is None else {bench.FIGURE: share},
            "stats": {"median": 0.1, "rounds": 7},
        }
        for name, share in shares.items()
    ]
    cpu = {"brand_raw": "fast", "flags": ["avx2", "avx512f"]}
    return {"benchmarks": rows, "machine_info": {"node": "secret", "cpu": cpu}}


@pytest.fixture
def baseline(tmp_path: Path) -> Path:
    path = tmp_path / "baseline.json"
    shares = {"avx512f": {"a": 0.8, "b": 0.5}, "amx_bf16": {"a": 9.0}}
    path.write_text(json.dumps({"format": bench.FORMAT, "fractions": shares}))
    return path


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    """Stands in for pytest: each call gives the next report; what was asked for is kept."""

    def plan(*reports: dict[str, Any]) -> list[list[str]]:
        asked: list[list[str]] = []
        left = iter(reports)

        def run(chosen: list[str]) -> dict[str, Any]:
            asked.append(list(chosen))
            return next(left)

        monkeypatch.setattr(bench, "run", run)
        return asked

    return plan


def test_a_regression_that_is_seen_twice_fails(
    baseline: Path, runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = runs(report(a=0.6, b=0.5), report(a=0.67))
    assert bench.main(["--baseline", str(baseline)]) == 1
    assert asked == [["packages"], ["a"]]
    out = capsys.readouterr().out
    assert "1 fell by more than 15%" in out and "0.800    0.670   -16.2%  a" in out


def test_a_regression_that_goes_away_was_the_machine(baseline: Path, runs: Runs) -> None:
    runs(report(a=0.6, b=0.5), report(a=0.79))
    assert bench.main(["--baseline", str(baseline)]) == 0


def test_a_loss_within_the_tolerance_an_improvement_and_a_ratio_pass(
    baseline: Path, runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = runs(report(a=0.69, b=0.9, ratio=None))
    assert bench.main(["--baseline", str(baseline)]) == 0
    assert len(asked) == 1
    out = capsys.readouterr().out
    assert "-13.8%" in out and "+80.0%" in out and "ratio" not in out


def test_new_and_missing_benchmarks_are_told_and_pass(
    baseline: Path, runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    runs(report(a=0.8, c=0.1))
    assert bench.main(["--baseline", str(baseline)]) == 0
    out = capsys.readouterr().out
    assert "1 new, not in the baseline" in out and "1 in the baseline, not run" in out


def test_update_writes_the_baseline_whole_or_in_part(baseline: Path, runs: Runs) -> None:
    runs(report(c=0.3), report(a=0.7, ratio=None))
    assert bench.main(["--baseline", str(baseline), "--update", "-k", "c"]) == 0
    other = {"amx_bf16": {"a": 9.0}}
    assert bench.load_baseline(baseline) == {"avx512f": {"a": 0.8, "b": 0.5, "c": 0.3}, **other}
    assert bench.main(["--baseline", str(baseline), "--update"]) == 0
    assert bench.load_baseline(baseline) == {"avx512f": {"a": 0.7}, **other}


def test_another_kind_of_processor_is_not_compared(
    baseline: Path, runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    other = report(a=0.1)
    other["machine_info"]["cpu"]["flags"] = ["avx2"]
    runs(other)
    assert bench.main(["--baseline", str(baseline)]) == 0
    assert "no baseline for processors with avx2" in capsys.readouterr().out


def test_the_record_has_the_figures_and_names_no_machine(
    baseline: Path, runs: Runs, tmp_path: Path
) -> None:
    runs(report(a=0.8, b=0.5))
    out = tmp_path / "speed.json"
    assert bench.main(["--baseline", str(baseline), "--record", str(out)]) == 0
    record = json.loads(out.read_text())
    row = {bench.FIGURE: 0.8, "seconds": 0.1, "rounds": 7, "group": None}
    assert record["benchmarks"]["a"] == row
    assert record["processor"] == "fast" and "secret" not in out.read_text()


def test_a_record_is_completed_in_part_and_never_mixed(
    baseline: Path, runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = report(b=0.6)
    other["machine_info"]["cpu"]["brand_raw"] = "slow"
    runs(report(a=0.8, b=0.5), report(b=0.6), other)
    out = tmp_path / "speed.json"
    given = ["--baseline", str(baseline), "--record", str(out)]
    for extra in ([], ["--", "-k", "b"]):
        assert bench.main([*given, *extra]) == 0
    rows = json.loads(out.read_text())["benchmarks"]
    assert [rows[name][bench.FIGURE] for name in "ab"] == [0.8, 0.6]
    assert bench.main([*given, "--", "-k", "b"]) == 2
    assert "of this machine and these versions" in capsys.readouterr().err


def test_a_bad_baseline_is_refused_before_anything_runs(
    tmp_path: Path, runs: Runs, capsys: pytest.CaptureFixture[str], subtests: pytest.Subtests
) -> None:
    for text, message in [
        (None, "found no"),
        ("{", "expected JSON"),
        ("[]", "of format wm-bench-2 in bad.json, got list"),
        ('{"format": "other"}', "got other"),
        ('{"format": "wm-bench-2"}', "of format"),
        ('{"format": "wm-bench-2", "fractions": {"a": 0.8}}', "by benchmark"),
        ('{"format": "wm-bench-2", "fractions": {"x": {"a": "fast"}}}', "for a, got 'fast'"),
        ('{"format": "wm-bench-2", "fractions": {"x": {"a": 0}}}', "share > 0 for a, got 0"),
        ('{"format": "wm-bench-2", "fractions": {"x": {"a": NaN}}}', "share > 0 for a, got nan"),
    ]:
        with subtests.test(text=text, message=message):
            path = tmp_path / "bad.json"
            if text is not None:
                path.write_text(text)
            asked = runs()
            assert bench.main(["--baseline", str(path)]) == 2
            assert asked == [] and message in capsys.readouterr().err


def test_a_bad_report_is_refused(subtests: pytest.Subtests) -> None:
    wrong: list[Any] = [{}, {"benchmarks": None}, [], report(a=-1.0)]
    for bad in wrong:
        with subtests.test(bad=bad), pytest.raises(ValueError, match="expected a"):
            bench.fractions(bad)


def test_a_run_that_fails_is_no_result(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], baseline: Path
) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1))
    assert bench.main(["--baseline", str(baseline)]) == 2
    assert "pytest ended with 1" in capsys.readouterr().err


def test_the_committed_baseline_can_be_read() -> None:
    assert bench.load_baseline(bench.BASELINE)


def test_flops_are_those_counted_by_hand() -> None:
    layers = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 16, 5))
    wanted = 2 * (2 * 8 * 3 * 9 * 16) + 2 * (2 * 8 * 16 * 5)  # two images of 4 x 4
    assert speed.count_flops(layers, torch.rand(2, 3, 4, 4)) == wanted
    with pytest.raises(ValueError, match="got 0 FLOPs"):
        speed.count_flops(nn.ReLU(), torch.rand(1))


def test_flops_of_the_injector_are_those_of_equation_3() -> None:
    from wm_inject.watermark.picture import default_watermark
    from wm_inject.watermark.vit import ViTInjector

    d, length, patch, blocks = 64, 64, 4, 3
    block = 12 * d * d * length + 2 * length * length * d  # weights; q k^T and the mean of v
    project = length * (d * d + d * d // 2 + d * d // 2)
    edges = length * d * (2 * 3 * patch**2 + patch**2)  # patches in, pixels out, the watermark
    wanted = 2 * (blocks * block + project + edges)
    model = ViTInjector(
        image_size=32,
        channels=3,
        patch_size=patch,
        width=d,
        heads=2,
        depth=2,
        decoder_depth=1,
    )
    assert speed.count_flops(model, torch.rand(1, 3, 32, 32), default_watermark(32)) == wanted


def test_the_share_is_that_of_the_best_product_by_median() -> None:
    work = {"slow": 100.0, "fast": 100.0}
    products = {"slow": [2.0, 2.0, 2.0], "fast": [1.0, 1.0, 9.0]}  # 100 a second, but for a hiccup
    fraction, spread, best = speed.share([80.0, 50.0, 10.0], products, work)
    assert fraction == pytest.approx(0.8) and best == "fast"
    assert spread == pytest.approx(0.4)
    bad: dict[str, list[float]]
    for bad in ({}, {"fast": [1.0]}):
        with pytest.raises(ValueError, match="one time of every product"):
            speed.share([1.0, 2.0], bad, work)


def test_both_kernels_multiply_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        one: Any = speed.product((4, 8, 3), dtype)()
        monkeypatch.setattr(speed, "packed_weight", lambda weight, rows: None)
        other: Any = speed.product((4, 8, 3), dtype)()
        assert torch.allclose(one, other, rtol=0.02, atol=0.02)
        monkeypatch.undo()
        plain: Any = speed.plain_product((4, 8, 3), dtype)()
        assert plain.shape == (4, 3)


def test_measure_gives_the_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "SQUARES", ((64, 64, 64),))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    speed.fastest_products.cache_clear()

    class Fixture:
        """The part of pytest-benchmark that is used."""

        extra_info: ClassVar[dict[str, Any]] = {}

        def pedantic(self, target: Work, setup: Work, rounds: int, warmup_rounds: int) -> None:
            for _ in range(rounds + warmup_rounds):
                setup()
                target()

    left = torch.rand(64, 64)
    fixture = Fixture()
    found = speed.measure(
        fixture, lambda: left @ left, flops=2 * 64**3, images=64, rounds=3, shapes=[(8, 8, 8)]
    )
    speed.fastest_products.cache_clear()
    assert fixture.extra_info == found
    assert found[bench.FIGURE] > 0 and found["images_per_second"] > 0
    assert found["matmul"].endswith("float32")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with pytest.raises(ValueError, match="expected one thread, got 2"):
        speed.measure(fixture, lambda: None, flops=1, images=1)
