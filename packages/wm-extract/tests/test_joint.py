from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

import wm_extract.joint as joint
from wm_extract import (
    JointConfig,
    MarkDetector,
    balanced_bit_accuracy,
    extract,
    image_loss,
    map_loss,
    train_jointly,
)
from wm_inject import quantize
from wm_inject.watermark.vit import SIZES

TINY = JointConfig(
    iterations=6, batch_size=4, warmup=2, extractor_width=4, depth=1, decoder_depth=1
)


def noise(n: int = 20, side: int = 16) -> Tensor:
    return torch.rand(n, 1, side, side, generator=torch.Generator().manual_seed(0))


def digits() -> Tensor:
    small = torch.tensor(load_digits().images, dtype=torch.float32).unsqueeze(1) / 16
    return torch.nn.functional.interpolate(small, size=(16, 16), mode="bilinear")


def test_equation_4_by_hand() -> None:
    images = torch.zeros(1, 3, 2, 2)
    marked = images.clone()
    marked[0, :, 0, 0] = 3 / 255  # excess of 2/255 in three channels of one pixel of four
    assert image_loss(marked, images).item() == pytest.approx(3 * (2 / 255) ** 2 / 4)
    assert image_loss(images + 1 / 255, images).item() == 0


def test_equation_5_by_hand() -> None:
    wanted = torch.tensor([[[1.0, 0.0]]])
    maps = [torch.zeros(2, 1, 1, 2)] * 3  # sigmoid(0) is 1/2: an error of 1/4 everywhere
    assert map_loss(maps, wanted).item() == pytest.approx(3 * 0.25)


def test_the_paper_preset_is_the_papers_text() -> None:
    paper = JointConfig.preset("paper")
    assert (paper.optimizer, paper.lr, paper.momentum) == ("sgd", 2e-4, 0.5)
    assert (paper.iterations, paper.batch_size) == (10_000, 16)
    assert (paper.image_weight, paper.mark_weight, paper.clean_weight) == (1.0, 0.1, 0.1)
    assert (paper.depth, paper.decoder_depth, paper.residual) == (24, 8, False)
    assert paper.epsilon == 1 / 255 and paper.psnr_floor is None


def test_a_wider_injector_learns_at_a_lower_rate() -> None:
    rates = [JointConfig.preset(size=size).peak_lr for size in SIZES]
    assert rates[:2] == [1e-3, 4e-4]
    assert rates == sorted(rates, reverse=True)
    config = replace(TINY, size="small", warmup=1)
    assert joint._learning_rate(config, 0) == pytest.approx(4e-4)
    # The paper's optimiser has the paper's rate at every size.
    assert JointConfig.preset("paper", size="large").peak_lr == 2e-4


def test_every_recipe_takes_a_step(subtests: pytest.Subtests) -> None:
    for recipe in ["paper", "released", "robust"]:
        with subtests.test(recipe=recipe):
            config = JointConfig.preset(recipe, iterations=1, batch_size=2, extractor_width=4)
            config = replace(config, depth=1, decoder_depth=1)
            result = train_jointly(noise(), config=config, progress=False)
            assert len(result.history) == 1 and not result.injector.training


@pytest.mark.integration
def test_same_seed_same_bytes_and_another_seed_not() -> None:
    one = train_jointly(noise(), config=TINY, seed=3, progress=False)
    two = train_jointly(noise(), config=TINY, seed=3, progress=False)
    other = train_jointly(noise(), config=TINY, seed=4, progress=False)
    for a, b in zip(
        one.injector.state_dict().values(), two.injector.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b)
    assert one.history == two.history != other.history


@pytest.mark.integration
def test_a_killed_run_goes_on_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(TINY, iterations=20)
    whole = train_jointly(noise(), config=config, progress=False)
    monkeypatch.setattr(joint, "CHECKPOINT_EVERY", 5)
    path = tmp_path / "state.safetensors"

    class Killed(Exception):
        pass

    real = joint._step

    def dies_at_13(*args: object) -> object:
        if args[-1] == 13:
            raise Killed
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(joint, "_step", dies_at_13)
    with pytest.raises(Killed):
        train_jointly(noise(), config=config, checkpoint=path, progress=False)
    monkeypatch.setattr(joint, "_step", real)
    resumed = train_jointly(noise(), config=config, checkpoint=path, progress=False)
    assert resumed.history == whole.history
    for name, value in whole.extractor.state_dict().items():
        assert torch.equal(value, resumed.extractor.state_dict()[name])
    with pytest.raises(ValueError, match="another run"):
        train_jointly(noise(), config=config, checkpoint=path, seed=1, progress=False)


@pytest.mark.integration
def test_learns_a_mark_that_survives_and_stays_out_of_clean_digits() -> None:
    images = digits()
    config = JointConfig(
        iterations=150,
        warmup=20,
        lr=2e-3,
        depth=2,
        decoder_depth=1,
        extractor_width=8,
        psnr_floor=28.0,
        psnr_start=22.0,
        corruption_probability=0.1,
        precision="float32",
    )
    result = train_jointly(images[:1200], config=config, progress=False)
    clean, test = images[1200:1500], images[1500:]
    with torch.no_grad():
        marked = quantize(result.injector(test, result.watermark))
    psnr = -10 * (marked - test).square().mean((1, 2, 3)).log10()
    assert psnr.min() > 27.9
    accuracy = balanced_bit_accuracy(extract(result.extractor, marked), result.watermark)
    assert accuracy.mean() > 0.75  # a constant map scores 0.5
    detector = MarkDetector.calibrate(result.extractor, result.watermark, clean)
    assert detector.detect(marked).marked.float().mean() > 0.9
    assert detector.detect(test).marked.float().mean() < 0.05


def test_both_bounds_close_in_together_and_end_where_they_should() -> None:
    config = replace(TINY, iterations=10, psnr_floor=40.0, psnr_start=20.0, max_change=0.02)
    seen = [joint._bounds(config, step) for step in (0, 2, 4, 9)]
    assert seen[0] == pytest.approx((20.0, 0.2)) and seen[1] == pytest.approx(
        (30.0, 0.0632), rel=1e-2
    )
    assert seen[2] == seen[3] == pytest.approx((40.0, 0.02))


def test_config_refuses(subtests: pytest.Subtests) -> None:
    for change in [
        {"size": "huge"},
        {"optimizer": "lbfgs"},
        {"precision": "float16"},
        {"iterations": 0},
        {"corruption_probability": 1.5},
        {"crop": 0.0},
        {"subtraction": 1.5},
        {"ramp": (0.6, 0.3)},
        {"forgery_weight": -1},
        {"jpeg": 96},
    ]:
        with subtests.test(change=change), pytest.raises(ValueError, match="expected"):
            replace(TINY, **change)  # type: ignore[arg-type]


def test_refusals() -> None:
    with pytest.raises(ValueError, match="a preset in"):
        JointConfig.preset("secret")
    with pytest.raises(ValueError, match="settings of JointConfig"):
        JointConfig.preset("robust", speed=3)
    with pytest.raises(ValueError, match="square"):
        train_jointly(torch.rand(2, 1, 16, 24), config=TINY)
    with pytest.raises(ValueError, match="watermark of shape"):
        train_jointly(noise(), config=TINY, watermark=torch.zeros(1, 8, 8))
    with pytest.raises(ValueError, match="one shape"):
        image_loss(torch.rand(1, 3, 4, 4), torch.rand(1, 3, 4, 5))
    with pytest.raises(ValueError, match="fit a picture"):
        map_loss([], torch.zeros(1, 4, 4))


def test_a_training_goes_on_from_a_trained_pair() -> None:
    config = replace(TINY, iterations=1, psnr_start=None)
    first = train_jointly(noise(), config=config, seed=5, progress=False)
    pair = (first.injector, first.extractor)
    kept = [tensor.clone() for one in pair for tensor in one.state_dict().values()]
    more = train_jointly(noise(), config=config, start=pair, seed=6, progress=False)
    fresh = train_jointly(noise(), config=config, seed=6, progress=False)
    weight = first.extractor.state_dict()
    distance = [
        max(
            float((r.extractor.state_dict()[name].float() - value.float()).abs().max())
            for name, value in weight.items()
            if name.endswith("weight")
        )
        for r in (more, fresh)
    ]
    assert distance[0] < 0.01 < distance[1], "one small step away from where it started"
    after = [tensor for one in pair for tensor in one.state_dict().values()]
    assert all(map(torch.equal, kept, after)), "the pair itself is left alone"
    with pytest.raises(ValueError, match="another one to start from"):
        train_jointly(noise(), config=replace(config, extractor_width=8), start=pair)


@pytest.mark.parametrize("fast", [torch.float32, torch.bfloat16])
def test_bfloat16_is_taken_where_it_is_fast(
    fast: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joint, "resolve_precision", lambda *_: fast)
    asked: list[bool] = []
    real = torch.autocast

    def autocast(*args: object, enabled: bool) -> object:
        asked.append(enabled)
        return real(*args, enabled=False)  # type: ignore[arg-type]

    monkeypatch.setattr(torch, "autocast", autocast)
    train_jointly(noise(), config=replace(TINY, iterations=1), progress=False)
    exact = replace(TINY, iterations=1, precision="float32")
    train_jointly(noise(), config=exact, progress=False)
    assert asked == [fast == torch.bfloat16, False]


def test_crops_grey_and_jpeg_are_operations_of_their_own() -> None:
    usual = len(TINY.anti_collapse().operations)
    more = replace(TINY, crop=0.9, grey=True, jpeg=75).anti_collapse().operations
    assert [type(one).__name__ for one in more[usual:]] == ["CropResize", "Grey", "Jpeg"]


def test_weights_that_grow_begin_and_end_where_they_should() -> None:
    config = replace(TINY, iterations=10, ramp=(0.2, 0.6))
    assert [joint._ramp(config, step) for step in (0, 1, 3, 5, 9)] == [0, 0, 0.5, 1, 1]
    assert joint._ramp(replace(config, ramp=(0.0, 0.0)), 0) == 1


def test_alike_is_the_mean_squared_cosine() -> None:
    changes = noise(5) - 0.5
    rows = torch.nn.functional.normalize(changes.flatten(1), dim=1)
    pairs = [float(rows[i] @ rows[j]) ** 2 for i in range(5) for j in range(5) if i != j]
    assert float(joint._alike(changes)) == pytest.approx(sum(pairs) / 20, rel=1e-4)
    assert float(joint._alike(noise(1).expand(4, 1, 16, 16))) == pytest.approx(1, abs=1e-5)


def test_others_are_of_another_image_or_the_mean() -> None:
    changes = noise(40)
    others = joint._others(changes, torch.Generator().manual_seed(0))
    mean = (others - changes.mean(0)).abs().amax((1, 2, 3)) < 1e-6
    assert 8 <= int(mean.sum()) <= 32
    for index in (~mean).nonzero().flatten().tolist():
        same = (others[index] == changes).flatten(1).all(1)
        assert int(same.sum()) == 1 and not same[index]


def test_every_loss_that_asks_for_image_dependence_takes_a_step() -> None:
    settings = {"diversity_weight": 0.1, "forgery_weight": 0.1, "subtraction": 1.0}
    config = replace(TINY, iterations=2, ramp=(0.0, 0.0), **settings)  # type: ignore[arg-type]
    result = train_jointly(noise(), config=config, progress=False)
    assert len(result.history) == 1


def test_the_forgery_loss_is_of_images_with_the_mean_change(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown: list[Tensor] = []
    scales = joint.UNetExtractor.scales

    def record(extractor: joint.UNetExtractor, images: Tensor) -> list[Tensor]:
        shown.append(images.detach())
        return scales(extractor, images)

    monkeypatch.setattr(joint.UNetExtractor, "scales", record)
    settings = {"forgery_weight": 0.1, "ramp": (0.0, 0.0), "corruption_probability": 0.0}
    config = replace(TINY, iterations=30, batch_size=4, **settings)  # type: ignore[arg-type]
    train_jointly(0.2 + 0.6 * noise(8), config=config, progress=False)
    marked, clean, forged = shown[-1].chunk(3)
    change = marked - clean
    assert float(change.abs().max()) > 1 / 255, "there is a change to forge with"
    # Two roundings to 8 bits, of half a step each at most.
    assert float((forged - clean - change.mean(0)).abs().max()) < 1.1 / 255


def test_the_encoder_can_start_from_weights_at_hand() -> None:
    config = replace(TINY, iterations=1)
    donor = config.injector(image_size=16, channels=1)
    names = {"patch_embed.": "patch_embed.", "encoder.": "blocks.", "encoder_norm.": "norm."}
    weights = {
        new + key.removeprefix(old): value
        for old, new in names.items()
        for key, value in donor.state_dict().items()
        if key.startswith(old)
    }
    started = train_jointly(noise(), config=config, encoder=weights, progress=False)
    fresh = train_jointly(noise(), config=config, progress=False)
    distance = [
        (r.injector.encoder[0].mlp.fc1.weight - donor.encoder[0].mlp.fc1.weight).abs().max()
        for r in (started, fresh)
    ]
    assert distance[0] < 0.01 < distance[1], "one small step away from where it started"
    with pytest.raises(ValueError, match="do not fit this encoder"):
        train_jointly(noise(), config=config, encoder={"norm.weight": torch.ones(3)})
