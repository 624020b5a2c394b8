"""What holds for any images, plan and trigger. Examples are drawn, the same ones each time."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from wm_inject import PoisonPlan, build_trigger, psnr, quantize, to_float, to_pixels
from wm_inject.core.plan import poison

STEADY = settings(derandomize=True, database=None, deadline=None, max_examples=40)
# Those that need no training to do something. The others share the contract in test_twelve.py.
PLAIN = ("badnets", "blend", "sig", "ftrojan", "wanet")


@st.composite
def batches(draw: st.DrawFn, *, sides: tuple[int, ...] = (8, 12, 17)) -> Tensor:
    """float32 (N, C, H, W) in [0, 1], square; flat, extreme and noisy pictures among them."""
    shape = (draw(st.integers(1, 5)), draw(st.sampled_from((1, 3))))
    side = draw(st.sampled_from(sides))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    images = torch.rand(*shape, side, side, generator=generator)
    contrast, level = draw(st.sampled_from((0.0, 0.3, 1.0, 8.0))), draw(st.floats(0, 1, width=32))
    return ((images - 0.5) * contrast + level).clamp(0, 1)


@st.composite
def labelled(draw: st.DrawFn) -> Tensor:
    """int64 (N,) with labels below 4, and each of them at least once."""
    drawn = draw(st.lists(st.integers(0, 3), max_size=60))
    return torch.tensor([*range(4), *drawn])


@STEADY
@given(batches())
def test_rounding_is_to_the_nearest_level_and_rounding_twice_is_rounding_once(
    images: Tensor,
) -> None:
    once = quantize(images)
    assert torch.equal(quantize(once), once)
    assert float((once - images).abs().max()) <= 0.5 / 255 + 1e-6
    assert torch.equal(to_float(to_pixels(images)), once)
    assert once.unique().mul(255).sub(once.unique().mul(255).round()).abs().max() < 1e-4


@STEADY
@given(st.sampled_from(PLAIN), batches(sides=(32,)), st.data())
def test_a_trigger_keeps_the_contract(kind: str, images: Tensor, data: st.DataObject) -> None:
    channels = {} if kind in ("badnets", "sig", "wanet") else {"channels": images.shape[1]}
    trigger = build_trigger(kind, {"image_size": 32, **channels})
    before = images.clone()
    with torch.no_grad():
        out = trigger(images)
        order = torch.tensor(data.draw(st.permutations(range(len(images)))))
        reordered = trigger(images[order])
    assert out.shape == images.shape and out.dtype == torch.float32
    assert float(out.min()) >= 0 and float(out.max()) <= 1 and bool(out.isfinite().all())
    assert torch.equal(images, before)
    # What an image gets depends on the image, not on its neighbours or its place.
    torch.testing.assert_close(reordered, out[order], rtol=0, atol=1e-6)


@STEADY
@given(
    labelled(),
    st.floats(0.01, 1),
    st.integers(0, 3),
    st.sampled_from(("all", "non_target", "target")),
    st.integers(0, 1000),
)
def test_a_plan_takes_as_many_as_it_says_out_of_its_pool(
    labels: Tensor, ratio: float, target: int, pool: str, seed: int
) -> None:
    meaning = "clean-label" if pool == "target" else "all-to-one"
    plan = PoisonPlan(ratio=ratio, target=target, label_map=meaning, pool=pool, seed=seed)
    allowed = [
        pool == "all" or (int(label) == target) == (pool == "target") for label in labels.tolist()
    ]
    base = sum(allowed) if pool == "non_target" else len(labels)
    count = round(ratio * base)
    if not 0 < count <= sum(allowed):
        with pytest.raises(ValueError, match="asks for"):
            plan.choose(labels)
        return
    mask = plan.choose(labels)
    assert int(mask.sum()) == count
    assert not bool((mask & ~torch.tensor(allowed)).any())
    assert torch.equal(mask, plan.choose(labels))
    new = plan.relabel(labels, 4)
    assert torch.equal(new, labels if pool == "target" else torch.full_like(labels, target))


@STEADY
@given(labelled(), st.floats(0.02, 1), st.floats(0.02, 1), st.integers(0, 1000))
def test_a_smaller_plan_is_part_of_a_larger_one(
    labels: Tensor, one: float, other: float, seed: int
) -> None:
    assume(round(min(one, other) * len(labels)) > 0)
    few, many = (
        PoisonPlan(ratio=ratio, seed=seed).choose(labels) for ratio in sorted((one, other))
    )
    assert not bool((few & ~many).any())


@STEADY
@given(labelled(), st.floats(0.05, 1), st.sampled_from(("all-to-one", "all-to-all")))
def test_poisoning_changes_the_chosen_images_and_no_others(
    labels: Tensor, ratio: float, label_map: str
) -> None:
    generator = torch.Generator().manual_seed(len(labels))
    images = quantize(torch.rand(len(labels), 3, 8, 8, generator=generator) * 0.5)
    plan = PoisonPlan(ratio=ratio, target=1, label_map=label_map)
    assume(round(ratio * len(labels)) > 0)
    trigger = build_trigger("badnets", {"image_size": 8, "size": 2})
    done = poison(images, labels, trigger, plan, num_classes=4)
    assert torch.equal(done.images[~done.mask], images[~done.mask])
    assert torch.equal(done.labels[~done.mask], labels[~done.mask])
    assert bool((done.images[done.mask] != images[done.mask]).flatten(1).any(1).all())
    wanted = [1 if label_map == "all-to-one" else (y + 1) % 4 for y in labels[done.mask].tolist()]
    assert done.labels[done.mask].tolist() == wanted
    assert torch.equal(quantize(done.images), done.images)


@STEADY
@given(batches(), st.integers(1, 254))
def test_psnr_is_the_formula(images: Tensor, step: int) -> None:
    clean = quantize(images)
    moved = torch.where(clean > 0.5, clean - step / 510, clean + step / 510)
    errors = np.square((moved - clean).double().numpy()).mean(axis=(1, 2, 3))
    expected = [10 * math.log10(1 / error) for error in errors]
    assert psnr(moved, clean).tolist() == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(psnr(moved, clean), psnr(clean, moved))
