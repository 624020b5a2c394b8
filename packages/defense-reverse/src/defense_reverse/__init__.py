"""Reversed backdoor generators, and what the field cleans and detects with beside them."""

from defense_reverse.__about__ import __version__ as __version__
from defense_reverse.closeness import Closeness, closeness
from defense_reverse.config import ReverseConfig
from defense_reverse.detectors import BtiDbf, BtiDbfConfig, FeatureREConfig, FeatureTrigger
from defense_reverse.generator import UNetGenerator
from defense_reverse.mitigations import (
    ANP,
    FTSAM,
    IBAU,
    NAD,
    FinePruning,
    FineTuning,
)
from defense_reverse.reverse import pretrain, reverse_engineer
from defense_reverse.scan import detection_case, scan
from defense_reverse.search import LambdaSearch
from defense_reverse.trigger import ReversedTrigger, load_reversed, save_reversed

__all__ = [
    "ANP",
    "FTSAM",
    "IBAU",
    "NAD",
    "BtiDbf",
    "BtiDbfConfig",
    "Closeness",
    "FeatureREConfig",
    "FeatureTrigger",
    "FinePruning",
    "FineTuning",
    "LambdaSearch",
    "ReverseConfig",
    "ReversedTrigger",
    "UNetGenerator",
    "__version__",
    "closeness",
    "detection_case",
    "load_reversed",
    "pretrain",
    "reverse_engineer",
    "save_reversed",
    "scan",
]
