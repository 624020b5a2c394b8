"""The settings of ``wm-extract train`` as a file."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wm_extract import joint
from wm_extract.cli import main
from wm_inject import save_image


def printed(*argv: object) -> str:
    """What --print-config prints."""
    out = io.StringIO()
    with redirect_stdout(out):
        assert main(["train", *map(str, argv), "--print-config"]) == 0
    return out.getvalue()


OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "--recipe": st.sampled_from(["robust", "paper", "released"]),
        "--size": st.sampled_from(["tiny", "small", "base", "large"]),
        "--image-size": st.integers(8, 512),
        "--iterations": st.integers(1, 10**6),
        "--psnr": st.floats(1, 99),
        "--false-positive-rate": st.floats(1e-6, 0.4),
        "--seed": st.integers(0, 2**31),
    },
)


@settings(derandomize=True, max_examples=40, deadline=None)
@given(options=OPTIONS, grey=st.sampled_from([(), ("--grey",), ("--no-grey",)]))
def test_what_is_printed_gives_the_same_settings(
    tmp_path_factory: pytest.TempPathFactory, options: dict[str, object], grey: tuple[str, ...]
) -> None:
    text = printed(*(part for pair in options.items() for part in pair), *grey)
    file = tmp_path_factory.mktemp("settings") / "mine.toml"
    file.write_text(text)
    assert printed("--config", file) == text
    assert printed("--config", file, "--seed", 7) != text or options.get("--seed") == 7


def test_the_settings_reach_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    draw = np.random.default_rng(0)
    for index in range(200):
        pixels = draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        save_image(tmp_path / "photos" / f"{index}.png", pixels)
    asked: list[Any] = []

    def train(images: Any, *, config: Any, seed: int, **_: Any) -> None:
        asked.append((tuple(images.shape[1:]), config, seed))
        raise ValueError("enough")

    monkeypatch.setattr(joint, "train_jointly", train)
    file = tmp_path / "mine.toml"
    file.write_text(
        'image_size = 16\ngrey = true\nseed = 3\n[training]\npreset = "paper"\niterations = 5\n'
    )
    usual = ["train", str(tmp_path / "photos"), "--out", str(tmp_path), "--config", str(file)]
    assert main(usual) == 1
    assert main([*usual, "--no-grey", "--iterations", "9", "--seed", "0"]) == 1
    start = ["--start", "tiny-32", "--image-size", "32", "--no-grey"]
    assert main([*usual, *start]) == 1
    *asked, (_, going_on, _) = asked
    assert going_on.psnr_start is None
    (first, config, seed), (second, other, zero) = asked
    assert (first, config.recipe, config.iterations, seed) == ((1, 16, 16), "paper", 5, 3)
    assert (second, other.recipe, other.iterations, zero) == ((3, 16, 16), "paper", 9, 0)
