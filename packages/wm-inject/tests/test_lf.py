from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import correlate1d
from sklearn.datasets import load_digits
from torch import nn

from wm_inject import build_trigger, load_trigger, save_trigger
from wm_inject.attacks.lf import LfConfig, LfTrigger, _kernel, _low_pass, fit_lf
from wm_inject.export import to_onnx, to_torchscript

TARGET = 3
TINY = LfConfig.preset("tiny")
SEARCH = LfConfig(images=60, passes=3, iterations=10)


@cache
def digits(size: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Scikit-learn's digits at another size, dimmed so that a pattern can be added unclipped."""
    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 16
    images = F.interpolate(images, size=size, mode="bilinear").mul(0.8)
    return images, torch.from_numpy(data.target).long()


@cache
def surrogate(size: int = 16) -> nn.Module:
    """A small net with BatchNorm and Dropout, trained for a second."""
    images, labels = digits(size)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(1, 8, 3, stride=2, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.1),
            nn.Linear(16 * (size // 4) ** 2, 10),
        )
        optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
        for _ in range(3):
            for index in torch.randperm(len(images)).split(64):
                optimizer.zero_grad()
                F.cross_entropy(net(images[index]), labels[index]).backward()
                optimizer.step()
    optimizer.zero_grad()
    return net.eval()


@cache
def search():
    return fit_lf(surrogate(), digits()[0], target=TARGET, config=SEARCH)


def low_share(pattern: torch.Tensor) -> float:
    """Share of the pattern's AC energy at up to 1/8 cycle per pixel."""
    power = torch.fft.fft2(pattern - pattern.mean(dim=(1, 2), keepdim=True)).abs().square()
    frequency = torch.fft.fftfreq(pattern.shape[-1]).abs()
    low = torch.maximum(frequency[:, None], frequency[None]) <= 1 / 8
    return float(power[:, low].sum() / power.sum())


def test_the_pattern_spans_the_limit_exactly_and_is_smooth():
    pattern = search().trigger.pattern
    assert pattern.min() == 0 and pattern.max() == torch.tensor(0.2)
    assert pattern.shape == (1, 16, 16)


@pytest.mark.parametrize("size", [28, 32, 64])
def test_the_pattern_is_low_in_frequency_at_every_size(size):
    # The gradient of a random linear net is noise: what remains is what the filter passes.
    generator = torch.Generator().manual_seed(size)
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * size**2, 4))
    net[1].weight.data = torch.randn(4, 3 * size**2, generator=generator) / size
    images = torch.rand(20, 3, size, size, generator=generator)
    fit = fit_lf(net, images, target=1, config=TINY)
    assert fit.trigger.pattern.shape == (3, size, size)
    # 1/8 cycle per pixel at 32 pixels is 4 cycles per side; the filter grows with the side.
    assert low_share(fit.trigger.pattern) >= 0.98


def test_the_search_fools_enough_images_or_runs_out_of_passes():
    fit = search()
    assert fit.fooling_rate == max(fit.rates) and fit.passes == len(fit.rates)
    assert fit.fooling_rate >= 0.2 or fit.passes == 3


def test_the_pattern_takes_the_colour_that_leads_to_the_target():
    class RedOrBlue(nn.Module):
        def forward(self, images):
            return 10 * images.mean(dim=(2, 3))[:, [2, 0]]

    images = 0.3 + 0.4 * torch.rand(20, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    images[:, 2] += 0.1
    fit = fit_lf(RedOrBlue(), images, target=1, config=TINY)
    red, green, blue = fit.trigger.pattern.mean(dim=(1, 2)).tolist()
    assert red > green > blue
    assert fit.fooling_rate == 1 and fit.passes == 1  # enough after the first pass


def test_the_same_pattern_is_added_to_every_image():
    images, trigger = digits()[0][:6], search().trigger
    change = trigger(images) - images
    assert torch.allclose(change, trigger.pattern.expand_as(change), atol=1e-6)
    bright = trigger(torch.full((2, 1, 16, 16), 0.95))
    assert bright.max() == 1 and bright.min() >= 0.95
    alone = torch.cat([trigger(image[None]) for image in images])
    assert torch.equal(trigger(images), alone)


def test_a_linear_classifier_is_left_in_one_step_along_its_weights():
    # With two classes f = w.x, DeepFool's step is exact: the pattern is the smoothed w.
    weight = torch.randn(1, 3 * 32 * 32, generator=torch.Generator().manual_seed(0))
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 2))
    net[1].weight.data = torch.cat([weight, -weight])
    net[1].bias.data = torch.tensor([1.0, -1.0]) - torch.tensor([1.0, -1.0]) * 0.5 * weight.sum()
    fit = fit_lf(
        net, torch.full((1, 3, 32, 32), 0.5), target=1, config=LfConfig(images=1, passes=1)
    )
    kernel = _kernel(6.0)
    smooth = _low_pass(_low_pass(-weight.view(3, 32, 32), kernel), kernel)
    wanted = 0.2 * (smooth - smooth.min()) / (smooth.max() - smooth.min())
    assert torch.allclose(fit.trigger.pattern, wanted, atol=1e-4)


def test_the_low_pass_keeps_constants_away_from_borders_and_agrees_with_scipy():
    for side, taps in ((28, 26), (32, 30), (64, 60), (224, 210)):
        kernel = _kernel(6.0 * side / 32)
        assert len(kernel) == taps and torch.allclose(kernel.sum(), torch.tensor(1.0))
        assert torch.allclose(kernel, kernel.flip(0))
    kernel = _kernel(6.0)
    smooth = _low_pass(torch.full((1, 64, 64), 0.7), kernel)
    assert torch.allclose(smooth[:, 14:49, 14:49], torch.tensor(0.7), atol=1e-6)
    image = torch.rand(3, 32, 32)
    wanted = image.double().numpy()
    weights = np.append(0.0, kernel.double().numpy())  # 14 pixels before each place, 15 after it
    for axis in (1, 2):
        wanted = correlate1d(wanted, weights, axis=axis, mode="constant")
    assert np.abs(_low_pass(image, kernel).numpy() - wanted).max() < 1e-6


def test_the_search_repeats_and_follows_its_seed():
    runs = [fit_lf(surrogate(), digits()[0], target=TARGET, config=TINY, seed=s) for s in (0, 0, 1)]
    assert torch.equal(runs[0].trigger.pattern, runs[1].trigger.pattern)
    assert runs[0].rates == runs[1].rates
    assert not torch.equal(runs[0].trigger.pattern, runs[2].trigger.pattern)


def test_the_target_matters():
    other = fit_lf(surrogate(), digits()[0], target=8, config=TINY)
    same = fit_lf(surrogate(), digits()[0], target=TARGET, config=TINY)
    assert not torch.equal(other.trigger.pattern, same.trigger.pattern)


def test_the_surrogate_and_the_images_are_left_as_they_were():
    net, images = surrogate(), digits()[0]
    net.train()
    net[1].eval()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}, images.clone()
    with torch.no_grad():
        trained = fit_lf(net, images, target=TARGET, config=TINY)
    modes = [module.training for module in net]
    net.eval()
    assert modes[0] and not modes[1] and all(modes[2:])
    assert all(torch.equal(before[0][name], tensor) for name, tensor in net.state_dict().items())
    assert torch.equal(images, before[1]) and all(p.grad is None for p in net.parameters())
    evaluated = fit_lf(net, images, target=TARGET, config=TINY)
    assert torch.equal(trained.trigger.pattern, evaluated.trigger.pattern)


class _Killed(Exception):
    pass


def test_a_killed_search_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    config = LfConfig(images=20, passes=3, iterations=10, enough=1.0)
    images, path = digits()[0], tmp_path / "search.safetensors"
    whole = fit_lf(surrogate(), images, target=TARGET, config=config)
    from wm_inject.attacks import lf

    saves = []

    def save_and_die(*args, **settings):
        lf_save(*args, **settings)
        saves.append(args)
        if len(saves) == 2:
            raise _Killed

    lf_save = lf.save_state
    monkeypatch.setattr(lf, "save_state", save_and_die)
    with pytest.raises(_Killed):
        fit_lf(surrogate(), images, target=TARGET, config=config, checkpoint=path)
    resumed = fit_lf(surrogate(), images, target=TARGET, config=config, checkpoint=path)
    assert len(saves) == 3  # two passes before the kill, one after it
    assert torch.equal(resumed.trigger.pattern, whole.trigger.pattern)
    assert resumed.rates == whole.rates and len(whole.rates) == 3
    done = fit_lf(surrogate(), images, target=TARGET, config=config, checkpoint=path)
    assert len(saves) == 3 and torch.equal(done.trigger.pattern, whole.trigger.pattern)


def test_the_checkpoint_of_another_search_is_refused(tmp_path):
    path, images = tmp_path / "search.safetensors", digits()[0]
    fit_lf(surrogate(), images, target=TARGET, config=TINY, checkpoint=path)
    other_net = nn.Sequential(nn.Flatten(), nn.Linear(256, 10))
    for net, changes in (
        (surrogate(), {"target": 4}),
        (surrogate(), {"seed": 1}),
        (surrogate(), {"config": LfConfig.preset("tiny", sigma=5.0)}),
        (other_net, {}),
    ):
        settings = {"target": TARGET, "config": TINY, **changes}
        with pytest.raises(ValueError, match="checkpoint of another run"):
            fit_lf(net, images, checkpoint=path, **settings)


def test_it_stops_when_the_rate_stays_the_same():
    # One step does it all: from the first pass on, no prediction can be changed back.
    fit = fit_lf(
        surrogate(),
        digits()[0],
        target=TARGET,
        config=LfConfig(images=20, iterations=10, enough=1.0),
    )
    last = fit.rates[-5:]
    assert fit.passes == 50 or fit.fooling_rate == 1 or max(last) - min(last) <= 0.01


def test_files_bring_it_back(tmp_path):
    trigger, images = search().trigger, digits()[0][:4]
    save_trigger(trigger, tmp_path / "t.safetensors")
    again = load_trigger(tmp_path / "t.safetensors")
    assert torch.equal(again(images), trigger(images)) and again.config == trigger.config
    fresh = build_trigger("lf", trigger.config)
    assert torch.equal(fresh(images), images)  # without its pattern it does nothing
    assert "image_size=16" in repr(fresh)


@pytest.mark.integration
def test_it_exports(tmp_path):
    trigger, images = search().trigger, digits()[0][:4]
    for export, name in ((to_torchscript, "m.pt"), (to_onnx, "m.onnx")):
        assert export(trigger, images, tmp_path / name).max_abs <= 1e-6


def test_presets():
    paper = LfConfig.preset("paper")
    assert (paper.images, paper.passes, paper.iterations, paper.overshoot) == (100, 50, 200, 0.02)
    assert (paper.limit, paper.enough, paper.sigma) == (0.2, 0.2, 6.0) and paper == LfConfig()
    assert LfConfig.preset("small").passes < 50 and LfConfig.preset("tiny", limit=0.1).limit == 0.1


def test_bad_settings_of_a_search_are_refused(subtests):
    for bad in [
        {"images": 0},
        {"passes": 0},
        {"iterations": 0},
        {"iterations": 2.5},
        {"overshoot": -0.1},
        {"limit": 0.0},
        {"limit": 1.1},
        {"enough": 0.0},
        {"enough": 2.0},
        {"sigma": 0.0},
        {"sigma": float("inf")},
    ]:
        with subtests.test(bad=bad), pytest.raises(ValueError, match="expected"):
            LfConfig(**bad)


def test_an_unknown_preset_is_refused():
    with pytest.raises(ValueError, match="expected a preset in tiny, small, paper"):
        LfConfig.preset("huge")


class _Flat(nn.Module):
    """Says 0 whatever it sees, with no slope to follow."""

    def forward(self, images):
        return torch.eye(10)[:1].expand(len(images), -1) + 0 * images.sum()


def test_bad_searches_are_refused(subtests):
    for net, images, settings, told in [
        (None, digits()[0][:5], {}, "at least 20 square images"),
        (None, digits()[0][:, :, :8], {}, "at least 20 square images"),
        (None, digits()[0] + 1, {}, "values in"),
        (None, digits()[0][:0], {}, "at least one image"),
        (None, digits()[0], {"target": 10}, "a target 10 below K"),
        (None, digits()[0], {"target": -1}, "a target -1 below K"),
        (nn.Flatten(0), digits()[0], {}, "expected logits"),
        (_Flat(), digits()[0], {}, "small steps move to label 3"),
    ]:
        with subtests.test(net=net, images=images, settings=settings, told=told):
            net = surrogate() if net is None else net
            with pytest.raises(ValueError, match=told):
                fit_lf(net, images, **{"target": TARGET, "config": TINY, **settings})


def test_bad_settings_of_the_trigger_are_refused(subtests):
    for bad in [
        {"image_size": 0},
        {"channels": 2},
        {"limit": 0.0},
        {"limit": 1.5},
        {"pattern": torch.zeros(3, 16, 16)},
        {"pattern": torch.full((1, 16, 16), 0.21)},
        {"pattern": torch.full((1, 16, 16), -0.1)},
        {"pattern": torch.full((1, 16, 16), torch.nan)},
        {"pattern": "smooth"},
    ]:
        with subtests.test(bad=bad), pytest.raises(ValueError, match="expected"):
            LfTrigger(**{"image_size": 16, "channels": 1, **bad})


@pytest.mark.parametrize(
    "bad",
    [torch.rand(1, 3, 16, 16), torch.rand(1, 1, 17, 17), torch.rand(0, 1, 16, 16)],
)
def test_bad_images_are_refused(bad):
    with pytest.raises(ValueError, match="expected"):
        LfTrigger(image_size=16, channels=1)(bad)
