"""Detection and mitigation by reversed generators, and the detectors and mitigations of others."""

from typing import TYPE_CHECKING

from defense_reverse.__about__ import __version__ as __version__
from wm_inject.core.lazy import lazy_names

if TYPE_CHECKING:
    from defense_reverse.closeness import Closeness as Closeness
    from defense_reverse.closeness import compare_triggers as compare_triggers
    from defense_reverse.config import ReverseConfig as ReverseConfig
    from defense_reverse.detector import ReverseGenerator as ReverseGenerator
    from defense_reverse.detector import detection_case as detection_case
    from defense_reverse.detectors.bti_dbf import BtiDbf as BtiDbf
    from defense_reverse.detectors.bti_losses import BtiDbfConfig as BtiDbfConfig
    from defense_reverse.detectors.feature_losses import FeatureREConfig as FeatureREConfig
    from defense_reverse.detectors.feature_re import FeatureRE as FeatureRE
    from defense_reverse.detectors.feature_re import FeatureTrigger as FeatureTrigger
    from defense_reverse.detectors.head_weights import HeadWeights as HeadWeights
    from defense_reverse.detectors.margin_ascent import MarginAscent as MarginAscent
    from defense_reverse.detectors.pair_perturbation import PairPerturbation as PairPerturbation
    from defense_reverse.detectors.patch_sweep import PatchSweep as PatchSweep
    from defense_reverse.detectors.universal_perturbation import (
        UniversalPerturbation as UniversalPerturbation,
    )
    from defense_reverse.detectors.universal_perturbation import (
        UniversalPicture as UniversalPicture,
    )
    from defense_reverse.detectors.universal_warp import UniversalWarp as UniversalWarp
    from defense_reverse.detectors.universal_warp import WarpField as WarpField
    from defense_reverse.generator import UNetGenerator as UNetGenerator
    from defense_reverse.label_state import LambdaSearch as LambdaSearch
    from defense_reverse.mitigations.anp import ANP as ANP
    from defense_reverse.mitigations.bti_dbf import BtiDbfUnlearning as BtiDbfUnlearning
    from defense_reverse.mitigations.channel_lipschitz import (
        ChannelLipschitzPruning as ChannelLipschitzPruning,
    )
    from defense_reverse.mitigations.feature_shift import FeatureShiftTuning as FeatureShiftTuning
    from defense_reverse.mitigations.fine_pruning import FinePruning as FinePruning
    from defense_reverse.mitigations.fine_tuning import FineTuning as FineTuning
    from defense_reverse.mitigations.ft_sam import FTSAM as FTSAM
    from defense_reverse.mitigations.head_unlearning import HeadUnlearning as HeadUnlearning
    from defense_reverse.mitigations.i_bau import IBAU as IBAU
    from defense_reverse.mitigations.nad import NAD as NAD
    from defense_reverse.reverse import pretrain as pretrain
    from defense_reverse.reverse import reverse_engineer as reverse_engineer
    from defense_reverse.trigger import ReversedTrigger as ReversedTrigger
    from defense_reverse.trigger import load_reversed as load_reversed
    from defense_reverse.trigger import save_reversed as save_reversed
else:
    __getattr__, __dir__, __all__ = lazy_names(__name__)
