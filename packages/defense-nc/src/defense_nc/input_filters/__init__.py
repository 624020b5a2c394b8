"""Input detectors: is this one image triggered?"""

from defense_nc.input_filters.detector import (
    CalibratedDetector,
    InputDetector,
    auroc,
    conformal_threshold,
    threshold_at,
)
from defense_nc.input_filters.discriminant_filter import DiscriminantFilter
from defense_nc.input_filters.export import export_filter
from defense_nc.input_filters.input_filter import InputFilter
from defense_nc.input_filters.layer_ranks import LayerRanks
from defense_nc.input_filters.parameter_scaling import ParameterScaling
from defense_nc.input_filters.strip import Strip, strip_entropy

__all__ = [
    "CalibratedDetector",
    "DiscriminantFilter",
    "InputDetector",
    "InputFilter",
    "LayerRanks",
    "ParameterScaling",
    "Strip",
    "auroc",
    "conformal_threshold",
    "export_filter",
    "strip_entropy",
    "threshold_at",
]
