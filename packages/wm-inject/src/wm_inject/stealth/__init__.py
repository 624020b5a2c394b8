"""How visible a change is: PSNR, SSIM, largest difference, LPIPS."""

from wm_inject.stealth.metrics import Stealth, compare_folders, linf, psnr, ssim
from wm_inject.stealth.perceptual import Lpips, LpipsUnavailable, find_lpips_weights

__all__ = [
    "Lpips",
    "LpipsUnavailable",
    "Stealth",
    "compare_folders",
    "find_lpips_weights",
    "linf",
    "psnr",
    "ssim",
]
