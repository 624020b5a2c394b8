"""Neural Cleanse: trigger inversion, anomaly index, calibrated verdicts, unlearning."""

from defense_nc.__about__ import __version__ as __version__
from defense_nc.anomaly import AnomalyIndex, OutlierTest, mad_index, outlier_test
from defense_nc.inversion import frozen, invert_trigger
from defense_nc.report import LabelScore, ScanReport, Verdict, judge
from defense_nc.scan import scan
from defense_nc.schedule import CostSchedule, NCConfig
from defense_nc.trigger import InvertedTrigger
from defense_nc.unlearn import UnlearnConfig, unlearn

__all__ = [
    "AnomalyIndex",
    "CostSchedule",
    "InvertedTrigger",
    "LabelScore",
    "NCConfig",
    "OutlierTest",
    "ScanReport",
    "UnlearnConfig",
    "Verdict",
    "__version__",
    "frozen",
    "invert_trigger",
    "judge",
    "mad_index",
    "outlier_test",
    "scan",
    "unlearn",
]
