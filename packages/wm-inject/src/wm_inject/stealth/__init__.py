"""How visible a change is (PSNR, SSIM, LPIPS), and how much it depends on the image."""

from wm_inject.stealth.dependence import (
    COMPARED,
    Dependence,
    comparable_changes,
    image_dependence,
)
from wm_inject.stealth.metrics import Stealth, compare_folders, linf, psnr, ssim
from wm_inject.stealth.perceptual import Lpips, LpipsUnavailable, find_lpips_weights

__all__ = [
    "COMPARED",
    "Dependence",
    "Lpips",
    "LpipsUnavailable",
    "Stealth",
    "comparable_changes",
    "compare_folders",
    "find_lpips_weights",
    "image_dependence",
    "linf",
    "psnr",
    "ssim",
]
