"""Detectors of others for dynamic triggers, each a `defense_nc.Detector`."""

from defense_reverse.detectors.bti_dbf import BtiDbf
from defense_reverse.detectors.bti_losses import BtiDbfConfig
from defense_reverse.detectors.feature_losses import FeatureREConfig
from defense_reverse.detectors.feature_re import FeatureRE, FeatureTrigger
from defense_reverse.detectors.head_weights import HeadWeights
from defense_reverse.detectors.margin_ascent import MarginAscent
from defense_reverse.detectors.pair_perturbation import PairPerturbation
from defense_reverse.detectors.patch_sweep import PatchSweep
from defense_reverse.detectors.universal_perturbation import UniversalPerturbation, UniversalPicture
from defense_reverse.detectors.universal_warp import UniversalWarp, WarpField

__all__ = [
    "BtiDbf",
    "BtiDbfConfig",
    "FeatureRE",
    "FeatureREConfig",
    "FeatureTrigger",
    "HeadWeights",
    "MarginAscent",
    "PairPerturbation",
    "PatchSweep",
    "UniversalPerturbation",
    "UniversalPicture",
    "UniversalWarp",
    "WarpField",
]
