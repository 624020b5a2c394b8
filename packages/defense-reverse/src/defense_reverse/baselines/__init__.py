"""Mitigations of others, with the signature of `defense_nc.mitigator.Mitigator`."""

from defense_reverse.baselines.anp import ANP
from defense_reverse.baselines.fine_pruning import FinePruning
from defense_reverse.baselines.fine_tuning import FineTuning
from defense_reverse.baselines.ft_sam import FTSAM
from defense_reverse.baselines.i_bau import IBAU
from defense_reverse.baselines.nad import NAD
from defense_reverse.baselines.unlearning import Unlearning

__all__ = ["ANP", "FTSAM", "IBAU", "NAD", "FinePruning", "FineTuning", "Unlearning"]
