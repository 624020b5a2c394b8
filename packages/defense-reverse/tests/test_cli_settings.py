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
from wm_victim import build_classifier, load_dataset, save_classifier
from wm_victim.toy_digits import fit_head


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
        "--clean-images": st.integers(2, 999),
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
    few = load_dataset("digits", image_size=28, limit=400).train
    fit_head(model, few.images, few.labels)
    save_classifier(model, tmp_path / "victim.safetensors")
    file = tmp_path / "mine.toml"
    file.write_text("images = 20\nalpha = 0.1\nseed = 5\n[scan]\nsteps = 7\n")
    usual = ["scan", str(tmp_path / "victim.safetensors"), "--data", "digits"]
    assert main([*usual, "--config", str(file)]) == 3
    assert main([*usual, "--config", str(file), "--images", "30", "--seed", "0"]) == 3
    assert asked == [(20, 7, "fast*", 0.1, 5), (30, 7, "fast*", 0.1, 0)]
