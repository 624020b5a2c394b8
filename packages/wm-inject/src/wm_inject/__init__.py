"""Plant an invisible watermark in images: triggers, plans, stealth metrics, export, runtime."""

from typing import TYPE_CHECKING

from wm_inject.__about__ import __version__ as __version__
from wm_inject.core.lazy import lazy_names
from wm_inject.core.telemetry import disable_telemetry as _disable_telemetry

_disable_telemetry()  # here, since all six packages import this one before anything else

if TYPE_CHECKING:
    from wm_inject.attacks import ATTACKS as ATTACKS
    from wm_inject.attacks import Attack as Attack
    from wm_inject.attacks import FitContext as FitContext
    from wm_inject.attacks import attack as attack
    from wm_inject.attacks import list_attacks as list_attacks
    from wm_inject.attacks.badnets import BadNetsTrigger as BadNetsTrigger
    from wm_inject.attacks.blend import BlendTrigger as BlendTrigger
    from wm_inject.attacks.blindnet import BlindNetTrigger as BlindNetTrigger
    from wm_inject.attacks.bpp import BppTrigger as BppTrigger
    from wm_inject.attacks.ftrojan import FTrojanTrigger as FTrojanTrigger
    from wm_inject.attacks.input_aware import InputAwareTrigger as InputAwareTrigger
    from wm_inject.attacks.lf import LfTrigger as LfTrigger
    from wm_inject.attacks.marksman import MarksmanTrigger as MarksmanTrigger
    from wm_inject.attacks.refool import RefoolTrigger as RefoolTrigger
    from wm_inject.attacks.sig import SigTrigger as SigTrigger
    from wm_inject.attacks.ssba import SsbaTrigger as SsbaTrigger
    from wm_inject.attacks.trigger_file import build_trigger as build_trigger
    from wm_inject.attacks.trigger_file import load_trigger as load_trigger
    from wm_inject.attacks.trigger_file import save_trigger as save_trigger
    from wm_inject.attacks.wanet import WaNetTrigger as WaNetTrigger
    from wm_inject.attacks.watermark import WatermarkTrigger as WatermarkTrigger
    from wm_inject.core.checkpoint import Checkpoint as Checkpoint
    from wm_inject.core.checkpoint import CheckpointError as CheckpointError
    from wm_inject.core.checkpoint import load_checkpoint as load_checkpoint
    from wm_inject.core.checkpoint import save_checkpoint as save_checkpoint
    from wm_inject.core.images import check_images as check_images
    from wm_inject.core.images import check_labels as check_labels
    from wm_inject.core.images import check_pixels as check_pixels
    from wm_inject.core.images import list_images as list_images
    from wm_inject.core.images import load_image as load_image
    from wm_inject.core.images import quantize as quantize
    from wm_inject.core.images import save_image as save_image
    from wm_inject.core.images import to_float as to_float
    from wm_inject.core.images import to_pixels as to_pixels
    from wm_inject.core.plan import CoTraining as CoTraining
    from wm_inject.core.plan import Poisoned as Poisoned
    from wm_inject.core.plan import PoisonPlan as PoisonPlan
    from wm_inject.core.plan import Trigger as Trigger
    from wm_inject.core.plan import poison as poison
    from wm_inject.export import Parity as Parity
    from wm_inject.export import ParityError as ParityError
    from wm_inject.export import to_onnx as to_onnx
    from wm_inject.export import to_torchscript as to_torchscript
    from wm_inject.runtime import Extractor as Extractor
    from wm_inject.runtime import OnnxModel as OnnxModel
    from wm_inject.runtime import Poisoner as Poisoner
    from wm_inject.runtime import Scanner as Scanner
    from wm_inject.runtime import poison_folder as poison_folder
    from wm_inject.stealth import Lpips as Lpips
    from wm_inject.stealth import LpipsUnavailable as LpipsUnavailable
    from wm_inject.stealth import find_lpips_weights as find_lpips_weights
    from wm_inject.stealth import linf as linf
    from wm_inject.stealth import psnr as psnr
    from wm_inject.stealth import ssim as ssim
    from wm_inject.watermark.fast import fast_trigger as fast_trigger
    from wm_inject.watermark.picture import default_watermark as default_watermark
    from wm_inject.watermark.pretrained import PRETRAINED as PRETRAINED
    from wm_inject.watermark.pretrained import pretrained_card as pretrained_card
    from wm_inject.watermark.vit import ViTInjector as ViTInjector
    from wm_inject.watermark.vit import vit_config as vit_config
else:
    __getattr__, __dir__, __all__ = lazy_names(__name__)
