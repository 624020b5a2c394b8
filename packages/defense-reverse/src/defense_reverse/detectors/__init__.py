"""Published inversions for dynamic triggers, under the same protocol as our own scan."""

from defense_reverse.detectors.bti_losses import BtiDbfConfig
from defense_reverse.detectors.bti_unlearning import BtiDbf
from defense_reverse.detectors.feature_losses import FeatureREConfig
from defense_reverse.detectors.feature_trigger import FeatureTrigger

__all__ = ["BtiDbf", "BtiDbfConfig", "FeatureREConfig", "FeatureTrigger"]
