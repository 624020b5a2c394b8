"""Neural Cleanse: trigger inversion, anomaly index, calibrated verdicts, mitigation."""

from defense_nc.__about__ import __version__ as __version__
from defense_nc.batched import invert_triggers
from defense_nc.config import NCConfig
from defense_nc.discriminant_filter import DiscriminantFilter
from defense_nc.filter_export import export_filter
from defense_nc.fine_tune import Sgd
from defense_nc.input_detector import CalibratedDetector, InputDetector, auroc, threshold_at
from defense_nc.input_filter import InputFilter
from defense_nc.inversion import invert_trigger
from defense_nc.mitigator import Mitigator, Repaired
from defense_nc.neuron_pruning import NeuronPruning
from defense_nc.scan import scan
from defense_nc.schedule import CostSchedule
from defense_nc.strip import Strip, strip_entropy
from defense_nc.trigger import InvertedTrigger
from defense_nc.unlearning import Unlearning
from defense_nc.verdict.anomaly import AnomalyIndex, OutlierTest, mad_index, outlier_test
from defense_nc.verdict.calibrate import clean_model, fit_calibration, refit
from defense_nc.verdict.calibration import Calibration, CleanModel, load_calibration
from defense_nc.verdict.model_info import Subject, describe_subject
from defense_nc.verdict.report import LabelScore, ScanReport, Verdict, judge, judge_scan
from defense_nc.verdict.seed_stability import combine, scan_until_stable

__all__ = [
    "AnomalyIndex",
    "CalibratedDetector",
    "Calibration",
    "CleanModel",
    "CostSchedule",
    "DiscriminantFilter",
    "InputDetector",
    "InputFilter",
    "InvertedTrigger",
    "LabelScore",
    "Mitigator",
    "NCConfig",
    "NeuronPruning",
    "OutlierTest",
    "Repaired",
    "ScanReport",
    "Sgd",
    "Strip",
    "Subject",
    "Unlearning",
    "Verdict",
    "__version__",
    "auroc",
    "clean_model",
    "combine",
    "describe_subject",
    "export_filter",
    "fit_calibration",
    "invert_trigger",
    "invert_triggers",
    "judge",
    "judge_scan",
    "load_calibration",
    "mad_index",
    "outlier_test",
    "refit",
    "scan",
    "scan_until_stable",
    "strip_entropy",
    "threshold_at",
]
