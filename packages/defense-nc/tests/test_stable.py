"""Repeats: when one scan is enough, when several agree, and when they never do."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from defense_nc import InvertedTrigger, NeuralCleanse, Verdict, judge
from defense_nc.verdict import combine, scan_until_stable
from wm_victim.toy_backdoors import planted_classifier, planted_images

CLEAN = torch.linspace(3.3, 3.7, 10).double()


def report(calibration, logs, *, rates=None, seed=0, **changes):
    rates = torch.ones(len(logs)) if rates is None else rates
    settings = {"floor": 0.9, "calibration": calibration, "subject": None, "seed": seed}
    return judge("test", logs.exp(), rates, **{**settings, **changes})


def with_target(depth):
    logs = CLEAN.clone()
    logs[4] = 3.5 - depth
    return logs


def scripted(calibration, depths):
    """A scan whose n-th seed finds label 4 so far below the others; and the seeds it was asked."""
    asked = []

    def scan(seed):
        asked.append(seed)
        return report(calibration, with_target(depths[len(asked) - 1]), seed=seed)

    return scan, asked


# What these depths are worth is asserted, so that no test rests on a guess.
FAR, NAMED, MISSED = 2.0, 0.78, 0.62


def test_the_scripted_depths_lie_where_the_tests_want_them(calibration):
    p = [report(calibration, with_target(depth)).p_value for depth in (FAR, NAMED, MISSED, 0.0)]
    assert p[0] < 0.0125 < p[1] < 0.05 < p[2] < 0.2 < p[3]


@pytest.mark.parametrize("depth", [FAR, 0.0])
def test_one_scan_is_enough_far_from_the_line(calibration, depth):
    scan, asked = scripted(calibration, [depth])
    found = scan_until_stable(scan, seed=7)
    assert asked == [7]
    assert found.repeats == 1
    assert found.verdict is (Verdict.BACKDOORED if depth else Verdict.CLEAN)


def test_near_the_line_it_repeats(calibration, subtests):
    for depths, repeats, verdict in [
        ([NAMED] * 3, 3, Verdict.BACKDOORED),
        ([MISSED] * 3, 3, Verdict.CLEAN),
        ([MISSED, NAMED, FAR, FAR], 4, Verdict.BACKDOORED),
        ([NAMED, MISSED, 0.0, 0.0], 4, Verdict.CLEAN),
        ([NAMED, MISSED, NAMED, MISSED, NAMED], 5, Verdict.INCONCLUSIVE),
    ]:
        with subtests.test(depths=depths, repeats=repeats, verdict=verdict):
            scan, asked = scripted(calibration, depths)
            found = scan_until_stable(scan)
            assert (found.verdict, found.repeats) == (verdict, repeats)
            assert asked == list(range(repeats))
            if verdict is Verdict.INCONCLUSIVE:
                assert "flips between 5 scans (backdoored 3, clean 2)" in found.reason
                assert found.to_dict()["repeats"] == 5


def test_a_model_outside_the_calibrated_range_is_not_scanned_again(calibration, subject):
    calls = []

    def scan(seed):
        calls.append(seed)
        return report(calibration, with_target(MISSED), subject=replace(subject, channels=1))

    assert scan_until_stable(scan).verdict is Verdict.INCONCLUSIVE
    assert calls == [0]


@pytest.mark.integration
def test_repeats_do_not_add_false_alarms(calibration, drawn):
    """Clean models whose scores hold as much noise from run to run as differences of labels."""
    generator = np.random.default_rng(5)
    alarms = repeats = 0
    for _ in range(300):
        own = drawn(generator, 10, "normal")

        def scan(seed, own=own):
            return report(calibration, own + 0.1 * torch.from_numpy(generator.normal(size=10)))

        found = scan_until_stable(scan)
        alarms += found.verdict is Verdict.BACKDOORED
        repeats += found.repeats
    assert alarms / 300 <= 0.065
    assert repeats / 300 < 2.0


def test_combine_takes_medians_per_label(calibration):
    each = [report(calibration, with_target(d), seed=d) for d in (FAR, NAMED, 0)]
    joint = combine(each)
    assert joint.labels[4].score == pytest.approx(each[1].labels[4].score)
    assert joint.labels[0].score == pytest.approx(each[0].labels[0].score)
    assert (joint.repeats, joint.seed) == (3, FAR)
    two = combine(each[:2])
    middle = (each[0].labels[4].score * each[1].labels[4].score) ** 0.5
    assert two.labels[4].score == pytest.approx(middle)


def test_combine_counts_the_scans_that_reached_a_label(calibration):
    low = torch.tensor([*[1.0] * 9, 0.2])
    good, bad = report(calibration, CLEAN), report(calibration, CLEAN - 0.5, rates=low)
    once, twice = combine([good, bad, bad]), combine([good, good, bad])
    assert not once.labels[9].converged
    assert twice.labels[9].converged
    assert twice.labels[9].score == pytest.approx(good.labels[9].score)


def test_combine_keeps_zeros_and_the_nearest_trigger():
    triggers = [InvertedTrigger(torch.zeros(1, 4, 4), torch.zeros(3, 4, 4)) for _ in range(3)]
    each = [
        judge("test", torch.tensor([0.0, 5, 6, 7, x]), torch.ones(5), floor=0.9, triggers={4: t})
        for x, t in zip((1.0, 2.0, 9.0), triggers, strict=True)
    ]
    joint = combine(each)
    assert joint.labels[0].score == 0
    assert joint.triggers[4] is triggers[1]
    assert not joint.calibrated


def test_refusals(calibration):
    scan, _ = scripted(calibration, [FAR])
    for wrong in ({"agree": 1}, {"max_repeats": 2}, {"margin": 0.5}, {"seed": -1}):
        with pytest.raises(ValueError, match="expected seed"):
            scan_until_stable(scan, **wrong)
    with pytest.raises(ValueError, match="at least one"):
        combine([])
    one = report(calibration, CLEAN)
    for other in (
        report(calibration, CLEAN[:9]),
        report(None, CLEAN),
        report(calibration, CLEAN, alpha=0.01),
        report(calibration, CLEAN, config={"steps": 3}),
    ):
        with pytest.raises(ValueError, match="seed and scores only"):
            combine([one, other])


def test_scans_of_a_detector_can_be_combined():
    data, model = planted_images(60, num_classes=4), planted_classifier("patch", num_classes=4)
    search = {"steps": 6, "batches": 1, "milestones": (4,), "candidates": 1}
    few = {**search, "references": 1, "calm": 1.0}  # so that labels stop, with gains of their own
    detector = NeuralCleanse.preset("fast", **few)
    reports = [detector.scan(model, data.images, seed=seed, progress=False) for seed in (0, 1)]
    assert reports[0].log != reports[1].log
    assert combine(reports).repeats == 2
