from __future__ import annotations

import pytest
import torch
from torch import Tensor

from defense_nc import judge
from wm_eval.measure import (
    mark_values,
    metrics_values,
    scan_values,
    stealth_values,
)
from wm_eval.records import canonical_json
from wm_eval.robustness import Outcomes, summarize
from wm_extract import Identity, RandomMask
from wm_victim import ImageSet
from wm_victim.metrics import triggered_images


class Reader(torch.nn.Module):
    """An extractor that reads the watermark off pixel (0, 0): above 0.9 the mark, below nothing."""

    def __init__(self, watermark: Tensor) -> None:
        super().__init__()
        self.watermark = watermark

    def forward(self, images: Tensor) -> Tensor:
        marked = (images[:, :1, :1, :1] > 0.9).float()
        grain = 0.01 * images[:, :1]
        return (marked * self.watermark * 0.9 + grain).clamp(0, 1)


def pair(n: int = 200) -> tuple[Tensor, Tensor, Tensor]:
    mark = torch.zeros(1, 16, 16)
    mark[0, 4:12, 4:12] = 1
    images = 0.5 * torch.rand(n, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    poisoned = images.clone()
    poisoned[:, :, 0, 0] = 1
    return mark, images, poisoned


def values(**changes) -> dict:
    mark, images, poisoned = pair()
    given = {"corruptions": {"none": Identity(), "mask": RandomMask("pixel", share=0.5)}}
    given |= {"false_positive_rate": 0.01, "seed": 0, **changes}
    return mark_values(Reader(mark).eval(), mark, images, poisoned, **given)


def test_a_perfect_mark_is_read_and_a_masked_one_half_of_the_time() -> None:
    found = values()
    none, masked = found["bits"]["none"], found["bits"]["mask"]
    assert (none["marked"], none["unmarked"], found["constant_score"]) == (1.0, 0.5, 0.5)
    assert found["detection"]["true_positives"] == found["detection"]["n"] == 100
    assert found["detection"]["n_calibration"] == 100
    assert 30 < masked["true_positives"] < 70
    assert found["fixed_mark"] is True


def test_bounds_follow_from_the_counts() -> None:
    detection = values()["detection"]
    assert detection["tpr_lower"] == pytest.approx(0.05 ** (1 / 100))
    assert detection["fpr"] == detection["false_positives"] / 100
    assert detection["fpr_upper"] > detection["fpr"]


def test_the_same_seed_measures_the_same() -> None:
    assert canonical_json(values()) == canonical_json(values())
    assert values()["bits"]["mask"] != values(seed=1)["bits"]["mask"]


def test_no_plain_measurement_is_refused() -> None:
    with pytest.raises(ValueError, match='expected the corruption "none"'):
        values(corruptions={"mask": RandomMask()})


def test_a_trigger_is_told_ids_and_target_of_every_image() -> None:
    images = torch.full((300, 1, 8, 8), 0.5)
    data = ImageSet(images, torch.arange(300) % 10, torch.arange(300) + 7)

    def trigger(images: Tensor, *, ids: Tensor, target: Tensor | None) -> Tensor:
        asked = torch.zeros_like(ids) if target is None else target
        return images * (ids * (1 + asked) % 256 / 255).view(-1, 1, 1, 1)

    for target, factor in ((None, 1), (3, 4)):
        found = triggered_images(trigger, data, target=target)[:, 0, 0, 0]
        expected = 0.5 * (data.ids * factor % 256) / 255
        assert torch.allclose(found, expected, atol=0.51 / 255)


def test_stealth_without_lpips_weights_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    from wm_eval import measure
    from wm_inject import LpipsUnavailable

    def missing() -> None:
        raise LpipsUnavailable("no weights:\n get them")

    monkeypatch.setattr(measure, "Lpips", missing)
    _, images, poisoned = pair(20)
    found = stealth_values(poisoned, images)
    assert found["lpips"] is None and found["lpips_absent"] == "no weights: get them"
    assert found["linf"]["mean"] == pytest.approx(
        float((poisoned - images).abs().amax((1, 2, 3)).mean())
    )
    mse = (poisoned - images).square().mean((1, 2, 3))
    assert found["psnr"]["mean"] == pytest.approx(float((-10 * mse.log10()).mean()), abs=1e-3)


def test_stealth_says_what_all_changes_have_in_common() -> None:
    images = torch.full((5, 1, 16, 16), 0.5)
    same, one = images + 0.1, images.clone()
    one[0] += 0.1
    assert stealth_values(same, images)["common"] == pytest.approx(1)
    assert stealth_values(one, images)["common"] is None


def test_a_scan_is_kept_as_measured_with_both_rules() -> None:
    scores = torch.tensor([10.0, 50, 55, 60, 52, 58, 61, 57, 53, 200])
    report = judge("x", scores, torch.tensor([1.0] * 9 + [0.1]), floor=0.95)
    found = scan_values(report)
    assert found["verdict"] == "backdoored" and found["suspected"] == [0]
    assert found["score_median"] == pytest.approx(float(scores[:9].quantile(0.5)))
    middle = float(scores.quantile(0.5))
    mad = 1.4826 * float((scores - middle).abs().quantile(0.5))
    assert found["paper_line"] == pytest.approx(middle - 2 * mad)
    assert [k for k in range(10) if scores[k] < found["paper_line"]] == found["paper_flagged"]
    canonical_json(found)


def test_metrics_are_ready_for_a_record() -> None:
    rows = Outcomes(
        *(torch.tensor(x) for x in ([True, False], [True, True], [True, True], [False] * 2))
    )
    found = metrics_values(summarize(rows))
    assert found["asr"] == 1 and found["asr_interval"][1] == 1 and found["n_attack"] == 2
    canonical_json(found)
