"""Neural Cleanse: trigger inversion, anomaly index, calibrated verdicts, mitigation."""

from defense_nc.__about__ import __version__ as __version__
from defense_nc.config import NCConfig
from defense_nc.engines import invert_trigger, invert_triggers
from defense_nc.engines.cost_schedule import CostSchedule
from defense_nc.input_filters import (
    CalibratedDetector,
    DiscriminantFilter,
    InputDetector,
    InputFilter,
    Strip,
    auroc,
    export_filter,
    strip_entropy,
    threshold_at,
)
from defense_nc.mitigations import NeuronPruning, Unlearning
from defense_nc.neural_cleanse import NeuralCleanse
from defense_nc.protocols import Detector, Mitigator, Repaired
from defense_nc.scan_inputs import ScanInputs, open_scan
from defense_nc.trigger import InvertedTrigger
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
