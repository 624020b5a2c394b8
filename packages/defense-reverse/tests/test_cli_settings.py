"""The settings of ``defense-reverse scan`` and ``clean`` as files."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from defense_reverse import ReverseGenerator
from defense_reverse.cli import main
from wm_victim import build_classifier, save_classifier


def printed(*argv: object) -> str:
    """What --print-config prints."""
    out = io.StringIO()
    with redirect_stdout(out):
        assert main([*map(str, argv), "--print-config"]) == 0
    return out.getvalue()


SCAN = {
    "--preset": st.sampled_from(["paper", "robust", "reference", "fast"]),
    "--images": st.integers(1, 10**5),
    "--alpha": st.floats(1e-6, 0.9),
    "--max-ratio": st.floats(0.01, 1),
    "--seed": st.integers(0, 2**31),
}
MORE = {
    "scan": {"--filter-rate": st.floats(1e-6, 0.4)},
    "clean": {
        "--recipe": st.sampled_from(["nc", "paper", "reverse"]),
        "--clean-images": st.integers(1, 999),
    },
}


@pytest.mark.integration
@pytest.mark.parametrize("command", MORE)
@settings(derandomize=True, max_examples=25, deadline=None)
@given(data=st.data())
def test_what_is_printed_gives_the_same_settings(
    tmp_path_factory: pytest.TempPathFactory, command: str, data: st.DataObject
) -> None:
    options = data.draw(st.fixed_dictionaries({}, optional=SCAN | MORE[command]))
    text = printed(command, *(part for pair in options.items() for part in pair))
    file = tmp_path_factory.mktemp("settings") / "mine.toml"
    file.write_text(text)
    assert printed(command, "--config", file) == text
    assert printed(command, "--config", file, "--seed", 7) != text or options.get("--seed") == 7


def test_the_settings_reach_the_scan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def scan(detector: ReverseGenerator, model: Any, images: Any, **options: Any) -> None:
        config = detector.config
        asked.append((len(images), config.steps, config.name, detector.alpha, options["seed"]))
        raise ValueError("enough")

    monkeypatch.setattr(ReverseGenerator, "scan", scan)
    model = build_classifier("wanet-mnist", num_classes=10, channels=1, image_size=28)
    save_classifier(model, tmp_path / "victim.safetensors")
    file = tmp_path / "mine.toml"
    file.write_text("images = 20\nalpha = 0.1\nseed = 5\n[scan]\nsteps = 7\n")
    usual = ["scan", str(tmp_path / "victim.safetensors"), "--data", "digits"]
    assert main([*usual, "--config", str(file)]) == 3
    assert main([*usual, "--config", str(file), "--images", "30", "--seed", "0"]) == 3
    assert asked == [(20, 7, "fast*", 0.1, 5), (30, 7, "fast*", 0.1, 0)]


def test_a_file_that_does_not_fit_is_one_line_and_no_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], subtests: pytest.Subtests
) -> None:
    for command, code in [("scan", 3), ("clean", 1)]:
        for text, message in [
            ("colour = 1", "unknown key 'colour' in settings: expected one of alpha, "),
            ("[scan]\nstep = 1", "unknown key 'step' in settings.scan: expected one of "),
            ('images = "many"', "expected int for settings.images, got 'many'"),
            ("[scan]\nlr = -1", "settings.scan: expected lr > 0, got -1"),
        ]:
            with subtests.test(command=command, code=code, text=text, message=message):
                file = tmp_path / "mine.toml"
                file.write_text(text)
                assert main([command, "--config", str(file), "--print-config"]) == code
                said = capsys.readouterr().err
                assert said.startswith(f"error: {file}: {message}") and said.count("\n") == 1


@pytest.mark.parametrize(
    ("option", "value", "table"),
    [("--preset", "robust", "scan"), ("--recipe", "paper", "unlearning")],
)
def test_a_preset_and_its_table_are_not_both_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, value: str, table: str
) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(printed("clean"))
    with pytest.raises(SystemExit) as left:
        main(["clean", "--config", str(file), option, value, "--print-config"])
    assert left.value.code == 64
    assert f"{option} and {table!r} in {file} both say where" in capsys.readouterr().err
