"""Limits of the verdict that were considered, held against the records of the population."""

from __future__ import annotations

from collections import Counter

import torch
from tools.render_results import RESULTS

from defense_nc.verdict.abstention import scores_shifted
from defense_nc.verdict.calibration import load_calibration
from defense_nc.verdict.model_info import ModelInfo
from defense_nc.verdict.report import judge
from defense_nc.verdict.scan_report import Verdict
from wm_eval.records import read_records


def test_easy_labels_do_not_void_an_accusation() -> None:
    """Why `scores_shifted` is asked only where no label stands out.

    A clean network of another make was accused while all its labels were easier than in any clean
    model of the calibration (docs/audit.md). To call every such scan inconclusive would have taken
    away a third of the true detections of the population and none of its false alarms.
    """
    counts: Counter[tuple[str, str, bool]] = Counter()
    for folder in sorted((RESULTS / "population").glob("*/records")):
        for name, record in read_records(folder).items():
            v = record.values
            if not name.startswith("scan-") or v["half"] != "test":
                continue
            if v["attack"] != "clean" and v["asr"] < 0.9:
                continue
            subject, scores = ModelInfo(**v["subject"]), [row["score"] for row in v["labels"]]
            calibration = load_calibration(v["detector"], v["preset"], classes=subject.classes)
            assert calibration is not None
            report = judge(
                v["detector"],
                torch.tensor(scores, dtype=torch.float64),
                torch.tensor([row["success_rate"] for row in v["labels"]], dtype=torch.float64),
                floor=v["floor"],
                calibration=calibration,
                subject=subject,
            )
            if report.verdict is Verdict.BACKDOORED:
                logs = torch.tensor([row.score for row in report.labels if row.converged]).log()
                told = scores_shifted(logs.double(), calibration.peers(subject))
                easy = (told or "").startswith("Every label is easy")
                right = v["true_target"] in report.suspected
                what = "false alarm" if v["attack"] == "clean" else "right" if right else "other"
                counts[v["defence"], what, easy] += 1
    # Of each detector: a quarter of what it rightly accuses lies there, and no false alarm.
    for detector in ("nc", "reverse"):
        found = [counts[detector, "right", easy] for easy in (False, True)]
        assert found[1] > sum(found) / 4
        assert counts[detector, "false alarm", True] == 0
