from __future__ import annotations

from typing import Any

import pytest
import timm
import torch

from wm_inject.attacks.watermark import WatermarkTrigger
from wm_inject.watermark.fast import fast_trigger
from wm_inject.watermark.picture import check_watermark, default_watermark
from wm_inject.watermark.vit import (
    PAD_MULTIPLE,
    ViTInjector,
    limit_residual,
    sincos_position,
    vit_config,
)

SMALL: dict[str, Any] = {
    "image_size": 32,
    "channels": 3,
    "patch_size": 4,
    "width": 32,
    "heads": 2,
    "depth": 2,
    "decoder_depth": 1,
}


def build(config: dict[str, Any] = SMALL, seed: int = 0) -> ViTInjector:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ViTInjector(**config).eval()


def trained_looking(config: dict[str, Any] = SMALL) -> ViTInjector:
    """An injector whose last layer is no longer zero, as after training."""
    injector = build(config)
    torch.nn.init.normal_(injector.head.weight, std=0.05)
    return injector


def count(depth: int, width: int, patch: int, channels: int, decoder: int) -> int:
    """The number of weights, added up from equation 3."""
    block = 12 * width**2 + 13 * width  # qkv, projection, two MLP layers, two norms
    embed = (patch**2 * channels + 1) * width
    mark = (patch**2 + 1) * width
    half = width // 2
    project = (width + 1) * width + (width + 1) * half + (half + 1) * width
    head = (width + 1) * patch**2 * channels
    return (depth + decoder) * block + 4 * width + embed + mark + project + head


@pytest.mark.integration
def test_large_has_the_papers_size_to_the_last_weight() -> None:
    config = vit_config("large", image_size=224, channels=3, recipe="paper")
    with torch.device("meta"):
        injector = ViTInjector(**config)
    weights = sum(p.numel() for p in injector.parameters())
    assert (injector.width, injector.heads, injector.patch_size) == (1024, 16, 16)
    assert len(injector.encoder) == 24 and len(injector.decoder) == 8
    assert weights == count(24, 1024, 16, 3, 8) == 407_020_800


def test_preset_sizes_count_as_derived(subtests: pytest.Subtests) -> None:
    for size in ["tiny", "small", "base"]:
        for recipe in ["paper", "released", "robust"]:
            with subtests.test(size=size, recipe=recipe):
                config = vit_config(size, image_size=32, channels=3, recipe=recipe)
                with torch.device("meta"):
                    injector = ViTInjector(**config)
                wanted = count(config["depth"], config["width"], 4, 3, config["decoder_depth"])
                assert sum(p.numel() for p in injector.parameters()) == wanted
                assert config["residual"] == (recipe == "robust")


def test_patch_size_follows_the_image(subtests: pytest.Subtests) -> None:
    for side, patch in [(28, 4), (32, 4), (64, 8), (160, 16), (224, 16)]:
        with subtests.test(side=side, patch=patch):
            config = vit_config("tiny", image_size=side, channels=1)
            injector = ViTInjector(**config)
            assert injector.patch_size == patch
            assert injector.grid * patch % PAD_MULTIPLE == 0


@pytest.mark.parametrize(("side", "channels"), [(28, 1), (32, 3), (64, 3)])
def test_output_has_the_shape_of_the_images(side: int, channels: int) -> None:
    config = SMALL | {"image_size": side, "channels": channels, "width": 16, "depth": 1}
    images = torch.rand(2, channels, side, side)
    assert trained_looking(config)(images, default_watermark(side)).shape == images.shape


def test_untrained_residual_injector_is_the_identity() -> None:
    images = torch.rand(3, 3, 32, 32)
    assert torch.equal(build()(images, default_watermark(32)), images)


def test_patchify_and_unpatchify_are_inverse() -> None:
    config = SMALL | {"channels": 1}
    injector = build(config)
    mark = torch.rand(5, 1, 32, 32)
    assert torch.equal(injector.unpatchify(injector.patchify(mark)), mark)


def test_psnr_floor_holds_for_every_image() -> None:
    injector = trained_looking(SMALL | {"psnr_floor": 40.0})
    images = torch.rand(8, 3, 32, 32)
    change = injector(images, default_watermark(32)) - images
    psnr = -10 * change.square().mean((1, 2, 3)).log10()
    assert (psnr >= 40 - 1e-3).all()
    small = torch.full_like(images, 1e-3)
    assert torch.allclose(limit_residual(small, injector.bounds), small)


def test_no_value_changes_by_more_than_the_largest_change() -> None:
    injector = trained_looking(SMALL | {"max_change": 6 / 255})
    wide = torch.randn(4, 3, 32, 32)
    assert limit_residual(wide, injector.bounds).abs().max() <= 6 / 255
    small = torch.full_like(wide, 1e-4)
    assert torch.allclose(limit_residual(small, injector.bounds), small, rtol=1e-3)


def test_watermark_changes_the_output_and_gets_a_gradient() -> None:
    injector = trained_looking()
    images = torch.rand(2, 3, 32, 32)
    one = injector(images, default_watermark(32))
    other = injector(images, 1 - default_watermark(32))
    assert not torch.allclose(one, other)
    one.square().sum().backward()
    gradient = injector.mark_embed.weight.grad
    assert gradient is not None and gradient.abs().sum() > 0


def test_an_image_does_not_depend_on_its_batch() -> None:
    injector = trained_looking()
    images = torch.rand(4, 3, 32, 32)
    together = injector(images, default_watermark(32))
    alone = torch.cat([injector(i, default_watermark(32)) for i in images.split(1)])
    assert torch.allclose(together, alone, atol=1e-6)


def test_position_table_is_that_of_timms_mae() -> None:
    # The formula of MAE, written out for one entry: x first, then y; sines before cosines.
    table = sincos_position(7, 16)[0]
    x, y, k = 3, 5, 2
    omega = 10000 ** (-k / 4)
    token = table[y * 7 + x]
    assert token[k] == pytest.approx(torch.tensor(x * omega).sin().item(), abs=1e-6)
    assert token[4 + k] == pytest.approx(torch.tensor(x * omega).cos().item(), abs=1e-6)
    assert token[8 + k] == pytest.approx(torch.tensor(y * omega).sin().item(), abs=1e-6)


def test_starts_from_timm_mae_weights() -> None:
    donor = timm.create_model(
        "vit_tiny_patch16_224", pretrained=False, embed_dim=32, num_heads=2, depth=2, num_classes=0
    )
    config = SMALL | {"image_size": 224, "patch_size": 16}
    injector = build(config)
    injector.load_mae_encoder(donor.state_dict())
    assert torch.equal(injector.encoder[1].mlp.fc1.weight, donor.blocks[1].mlp.fc1.weight)
    images = torch.rand(1, 3, 224, 224)
    tokens = injector.patch_embed(images)
    assert torch.allclose(tokens, donor.patch_embed(images))
    with pytest.raises(ValueError, match="do not fit this encoder"):
        build(SMALL).load_mae_encoder(donor.state_dict())


@pytest.mark.parametrize("side", [8, 28, 32, 224])
def test_default_watermark(side: int) -> None:
    mark = check_watermark(default_watermark(side), size=side)
    assert set(mark.unique().tolist()) == {0.0, 1.0}
    assert 0.2 < mark.mean() < 0.6
    assert torch.equal(mark, default_watermark(side))


def test_config_refuses(subtests: pytest.Subtests) -> None:
    for change in [
        {"image_size": 0},
        {"channels": 2},
        {"patch_size": 5},
        {"heads": 3},
        {"width": 6},
        {"depth": 0},
        {"psnr_floor": -1.0},
        {"psnr_floor": 40.0, "residual": False},
        {"max_change": 0.0},
        {"max_change": 0.1, "residual": False},
    ]:
        with subtests.test(change=change), pytest.raises(ValueError, match="expected"):
            ViTInjector(**SMALL | change)


def test_presets_refuse_unknown_names() -> None:
    with pytest.raises(ValueError, match="expected a size"):
        vit_config("huge", image_size=32, channels=3)
    with pytest.raises(ValueError, match="expected a recipe"):
        vit_config("tiny", image_size=32, channels=3, recipe="secret")


@pytest.mark.parametrize(
    "mark", [torch.zeros(32, 32), torch.zeros(1, 16, 16), torch.full((1, 32, 32), 2.0), "logo.png"]
)
def test_watermark_refusals(mark: object) -> None:
    with pytest.raises(ValueError, match="expected"):
        check_watermark(mark, size=32)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 8"):
        default_watermark(4)


@pytest.mark.parametrize("fast", [False, True])
def test_a_change_in_luminance_is_the_same_in_all_colours(fast: bool) -> None:
    settings = vit_config("tiny", image_size=32, channels=3, psnr_floor=40.0, max_change=6 / 255)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        injector = ViTInjector(**settings, luminance=True)
        torch.nn.init.normal_(injector.head.weight, std=0.1)
    trigger = WatermarkTrigger(injector)
    images = 0.2 + 0.6 * torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        marked = (fast_trigger(trigger, precision="float32") if fast else trigger)(images)
    change = marked - images
    assert torch.allclose(change, change[:, :1].expand_as(change), atol=1e-6)
    psnr = -10 * change.square().mean((1, 2, 3)).log10()
    assert torch.allclose(psnr, torch.tensor(40.0), atol=1e-3)
    with pytest.raises(ValueError, match="residual"):
        ViTInjector(**SMALL, residual=False, luminance=True)
