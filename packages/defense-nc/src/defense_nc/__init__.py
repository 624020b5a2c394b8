"""Neural Cleanse: trigger inversion, anomaly index, calibrated verdicts, mitigation."""

from typing import TYPE_CHECKING

from defense_nc.__about__ import __version__ as __version__
from wm_inject.core.lazy import lazy_names

if TYPE_CHECKING:
    from defense_nc.config import NCConfig as NCConfig
    from defense_nc.engines import invert_trigger as invert_trigger
    from defense_nc.engines import invert_triggers as invert_triggers
    from defense_nc.engines.cost_schedule import CostSchedule as CostSchedule
    from defense_nc.input_filters import CalibratedDetector as CalibratedDetector
    from defense_nc.input_filters import DiscriminantFilter as DiscriminantFilter
    from defense_nc.input_filters import InputDetector as InputDetector
    from defense_nc.input_filters import InputFilter as InputFilter
    from defense_nc.input_filters import LayerRanks as LayerRanks
    from defense_nc.input_filters import ParameterScaling as ParameterScaling
    from defense_nc.input_filters import Strip as Strip
    from defense_nc.input_filters import auroc as auroc
    from defense_nc.input_filters import export_filter as export_filter
    from defense_nc.input_filters import strip_entropy as strip_entropy
    from defense_nc.input_filters import threshold_at as threshold_at
    from defense_nc.mitigations import NeuronPruning as NeuronPruning
    from defense_nc.mitigations import Sgd as Sgd
    from defense_nc.mitigations import Unlearning as Unlearning
    from defense_nc.neural_cleanse import NeuralCleanse as NeuralCleanse
    from defense_nc.protocols import Detector as Detector
    from defense_nc.protocols import Mitigator as Mitigator
    from defense_nc.protocols import Repaired as Repaired
    from defense_nc.scan_inputs import ScanInputs as ScanInputs
    from defense_nc.scan_inputs import open_scan as open_scan
    from defense_nc.trigger import InvertedTrigger as InvertedTrigger
    from defense_nc.verdict import AnomalyIndex as AnomalyIndex
    from defense_nc.verdict import Calibration as Calibration
    from defense_nc.verdict import CleanModel as CleanModel
    from defense_nc.verdict import Finding as Finding
    from defense_nc.verdict import LabelScore as LabelScore
    from defense_nc.verdict import ModelInfo as ModelInfo
    from defense_nc.verdict import OutlierTest as OutlierTest
    from defense_nc.verdict import ScanReport as ScanReport
    from defense_nc.verdict import Verdict as Verdict
    from defense_nc.verdict import clean_model as clean_model
    from defense_nc.verdict import combine as combine
    from defense_nc.verdict import describe_model as describe_model
    from defense_nc.verdict import fit_calibration as fit_calibration
    from defense_nc.verdict import judge as judge
    from defense_nc.verdict import judge_scan as judge_scan
    from defense_nc.verdict import load_calibration as load_calibration
    from defense_nc.verdict import mad_index as mad_index
    from defense_nc.verdict import outlier_test as outlier_test
    from defense_nc.verdict import refit as refit
    from defense_nc.verdict import scan_until_stable as scan_until_stable
else:
    __getattr__, __dir__, __all__ = lazy_names(__name__)
