"""From scores to a verdict: outlier statistics, calibration, abstention, the report."""

from defense_nc.verdict.abstention import MIN_CONVERGED, scores_shifted
from defense_nc.verdict.anomaly import (
    AnomalyIndex,
    OutlierTest,
    mad_index,
    outlier_test,
)
from defense_nc.verdict.calibrate import clean_model, fit_calibration, refit
from defense_nc.verdict.calibration import (
    Calibration,
    CleanModel,
    find_calibration,
    load_calibration,
    read_calibrations,
    write_calibrations,
)
from defense_nc.verdict.joint import (
    JointCalibration,
    JointReport,
    fit_joint,
    judge_together,
    panels,
)
from defense_nc.verdict.model_info import ModelInfo, describe_model
from defense_nc.verdict.report import foreseen_abstention, judge, judge_again, judge_scan
from defense_nc.verdict.scan_report import Finding, LabelScore, ScanReport, Verdict
from defense_nc.verdict.seed_stability import combine, scan_until_stable

__all__ = [
    "MIN_CONVERGED",
    "AnomalyIndex",
    "Calibration",
    "CleanModel",
    "Finding",
    "JointCalibration",
    "JointReport",
    "LabelScore",
    "ModelInfo",
    "OutlierTest",
    "ScanReport",
    "Verdict",
    "clean_model",
    "combine",
    "describe_model",
    "find_calibration",
    "fit_calibration",
    "fit_joint",
    "foreseen_abstention",
    "judge",
    "judge_again",
    "judge_scan",
    "judge_together",
    "load_calibration",
    "mad_index",
    "outlier_test",
    "panels",
    "read_calibrations",
    "refit",
    "scan_until_stable",
    "scores_shifted",
    "write_calibrations",
]
