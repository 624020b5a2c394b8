from __future__ import annotations

import pytest
import torch

from defense_reverse import UNetGenerator
from wm_inject import OnnxModel, to_onnx, to_torchscript


def images(count: int = 4, channels: int = 3, size: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, channels, size, size, generator=generator)


def stirred(**settings) -> UNetGenerator:
    """A generator far from its start, so that equality tests are about something."""
    net = UNetGenerator(**settings)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return net.eval()


def test_shape_and_range_are_kept_for_every_side(subtests):
    for residual in [False, True]:
        for channels, size, depth in [(1, 28, 3), (3, 16, 2), (3, 17, 2)]:
            with subtests.test(residual=residual, channels=channels, size=size, depth=depth):
                net = stirred(channels=channels, width=4, depth=depth, residual=residual)
                batch = images(2, channels, size)
                out = net(batch)
                assert out.shape == batch.shape and out.dtype == torch.float32
                assert out.min() >= 0 and out.max() <= 1


def test_padding_is_invisible_where_it_is_not_needed():
    # 28 pixels at depth 3 are padded to 32: the same as padding by hand and cropping
    net = stirred(channels=1, width=4, depth=3)
    batch = images(2, 1, 28)
    by_hand = torch.nn.functional.pad(batch, (0, 4, 0, 4), mode="replicate")
    torch.testing.assert_close(net(batch), net(by_hand)[..., :28, :28], atol=1e-6, rtol=0)


@pytest.mark.parametrize("residual", [False, True])
def test_an_image_does_not_see_its_batch(residual):
    net = stirred(channels=3, width=4, residual=residual)
    batch = images(5)
    alone = torch.cat([net(image[None]) for image in batch])
    for mode in (True, False):
        torch.testing.assert_close(net.train(mode)(batch), alone, atol=1e-6, rtol=0)


def test_a_fresh_generator_nearly_copies():
    batch = images()
    assert torch.equal(UNetGenerator(channels=3, residual=True)(batch), batch)
    plain = UNetGenerator(channels=3)(batch)
    assert (plain - batch).abs().mean() < 0.15


def test_the_seed_alone_decides_the_start():
    state = torch.get_rng_state()
    one, same, other = (UNetGenerator(channels=1, width=4, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    pairs = zip(one.parameters(), same.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(one.down[0][0].weight, other.down[0][0].weight)


def test_the_image_is_not_changed_and_gradients_reach_every_layer():
    net, batch = stirred(channels=3, width=4), images()
    kept = batch.clone()
    net(batch).square().mean().backward()
    assert torch.equal(batch, kept)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


def test_settings_out_of_range_are_refused(subtests):
    for settings in [
        {"channels": 2},
        {"channels": 3, "width": 0},
        {"channels": 3, "depth": 9},
        {"channels": 3, "convs": 0},
    ]:
        with subtests.test(settings=settings), pytest.raises(ValueError, match="expected"):
            UNetGenerator(**settings)


def test_bad_images_are_refused(subtests):
    for batch in [
        images(2, 1),  # other channels
        images(2)[0],  # no batch
        images(2).double(),
        images(2) + 1,
        images(2)[:0],
    ]:
        with subtests.test(batch=batch), pytest.raises(ValueError, match="expected"):
            UNetGenerator(channels=3, width=4)(batch)


@pytest.mark.integration
def test_exports_give_the_same_images_where_sides_are_padded(tmp_path):
    net, batch = stirred(channels=1, width=4, depth=3), images(3, 1, 28)
    parity = to_torchscript(net, batch, tmp_path / "g.pt")
    assert parity.max_abs <= 1e-4
    parity = to_onnx(net, batch, tmp_path / "g.onnx")
    assert parity.max_abs <= 1e-4 and parity.batches == (1, 3)
    found = OnnxModel(tmp_path / "g.onnx")(batch[:2].numpy())
    torch.testing.assert_close(torch.from_numpy(found), net(batch[:2]).detach(), atol=1e-4, rtol=0)
