"""Extract the watermark again: corruptions, the U-Net extractor, joint training, marked or not."""

from typing import TYPE_CHECKING

from wm_extract.__about__ import __version__ as __version__
from wm_inject.core.lazy import lazy_names

if TYPE_CHECKING:
    from wm_extract.averaging import Averaged as Averaged
    from wm_extract.averaging import attack_by_averaging as attack_by_averaging
    from wm_extract.corruptions import EXTRA_CORRUPTIONS as EXTRA_CORRUPTIONS
    from wm_extract.corruptions import PAPER_CORRUPTIONS as PAPER_CORRUPTIONS
    from wm_extract.corruptions import Blur as Blur
    from wm_extract.corruptions import Corruption as Corruption
    from wm_extract.corruptions import CropResize as CropResize
    from wm_extract.corruptions import GaussianNoise as GaussianNoise
    from wm_extract.corruptions import Grey as Grey
    from wm_extract.corruptions import Identity as Identity
    from wm_extract.corruptions import Jpeg as Jpeg
    from wm_extract.corruptions import RandomCorruption as RandomCorruption
    from wm_extract.corruptions import RandomMask as RandomMask
    from wm_extract.corruptions import Rescale as Rescale
    from wm_extract.corruptions import Rotation as Rotation
    from wm_extract.corruptions import SaltPepper as SaltPepper
    from wm_extract.corruptions import named_corruption as named_corruption
    from wm_extract.detect import Detection as Detection
    from wm_extract.detect import MarkDetector as MarkDetector
    from wm_extract.detect import balanced_bit_accuracy as balanced_bit_accuracy
    from wm_extract.detect import extract as extract
    from wm_extract.detect import load_detector as load_detector
    from wm_extract.detect import mark_score as mark_score
    from wm_extract.detect import save_detector as save_detector
    from wm_extract.export import export_detector as export_detector
    from wm_extract.joint import JointLosses as JointLosses
    from wm_extract.joint import JointResult as JointResult
    from wm_extract.joint import image_loss as image_loss
    from wm_extract.joint import map_loss as map_loss
    from wm_extract.joint import train_jointly as train_jointly
    from wm_extract.joint_config import JointConfig as JointConfig
    from wm_extract.unet import UNetExtractor as UNetExtractor
else:
    __getattr__, __dir__, __all__ = lazy_names(__name__)
