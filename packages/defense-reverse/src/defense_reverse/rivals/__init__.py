"""Published inversions for dynamic triggers, under the same protocol as our own scan."""

from defense_reverse.rivals.bti_losses import BtiDbfConfig
from defense_reverse.rivals.bti_unlearning import BtiDbf
from defense_reverse.rivals.feature_losses import FeatureREConfig
from defense_reverse.rivals.feature_trigger import FeatureTrigger

__all__ = ["BtiDbf", "BtiDbfConfig", "FeatureREConfig", "FeatureTrigger"]
