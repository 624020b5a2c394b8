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
from defense_nc.neural_cleanse import NeuralCleanse
from defense_nc.neuron_pruning import NeuronPruning
from defense_nc.protocols import Detector, Mitigator, Repaired
from defense_nc.scan_inputs import ScanInputs, open_scan
from defense_nc.schedule import CostSchedule
from defense_nc.strip import Strip, strip_entropy
from defense_nc.trigger import InvertedTrigger
from defense_nc.unlearning import Unlearning
from defense_nc.verdict import (
    AnomalyIndex,
    Calibration,
    CleanModel,
    LabelScore,
    ModelInfo,
    OutlierTest,
    ScanReport,
    Verdict,
    clean_model,
    combine,
    describe_model,
    fit_calibration,
    judge,
    judge_scan,
    load_calibration,
    mad_index,
    outlier_test,
    refit,
    scan_until_stable,
)

__all__ = [
    "AnomalyIndex",
    "CalibratedDetector",
    "Calibration",
    "CleanModel",
    "CostSchedule",
    "Detector",
    "DiscriminantFilter",
    "InputDetector",
    "InputFilter",
    "InvertedTrigger",
    "LabelScore",
    "Mitigator",
    "ModelInfo",
    "NCConfig",
    "NeuralCleanse",
    "NeuronPruning",
    "OutlierTest",
    "Repaired",
    "ScanInputs",
    "ScanReport",
    "Sgd",
    "Strip",
    "Unlearning",
    "Verdict",
    "__version__",
    "auroc",
    "clean_model",
    "combine",
    "describe_model",
    "export_filter",
    "fit_calibration",
    "invert_trigger",
    "invert_triggers",
    "judge",
    "judge_scan",
    "load_calibration",
    "mad_index",
    "open_scan",
    "outlier_test",
    "refit",
    "scan_until_stable",
    "strip_entropy",
    "threshold_at",
]
