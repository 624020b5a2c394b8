"""The settings of ``wm-victim train`` as a file."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wm_inject.core.checkpoint import load_checkpoint
from wm_victim.cli import main


def printed(*argv: object) -> str:
    """What --print-config prints."""
    out = io.StringIO()
    with redirect_stdout(out):
        assert main(["train", *map(str, argv), "--print-config"]) == 0
    return out.getvalue()


OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "--preset": st.sampled_from(["paper", "fast", "mnist", "record", "airbench"]),
        "--model": st.sampled_from(["resnet18", "vgg16", "timm:resnet26"]),
        "--width": st.integers(8, 64),
        "--limit": st.integers(1, 10**5),
        "--image-size": st.integers(8, 256),
        "--epochs": st.integers(1, 500),
        "--lr": st.floats(1e-9, 10),
        "--augment": st.sampled_from(["none", "crop", "crop-flip", "shift", "alternating"]),
        "--target": st.integers(0, 99),
        "--ratio": st.floats(0.001, 1),
        "--seed": st.integers(0, 2**32 - 1),
    },
)
ATTACKS = st.sampled_from(
    [
        (),
        ("--attack", "wanet", "--set", "grid=5", "--set", "strength=0.25", "--profile", "tiny"),
        ("--attack", "blend", "--set", "picture=cartoon"),
        ("--clean-label",),
        ("--no-clean-label", "--no-noise-mode"),
    ]
)


@settings(derandomize=True, max_examples=40, deadline=None)
@given(options=OPTIONS, attack=ATTACKS)
def test_what_is_printed_gives_the_same_settings(
    tmp_path_factory: pytest.TempPathFactory, options: dict[str, object], attack: tuple[str, ...]
) -> None:
    text = printed(*(part for pair in options.items() for part in pair), *attack)
    file = tmp_path_factory.mktemp("settings") / "mine.toml"
    file.write_text(text)
    assert printed("--config", file) == text
    assert printed("--config", file, "--seed", 7) != text or options.get("--seed") == 7


def test_a_file_trains_what_its_options_train(tmp_path: Path) -> None:
    options = ["--width", "8", "--limit", "320", "--image-size", "16", "--epochs", "1"]
    options += ["--attack", "badnets", "--set", "margin=2", "--ratio", "0.25", "--seed", "3"]
    file = tmp_path / "mine.toml"
    file.write_text(printed(*options))
    outs = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for out, given_here in zip(outs, (options, ["--config", str(file)]), strict=True):
        common = ["train", "--data", "digits", "--device", "cpu", "--out", str(out)]
        assert main([*common, *given_here]) == 0
    first, second = (load_checkpoint(out) for out in outs)
    assert first.state.keys() == second.state.keys()
    assert all((first.state[name] == second.state[name]).all() for name in first.state)
    assert first.metadata["attack"] == second.metadata["attack"]
    assert first.metadata["attack"]["settings"] == ["margin=2"]
    assert first.metadata["recipe"] == second.metadata["recipe"]
    assert first.metadata["recipe"]["seed"] == 3
    assert (first.metadata["preset"], second.metadata["preset"]) == ("fast", None)


def test_an_unknown_attack_in_a_file_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('attack = "none at all"')
    assert main(["train", "--config", str(file), "--print-config"]) == 1
    message = capsys.readouterr().err
    assert message.startswith(f"error: {file}: ") and message.count("\n") == 1
    assert "attack" in message and "badnets" in message


def test_settings_of_an_attack_from_a_file_need_an_attack(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("[set]\ngrid = 5\n")
    with pytest.raises(SystemExit) as left:
        main(["train", "--config", str(file), "--print-config"])
    assert left.value.code == 64
    assert "--set goes with --attack" in capsys.readouterr().err
