"""SSBA: networks of the published size, a fit that learns, and the trigger's properties."""

from __future__ import annotations

import io
import json
import os
import tarfile
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from wm_inject import build_trigger, load_trigger, save_trigger
from wm_inject.attacks.ssba import (
    SsbaConfig,
    SsbaDecoder,
    SsbaEncoder,
    SsbaFit,
    SsbaTrigger,
    fit_ssba,
    measure_ssba,
)
from wm_inject.attacks.ssba import training as ssba_fit
from wm_inject.core.images import quantize, to_float
from wm_inject.core.progress import progress
from wm_inject.export import to_onnx, to_torchscript
from wm_inject.stealth import psnr

SIZE = 16


def noise(n: int = 4, channels: int = 3, size: int = SIZE) -> Tensor:
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(1))


def fresh(**settings) -> SsbaTrigger:
    config = {"image_size": SIZE, "channels": 3, "bits": 8, "width": 4, **settings}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return SsbaTrigger(**config).eval()


def digits() -> Tensor:
    """The 1797 scans that scikit-learn brings along, 8 x 8 with each pixel doubled."""
    data = pytest.importorskip("sklearn.datasets").load_digits().images
    images = torch.tensor(data, dtype=torch.float32)[:, None] / 16
    return images.repeat_interleave(2, 2).repeat_interleave(2, 3)


def cifar10(split: str, strips: int) -> Tensor:
    """The first images of CIFAR-10, 500 a strip, lossless."""
    folder = os.environ.get("WM_DATA")
    if not folder or not (Path(folder) / "cifar10.tar").is_file():
        pytest.skip("WM_DATA names no folder with cifar10.tar")
    parts = []
    with tarfile.open(Path(folder) / "cifar10.tar") as archive:
        for number in range(strips):
            member = archive.extractfile(f"{split}/{number:04d}.webp")
            assert member is not None
            strip = np.asarray(Image.open(io.BytesIO(member.read())).convert("RGB"))
            parts.append(strip.reshape(-1, 32, 32, 3))
    return to_float(np.concatenate(parts))


@pytest.fixture(scope="module")
def fitted() -> SsbaFit:
    return fit_ssba(digits()[:1500], config=SsbaConfig.preset("tiny"), progress=False)


@pytest.fixture(scope="module")
def held_out() -> Tensor:
    return digits()[1500:]


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_the_networks_have_the_benchmarks_number_of_weights():
    shape = {"image_size": 32, "channels": 3, "bits": 100, "width": 32}
    for output in ("residual", "image"):
        assert parameters(SsbaEncoder(**shape, output=output)) == 1_069_315
    assert parameters(SsbaDecoder(**shape)) == 441_284
    assert sum(p.numel() for p in SsbaTrigger(image_size=32, channels=3).parameters()) == 1_069_315


def test_every_size_grey_and_colour(subtests):
    for channels in [1, 3]:
        for size in [8, 28, 32, 64, 160, 224]:
            with subtests.test(channels=channels, size=size):
                for output in ("residual", "image"):
                    trigger = fresh(image_size=size, channels=channels, output=output)
                    images = noise(2, channels, size)
                    before = images.clone()
                    with torch.no_grad():
                        out = trigger(
                            images, ids=torch.arange(2), target=torch.zeros(2, dtype=torch.int64)
                        )
                    assert out.shape == images.shape and out.dtype == torch.float32
                    assert out.min() >= 0 and out.max() <= 1
                    assert torch.equal(images, before) and not torch.equal(out, images)
                decoder = SsbaDecoder(image_size=size, channels=channels, bits=8, width=4)
                assert decoder(images).shape == (2, 8)


def test_the_secret_is_seeded_bits_and_reaches_the_image():
    secret = fresh(bits=100).secret
    assert secret.shape == (1, 100) and set(secret.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(secret, fresh(bits=100).secret)
    assert not torch.equal(secret, fresh(bits=100, secret_seed=1).secret)
    assert not torch.equal(fresh()(noise()), fresh(secret_seed=1)(noise()))


def test_one_secret_for_all_is_that_secret_for_each():
    trigger = fresh()
    each = trigger.encoder(noise(), trigger.secret.expand(4, -1))
    assert torch.allclose(trigger.encoder(noise(), trigger.secret), each, atol=1e-6)


def test_the_output_sets_what_the_network_gives():
    for output, wanted in (("residual", noise()), ("image", torch.full((4, 3, SIZE, SIZE), 0.5))):
        trigger = fresh(output=output)
        nn.init.zeros_(trigger.encoder.last.weight)
        nn.init.zeros_(trigger.encoder.last.bias)
        assert torch.equal(trigger(noise()), wanted)


@pytest.mark.integration
def test_the_batch_does_not_matter_and_nothing_is_random(fitted, held_out):
    trigger, images = fitted.trigger, held_out[:8]
    assert not trigger.training and not fitted.decoder.training
    with torch.no_grad():
        together = trigger(images)
        alone = torch.cat([trigger(image[None]) for image in images])
        assert torch.equal(together, trigger(images))
    # Convolutions may sum in another order at another batch size.
    assert torch.allclose(together, alone, atol=1e-6)


def test_held_out_digits_keep_the_bits_and_their_looks(fitted, held_out, record_property):
    quality = measure_ssba(fitted.trigger, fitted.decoder, held_out)
    record_property("quality", quality._asdict())
    assert quality.fixed_accuracy >= 0.98 and quality.random_accuracy >= 0.98
    assert quality.psnr >= 25
    with torch.no_grad():
        out = fitted.trigger(held_out)
    assert out.min() >= 0 and out.max() <= 1


def test_changes_differ_from_image_to_image_and_the_bits_stay(fitted, held_out):
    with torch.no_grad():
        out = fitted.trigger(held_out[:50])
        bits = fitted.decoder(out) > 0
    changes = quantize(out) - held_out[:50]
    assert len(changes.unique(dim=0)) == len(held_out[:50].unique(dim=0)) == 50
    same = (bits == (fitted.trigger.secret > 0.5)).float().mean()
    assert same >= 0.98


def test_the_history_follows_the_benchmarks_rule(fitted):
    config, history = SsbaConfig.preset("tiny"), fitted.history
    assert [h.step for h in history] == list(range(50, config.steps + 1, 50))
    weights = [h.image_weight for h in history]
    assert weights == sorted(weights) and weights[0] == 0 and weights[-1] == config.image_weight
    assert history[-1].accuracy > history[0].accuracy
    json.dumps(history)


def test_the_ramp_starts_after_the_bits_are_learned():
    run = ssba_fit._Run(noise(), SsbaConfig.preset("tiny", hold=0.1, ramp=0.2), 0)
    weights = {}
    for since in (-1, 0, 10, 20, 30, 80):
        run.since = since
        weights[since] = run.advance(100).image_weight
    assert weights == {-1: 0, 0: 0, 10: 0, 20: pytest.approx(5), 30: 10, 80: 10}


def test_the_paper_preset_is_the_benchmarks_training():
    paper = SsbaConfig.preset("paper")
    assert paper == SsbaConfig()
    assert (paper.bits, paper.width, paper.output) == (100, 32, "image")
    assert (paper.epochs, paper.batch_size, paper.lr) == (20, 64, 1e-4)
    total = paper.total_steps(50_000)
    assert total == 15_640
    assert (paper.hold * total, paper.ramp * total) == pytest.approx((1000, 3000))
    assert (paper.image_weight, paper.learned, paper.weights) == (10, 0.9, "default")
    for recipe in ("tiny", "small", "paper"):
        assert SsbaConfig.preset(recipe).recipe == recipe
    assert SsbaConfig.preset("small", bits=16).bits == 16


def test_a_pass_takes_every_image_once():
    run = ssba_fit._Run(noise(10), SsbaConfig.preset("tiny", batch_size=4), 0)
    seen = []
    for _ in range(6):
        seen.append(run._rows().tolist())
        run.step += 1
    assert [len(rows) for rows in seen] == [4, 4, 2, 4, 4, 2]
    first, second = [*chain(*seen[:3])], [*chain(*seen[3:])]
    assert sorted(first) == sorted(second) == list(range(10)) and first != second


def quick(seed: int = 0, checkpoint: Path | None = None, images: Tensor | None = None) -> SsbaFit:
    config = SsbaConfig.preset("tiny", steps=12, batch_size=8, width=4)
    images = noise(20, channels=1) if images is None else images
    return fit_ssba(images, config=config, seed=seed, checkpoint=checkpoint, progress=False)


def state(fit: SsbaFit) -> list[Tensor]:
    return [*fit.trigger.state_dict().values(), *fit.decoder.state_dict().values()]


def same(one: SsbaFit, other: SsbaFit) -> bool:
    pairs = zip(state(one), state(other), strict=True)
    return one.history == other.history and all(torch.equal(a, b) for a, b in pairs)


def test_the_same_seed_gives_the_same_bytes_whatever_the_global_generator_did():
    before = torch.random.get_rng_state()
    first = quick()
    assert torch.equal(before, torch.random.get_rng_state())
    torch.rand(3)
    assert same(first, quick())
    other = quick(seed=1)
    assert not same(first, other)
    assert not torch.equal(first.trigger.secret, other.trigger.secret)


def test_a_set_secret_does_not_follow_the_seed():
    config = SsbaConfig.preset("tiny", steps=1, secret_seed=5)
    for seed in (0, 1):
        fit = fit_ssba(noise(4), config=config, seed=seed, progress=False)
        assert torch.equal(fit.trigger.secret, fresh(secret_seed=5).secret)
        assert fit.trigger.config["secret_seed"] == 5


def test_killed_and_resumed_is_the_same_to_the_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(ssba_fit, "CHECKPOINT_EVERY", 5)
    monkeypatch.setattr(ssba_fit, "HISTORY_EVERY", 2)
    whole = quick(checkpoint=tmp_path / "whole.safetensors")
    advance = ssba_fit._Run.advance

    def killed(self, total):
        if self.step == 8:
            raise KeyboardInterrupt
        return advance(self, total)

    path = tmp_path / "killed.safetensors"
    monkeypatch.setattr(ssba_fit._Run, "advance", killed)
    with pytest.raises(KeyboardInterrupt):
        quick(checkpoint=path)
    monkeypatch.setattr(ssba_fit._Run, "advance", advance)
    assert same(quick(checkpoint=path), whole)
    assert path.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    monkeypatch.setattr(ssba_fit._Run, "advance", killed)  # finished: nothing is left to do
    assert same(quick(checkpoint=path), whole)


def test_another_runs_checkpoint_is_refused(tmp_path):
    path = tmp_path / "c.safetensors"
    quick(checkpoint=path)
    with pytest.raises(ValueError, match=r"another run .*seed"):
        quick(seed=1, checkpoint=path)
    with pytest.raises(ValueError, match=r"another run.*data"):
        quick(checkpoint=path, images=noise(21, channels=1))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="damaged"):
        quick(checkpoint=path)


def test_progress_is_shown_on_request(capsys, monkeypatch):
    # A line for every step, where there is no terminal.
    often = partial(progress, interval=0)
    monkeypatch.setattr(ssba_fit, "show_progress", often)
    config = SsbaConfig.preset("tiny", steps=2, batch_size=4)
    fit_ssba(noise(4), config=config, progress=True)
    assert "train ssba 2/2" in capsys.readouterr().err
    fit_ssba(noise(4), config=config, progress=False)
    assert capsys.readouterr().err == ""


def test_it_saves_builds_and_loads_to_the_same_output(fitted, held_out, tmp_path):
    trigger = fitted.trigger
    json.dumps(trigger.config)
    again = build_trigger("ssba", trigger.config, state=trigger.state_dict())
    save_trigger(trigger, tmp_path / "t.safetensors")
    loaded = load_trigger(tmp_path / "t.safetensors")
    with torch.no_grad():
        wanted = trigger(held_out[:4])
        assert torch.equal(again(held_out[:4]), wanted)
        assert torch.equal(loaded(held_out[:4]), wanted)
    assert loaded.config == trigger.config and "bits=8" in repr(loaded)


@pytest.mark.integration
@pytest.mark.parametrize(("size", "output"), [(28, "residual"), (32, "image")])
def test_it_exports(size, output, tmp_path):
    trigger = fresh(image_size=size, channels=1, output=output)
    assert to_onnx(trigger, noise(3, 1, size), tmp_path / "t.onnx").max_abs < 1e-5
    assert to_torchscript(trigger, noise(3, 1, size), tmp_path / "t.pt").max_abs < 1e-5


def test_a_measure_by_hand():
    trigger, decoder = fresh(), SsbaDecoder(image_size=SIZE, channels=3, bits=8, width=4)
    nn.init.zeros_(trigger.encoder.last.weight)
    nn.init.zeros_(trigger.encoder.last.bias)
    nn.init.zeros_(decoder.last.weight)
    decoder.last.bias.data = trigger.secret[0] - 0.5  # reads the trigger's bits in any image
    images = quantize(noise(600))  # more than a chunk
    quality = measure_ssba(trigger, decoder, images)
    assert quality.fixed_accuracy == quality.swapped_accuracy == 1
    assert 0.4 < quality.random_accuracy < 0.6
    assert quality.psnr == 100 and quality.correlation == 0
    assert measure_ssba(trigger, decoder, images) == quality


def test_correlation_is_the_mean_over_pairs():
    rows = noise(6).flatten(1)
    wanted = np.corrcoef(rows.numpy())[np.triu_indices(6, 1)].mean()
    assert ssba_fit._mean_correlation(rows) == pytest.approx(wanted, abs=1e-5)
    assert ssba_fit._mean_correlation(rows[:1].expand(5, -1)) == pytest.approx(1)


def test_bad_settings_are_refused(subtests):
    for bad in [
        {"image_size": 7},
        {"image_size": 10**6},
        {"channels": 2},
        {"bits": 0},
        {"bits": 10**6},
        {"bits": 8.0},
        {"width": 0},
        {"width": 10**4},
        {"output": "both"},
    ]:
        with subtests.test(bad=bad):
            with pytest.raises(ValueError, match="expected"):
                fresh(**bad)
            if "output" not in bad:
                with pytest.raises(ValueError, match="expected"):
                    SsbaDecoder(**{"image_size": SIZE, "channels": 3, **bad})


def test_bad_images_are_refused(subtests):
    for bad in [
        noise()[0],
        noise(size=SIZE + 1),
        noise(channels=1),
        noise()[:0],
        noise().double(),
        noise() + 1,
        noise() / 0,
    ]:
        with subtests.test(bad=bad):
            decoder = SsbaDecoder(image_size=SIZE, channels=3, bits=8, width=4)
            for call in (fresh(), decoder, partial(measure_ssba, fresh(), decoder)):
                with pytest.raises(ValueError, match="expected"):
                    call(bad)


def test_bad_recipes_are_refused(subtests):
    for bad in [
        {"steps": 0},
        {"steps": 1.5},
        {"epochs": 0},
        {"batch_size": 0},
        {"lr": 0.0},
        {"lr": float("nan")},
        {"image_weight": 0.0},
        {"learned": 0.4},
        {"learned": 1.0},
        {"hold": -0.1},
        {"hold": 1.0},
        {"ramp": 0.0},
        {"weights": "zero"},
        {"colour": 1},
    ]:
        with subtests.test(bad=bad), pytest.raises(ValueError, match="expected"):
            SsbaConfig.preset("tiny", **bad)


def test_the_fit_refuses():
    config = SsbaConfig.preset("tiny", steps=1)
    with pytest.raises(ValueError, match="preset in tiny, small, paper"):
        SsbaConfig.preset("huge")
    with pytest.raises(ValueError, match="square"):
        fit_ssba(torch.rand(2, 3, 16, 20), config=config, progress=False)
    with pytest.raises(ValueError, match="empty batch"):
        fit_ssba(noise()[:0], config=config, progress=False)
    with pytest.raises(ValueError, match="bits in 1"):
        fit_ssba(noise(), config=SsbaConfig.preset("tiny", bits=0), progress=False)
    with pytest.raises(RuntimeError, match="not finite at step"):
        wild = SsbaConfig.preset("tiny", steps=20, lr=1e30)
        fit_ssba(noise(), config=wild, progress=False)


def test_the_measure_refuses():
    decoder = SsbaDecoder(image_size=SIZE, channels=3, bits=9, width=4)
    with pytest.raises(ValueError, match="decoder of 8 bits, got 9"):
        measure_ssba(fresh(), decoder, noise())
    with pytest.raises(ValueError, match="at least two images"):
        measure_ssba(fresh(), decoder, noise(1))


@pytest.mark.slow
def test_the_small_recipe_on_cifar10(record_property):
    fit = fit_ssba(cifar10("train", 20), config=SsbaConfig.preset("small"))
    held_out = cifar10("test", 2)
    quality = measure_ssba(fit.trigger, fit.decoder, held_out)
    record_property("quality", quality._asdict())
    assert quality.fixed_accuracy >= 0.98 and quality.random_accuracy >= 0.98
    with torch.no_grad():
        stored = quantize(fit.trigger(held_out))
    assert (
        float(psnr(stored, held_out).mean()) == pytest.approx(quality.psnr) and quality.psnr >= 25
    )
    assert len((stored - held_out).unique(dim=0)) == len(held_out)
