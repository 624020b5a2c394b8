"""Mitigations of others, each a `defense_nc.Mitigator`."""

from defense_reverse.mitigations.anp import ANP
from defense_reverse.mitigations.bti_dbf import BtiDbfUnlearning
from defense_reverse.mitigations.channel_lipschitz import ChannelLipschitzPruning
from defense_reverse.mitigations.feature_shift import FeatureShiftTuning
from defense_reverse.mitigations.fine_pruning import FinePruning
from defense_reverse.mitigations.fine_tuning import FineTuning
from defense_reverse.mitigations.ft_sam import FTSAM
from defense_reverse.mitigations.head_unlearning import HeadUnlearning
from defense_reverse.mitigations.i_bau import IBAU
from defense_reverse.mitigations.nad import NAD

__all__ = [
    "ANP",
    "FTSAM",
    "IBAU",
    "NAD",
    "BtiDbfUnlearning",
    "ChannelLipschitzPruning",
    "FeatureShiftTuning",
    "FinePruning",
    "FineTuning",
    "HeadUnlearning",
]
