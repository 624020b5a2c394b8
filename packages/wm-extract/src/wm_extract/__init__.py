"""Extract the watermark again: corruptions, the U-Net extractor, joint training, marked or not."""

from wm_extract.__about__ import __version__ as __version__
from wm_extract.corruptions import (
    EXTRA_CORRUPTIONS,
    PAPER_CORRUPTIONS,
    Blur,
    Corruption,
    CropResize,
    GaussianNoise,
    Identity,
    Jpeg,
    RandomCorruption,
    RandomMask,
    Rescale,
    Rotation,
    SaltPepper,
    named_corruption,
)
from wm_extract.detect import (
    Detection,
    MarkDetector,
    balanced_bit_accuracy,
    extract,
    load_detector,
    mark_score,
    save_detector,
)
from wm_extract.export import export_detector
from wm_extract.joint import (
    JointLosses,
    JointResult,
    image_loss,
    map_loss,
    train_jointly,
)
from wm_extract.recipe import JointConfig
from wm_extract.unet import UNetExtractor

__all__ = [
    "EXTRA_CORRUPTIONS",
    "PAPER_CORRUPTIONS",
    "Blur",
    "Corruption",
    "CropResize",
    "Detection",
    "GaussianNoise",
    "Identity",
    "JointConfig",
    "JointLosses",
    "JointResult",
    "Jpeg",
    "MarkDetector",
    "RandomCorruption",
    "RandomMask",
    "Rescale",
    "Rotation",
    "SaltPepper",
    "UNetExtractor",
    "balanced_bit_accuracy",
    "export_detector",
    "extract",
    "image_loss",
    "load_detector",
    "map_loss",
    "mark_score",
    "named_corruption",
    "save_detector",
    "train_jointly",
]
