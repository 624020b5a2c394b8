from __future__ import annotations

import pytest
import torch

from defense_reverse import ReversedTrigger, UNetGenerator, load_reversed, save_reversed
from wm_inject import CheckpointError, OnnxModel, save_checkpoint, to_onnx, to_torchscript

TARGET = 2


@pytest.mark.integration
def test_it_keeps_the_trigger_contract(backdoored, data):
    trigger, images = backdoored.report.triggers[TARGET], data[0][:5]
    kept = images.clone()
    with torch.no_grad():
        out = trigger(images, ids=torch.arange(5), target=torch.zeros(5, dtype=torch.int64))
        alone = torch.cat([trigger(image[None]) for image in images])
    assert out.shape == images.shape and out.dtype == torch.float32
    assert torch.isfinite(out).all() and out.min() >= 0 and out.max() <= 1
    torch.testing.assert_close(out, alone, atol=1e-6, rtol=0)
    assert torch.equal(images, kept) and not trigger.training


@pytest.mark.integration
def test_a_file_gives_the_same_bits(backdoored, data, tmp_path):
    trigger = backdoored.report.triggers[TARGET]
    save_reversed(trigger, tmp_path / "t.safetensors", {"seed": 0})
    again = load_reversed(tmp_path / "t.safetensors")
    with torch.no_grad():
        assert torch.equal(trigger(data[0]), again(data[0]))
    assert again.config == trigger.config and not again.training
    save_reversed(again, tmp_path / "u.safetensors", {"seed": 0})
    written = [(tmp_path / name).read_bytes() for name in ("t.safetensors", "u.safetensors")]
    assert written[0] == written[1]


@pytest.mark.integration
def test_trained_weights_export(backdoored, data, tmp_path):
    trigger, images = backdoored.report.triggers[TARGET], data[0][:3]
    assert to_torchscript(trigger, images, tmp_path / "t.pt").max_abs <= 1e-4
    assert to_onnx(trigger, images, tmp_path / "t.onnx").max_abs <= 1e-4
    found = torch.from_numpy(OnnxModel(tmp_path / "t.onnx")(images.numpy()))
    torch.testing.assert_close(found, trigger(images).detach(), atol=1e-4, rtol=0)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "t.safetensors"
    with pytest.raises(CheckpointError):
        load_reversed(path)
    generator = UNetGenerator(channels=1, width=2)
    save_checkpoint(path, kind="patch", config={}, state=generator.state_dict())
    with pytest.raises(CheckpointError, match="reverse-generator"):
        load_reversed(path)
    good = ReversedTrigger(generator, target=0)
    for config in (
        {},
        {**good.config, "target": -1},
        {**good.config, "extra": 1},
        {**good.config, "generator": {**generator.config, "width": 3}},
        {**good.config, "generator": {**generator.config, "width": 10**6}},
    ):
        save_checkpoint(path, kind=good.kind, config=config, state=good.state_dict())
        with pytest.raises(CheckpointError, match="no usable trigger"):
            load_reversed(path)
    with pytest.raises(ValueError, match="ReversedTrigger"):
        save_reversed(generator, path)  # type: ignore[arg-type]


def test_numbers_out_of_range_are_refused(subtests):
    for numbers in [(-1, 0.5, 0.1), (0, 1.5, 0.1), (0, 0.5, -0.1)]:
        with subtests.test(numbers=numbers):
            target, rate, residual = numbers
            with pytest.raises(ValueError, match="expected a target"):
                ReversedTrigger(
                    UNetGenerator(channels=1, width=2),
                    target=target,
                    success_rate=rate,
                    residual_norm=residual,
                )
