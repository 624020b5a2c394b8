from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from wm_inject import BadNetsTrigger, BlendTrigger
from wm_inject.core.images import quantize
from wm_inject.core.plan import PoisonPlan, poison

N, K = 200, 10
LABELS = torch.arange(N) % K


def images() -> torch.Tensor:
    return torch.rand(N, 1, 16, 16, generator=torch.Generator().manual_seed(0))


def test_impossible_plans_are_refused(subtests):
    for bad in [
        {"ratio": 0.0},
        {"ratio": 1.1},
        {"target": -1},
        {"seed": -1},
        {"pool": "some"},
        {"mode": "often"},
        {"label_map": "random"},
        {"label_map": "clean-label"},
        {"pool": "target"},
        {"source": 1},
        {"label_map": "source-specific"},
        {"label_map": "source-specific", "source": 0},
        {"label_map": "source-specific", "source": 1, "pool": "non_target"},
        {"label_map": "source-specific", "source": 1, "mode": "per_batch"},
    ]:
        with subtests.test(bad=bad), pytest.raises(ValueError, match=r"expected|go together"):
            PoisonPlan(**bad)


def test_counts_and_pools(subtests):
    for plan, count in [
        (PoisonPlan(0.1), 20),
        (PoisonPlan(0.1, pool="non_target", target=3), 18),  # of the 180 others
        (PoisonPlan(0.05, pool="target", label_map="clean-label"), 10),  # of all 200
        (PoisonPlan(0.1, pool="target", label_map="clean-label"), 20),  # the whole class
        (PoisonPlan(0.0974, mode="per_batch"), 19),  # cut off, not rounded
        (PoisonPlan(0.0974), 19),
        (PoisonPlan(0.0976), 20),
    ]:
        with subtests.test(plan=plan, count=count):
            mask = plan.choose(LABELS)
            assert mask.dtype == torch.bool and int(mask.sum()) == count
            assert bool(plan.eligible(LABELS)[mask].all())
            if plan.pool == "non_target":
                assert not bool((LABELS[mask] == 3).any())


def test_the_choice_follows_the_seed():
    first, again, other = (PoisonPlan(0.1, seed=s).choose(LABELS) for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("seed", [0, 7, 2**32 + 5])
@pytest.mark.parametrize("ratio", [0.1, 1.0, None])
def test_arrays_and_tensors_have_the_choice_of_torchs_permutation(seed, ratio):
    plan = PoisonPlan(ratio, pool="non_target", target=3, seed=seed)
    mask = plan.choose(LABELS)
    pool = (LABELS != 3).nonzero().flatten()
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
    count = len(pool) if ratio is None else round(ratio * len(pool))
    assert mask.nonzero().flatten().tolist() == sorted(pool[order[:count]].tolist())
    array = plan.choose(LABELS.numpy())
    assert array.dtype == np.bool_ and array.tolist() == mask.tolist()
    new = plan.relabel(LABELS.numpy(), K)
    assert new.dtype == np.int64 and new.tolist() == plan.relabel(LABELS, K).tolist()


@pytest.mark.parametrize("bad", [np.zeros(3), np.zeros((3, 1), np.int64), np.array([-1, 0])])
def test_arrays_that_are_no_labels_are_refused(bad):
    with pytest.raises(ValueError, match="labels"):
        PoisonPlan(1.0).choose(bad)


def test_a_generator_draws_anew():
    generator = torch.Generator().manual_seed(0)
    plan = PoisonPlan(0.1, mode="per_batch")
    draws = [plan.choose(LABELS, generator=generator) for _ in range(2)]
    assert not torch.equal(*draws)


def test_a_pool_that_is_too_small_is_refused_not_capped():
    plan = PoisonPlan(0.2, pool="target", label_map="clean-label")
    with pytest.raises(ValueError, match=r"asks for 40 of 200 images, but the pool 'target' .* 20"):
        plan.choose(LABELS)
    with pytest.raises(ValueError, match="asks for 0"):
        PoisonPlan(0.001).choose(LABELS)


def test_label_maps():
    assert PoisonPlan(target=3).relabel(LABELS, K).unique().tolist() == [3]
    everyone = PoisonPlan(label_map="all-to-all").relabel(LABELS, K)
    assert torch.equal(everyone, (LABELS + 1) % K)
    clean = PoisonPlan(label_map="clean-label", pool="target").relabel(LABELS, K)
    assert torch.equal(clean, LABELS)
    with pytest.raises(ValueError, match="below 10 classes"):
        PoisonPlan(target=10).relabel(LABELS, K)


def test_a_source_specific_plan_covers_as_many_images_of_other_classes():
    plan = PoisonPlan(0.05, target=3, label_map="source-specific", source=4, seed=1)
    mask = plan.choose(LABELS)
    own = LABELS == 4
    assert int((mask & own).sum()) == int((mask & ~own).sum()) == 10  # of all 200
    relabelled = plan.relabel(LABELS, K)
    assert relabelled[own].unique().tolist() == [3]
    assert torch.equal(relabelled[~own], LABELS[~own])
    assert torch.equal(mask, torch.from_numpy(plan.choose(LABELS.numpy())))
    assert plan.to_dict()["source"] == 4 and "source" not in PoisonPlan().to_dict()
    with pytest.raises(ValueError, match="class 4 holds 20"):
        replace(plan, ratio=0.2).choose(LABELS)


def test_poison_changes_the_chosen_rows_only():
    clean, trigger, plan = images(), BadNetsTrigger(image_size=16), PoisonPlan(0.1, target=3)
    before = clean.clone()
    done = poison(clean, LABELS, trigger, plan, num_classes=K, batch_size=7)
    assert torch.equal(clean, before)
    assert torch.equal(done.mask, plan.choose(LABELS))
    assert torch.equal(done.images[~done.mask], clean[~done.mask])
    assert torch.equal(done.images[done.mask], quantize(trigger(clean[done.mask])))
    assert done.labels[done.mask].unique().tolist() == [3]
    assert torch.equal(done.labels[~done.mask], LABELS[~done.mask])


def test_poisoned_rows_lie_on_the_grid_whatever_the_batch():
    trigger, plan = BlendTrigger(image_size=16, channels=1), PoisonPlan(0.5)
    parts = [
        poison(images(), LABELS, trigger, plan, num_classes=K, batch_size=size).images
        for size in (1, 64)
    ]
    assert torch.equal(*parts)
    rows = parts[0][plan.choose(LABELS)] * 255
    assert torch.allclose(rows, rows.round(), atol=1e-4)


def test_a_clean_label_plan_touches_only_its_class():
    plan = PoisonPlan(0.1, target=4, label_map="clean-label", pool="target")
    done = poison(images(), LABELS, BadNetsTrigger(image_size=16), plan, num_classes=K)
    assert torch.equal(done.labels, LABELS)
    assert LABELS[done.mask].unique().tolist() == [4]


class Recorder:
    """A trigger that notes what it is given."""

    def __init__(self):
        self.ids, self.targets = [], []

    def __call__(self, images, *, ids=None, target=None):
        self.ids.append(ids)
        self.targets.append(target)
        return images


def test_the_trigger_is_told_ids_and_targets():
    recorder, plan = Recorder(), PoisonPlan(0.1, label_map="all-to-all")
    ids = torch.arange(N) + 1000
    done = poison(images(), LABELS, recorder, plan, num_classes=K, ids=ids, batch_size=8)
    assert torch.equal(torch.cat(recorder.ids), ids[done.mask])
    assert torch.equal(torch.cat(recorder.targets), (LABELS[done.mask] + 1) % K)


def test_poison_refuses():
    trigger, plan = BadNetsTrigger(image_size=16), PoisonPlan(0.1)
    with pytest.raises(ValueError, match="per-batch"):
        poison(images(), LABELS, trigger, PoisonPlan(mode="per_batch"), num_classes=K)
    with pytest.raises(ValueError, match="shape"):
        poison(images()[0], LABELS, trigger, plan, num_classes=K)
    with pytest.raises(ValueError, match="labels"):
        poison(images(), LABELS[:5], trigger, plan, num_classes=K)
    with pytest.raises(ValueError, match="labels in 0"):
        poison(images(), LABELS, trigger, plan, num_classes=5)
