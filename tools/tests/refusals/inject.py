"""What wm_inject refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from tools.tests.refusals.common import IMAGES, LABELS, SIZE, Call, Table, images, labels, write
from torch import nn

import wm_inject as wm
from wm_inject.core.plan import poison

PATCH = wm.BadNetsTrigger(image_size=SIZE)
PLAN = wm.PoisonPlan(ratio=0.5)
TINY: dict[str, Any] = {"image_size": SIZE, "channels": 1}
MARKSMAN = wm.MarksmanTrigger(**TINY, num_classes=3, width=2)
PIXELS: Any = np.zeros((4, SIZE, SIZE, 3), np.uint8)
SHAPE: dict[str, Any] = {"image_size": SIZE, "channels": 1, "patch_size": 4, "width": 8, "heads": 1}
INJECTOR = wm.ViTInjector(**SHAPE, depth=1, decoder_depth=1)
MARK = wm.default_watermark(SIZE)
GREY: Any = PIXELS[..., :1]
FLOATS: Any = IMAGES.numpy()
NAN = {"w": torch.tensor([float("nan")])}
IDS = torch.arange(4)
CONTEXT: dict[str, Any] = {
    "images": IMAGES,
    "labels": LABELS,
    "num_classes": 3,
    "target": 0,
    "seed": 0,
    "co_train": lambda hook: nn.Identity(),
}


def pixels(call: Callable[[Any], object], good: Any = PIXELS) -> dict[str, Call]:
    """The four kinds for stored pixels. Every uint8 is in range, so a wider type stands for it."""
    return {
        "shape": lambda _: call(good[0]),
        "dtype": lambda _: call(good.astype(np.float32)),
        "range": lambda _: call(good.astype(np.int16) - 1),
        "empty": lambda _: call(good[:0]),
        "channels": lambda _: call(good.repeat(2, axis=-1)),
        "type": lambda _: call(good.tolist()),
    }


@cache
def exported(uint8: bool) -> bytes:
    """A small exported trigger."""
    with TemporaryDirectory() as folder:
        wm.to_onnx(PATCH, IMAGES, Path(folder, "patch.onnx"), uint8=uint8)
        return Path(folder, "patch.onnx").read_bytes()


def onnx(tmp: Path, *, uint8: bool = False) -> Path:
    return write(tmp / "patch.onnx", exported(uint8))


class Bright(nn.Module):
    """A detector of light: a score and a map."""

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return images.mean(dim=(1, 2, 3)), images


@cache
def exported_detector() -> bytes:
    with TemporaryDirectory() as folder:
        path = Path(folder, "light.onnx")
        metadata = {"detector": {"threshold": 0.5, "false_positive_rate": 0.01}}
        names = ("score", "map")
        wm.to_onnx(Bright(), IMAGES, path, uint8=True, output_names=names, metadata=metadata)
        return path.read_bytes()


def detector(tmp: Path) -> Path:
    return write(tmp / "light.onnx", exported_detector())


def judges(build: Callable[[Path], Any]) -> dict[str, Call]:
    """Stored images that are none."""
    return {
        "shape": lambda tmp: build(tmp)(GREY[:, :-1]),
        "dtype": lambda tmp: build(tmp)(GREY.astype(np.float32)),
        "range": lambda tmp: build(tmp)(GREY.astype(np.int16) - 1),
        "empty": lambda tmp: build(tmp)(GREY[:0]),
    }


def model_files(call: Callable[[Path], object]) -> dict[str, Call]:
    """Files that are no ONNX models."""
    return {
        "no file": lambda tmp: call(tmp / "missing.onnx"),
        "a folder": lambda tmp: call(tmp),
        "no model": lambda tmp: call(write(tmp / "text.onnx")),
    }


def checkpoint_files(call: Callable[[Path], object]) -> dict[str, Call]:
    """Files that are no checkpoints, pickles among them, or another kind's."""

    def pickled(tmp: Path) -> Path:
        torch.save({"w": torch.zeros(1)}, tmp / "weights.pt")
        return tmp / "weights.pt"

    def other(tmp: Path) -> Path:
        wm.save_checkpoint(tmp / "other.safetensors", kind="other", config={}, state={})
        return tmp / "other.safetensors"

    def damaged(tmp: Path) -> Path:
        content = bytearray(other(tmp).read_bytes())
        return write(tmp / "short.safetensors", bytes(content[: len(content) // 2]))

    return {
        "no file": lambda tmp: call(tmp / "missing.safetensors"),
        "a folder": lambda tmp: call(tmp),
        "no checkpoint": lambda tmp: call(write(tmp / "text.safetensors")),
        "a pickle": lambda tmp: call(pickled(tmp)),
        "another kind": lambda tmp: call(other(tmp)),
        "damaged": lambda tmp: call(damaged(tmp)),
    }


def folder(tmp: Path, name: str = "in") -> Path:
    """A folder with one image."""
    (tmp / name).mkdir()
    wm.save_image(tmp / name / "a.png", PIXELS[0])
    return tmp / name


def loaded_elsewhere(tmp: Path) -> object:
    wm.save_trigger(PATCH, tmp / "patch.safetensors")
    return wm.load_checkpoint(tmp / "patch.safetensors", kind="classifier")


TABLE = Table(
    module="wm_inject",
    cases={
        "check_images": {
            **images(wm.check_images),
            "channels": lambda _: wm.check_images(IMAGES, channels=3),
            "size": lambda _: wm.check_images(IMAGES, size=(9, 9)),
            "two channels": lambda _: wm.check_images(IMAGES.repeat(1, 2, 1, 1)),
        },
        "check_labels": {
            "shape": lambda _: wm.check_labels(LABELS, 3),
            "dtype": lambda _: wm.check_labels(LABELS.int(), 4),
            "range": lambda _: wm.check_labels(LABELS, 4, num_classes=2),
            "empty": lambda _: wm.check_labels(LABELS[:0], 0),
        },
        "check_pixels": pixels(wm.check_pixels),
        "to_float": pixels(wm.to_float),
        "to_pixels": images(wm.to_pixels),
        "quantize": {
            "shape": lambda _: wm.quantize(IMAGES[0]),
            "dtype": lambda _: wm.quantize(IMAGES.long()),
            "empty": lambda _: wm.quantize(IMAGES[:0]),
        },
        "load_image": {
            "no file": lambda tmp: wm.load_image(tmp / "missing.png"),
            "no image": lambda tmp: wm.load_image(write(tmp / "text.png")),
            "channels": lambda tmp: wm.load_image(folder(tmp) / "a.png", channels=2),
            "size": lambda tmp: wm.load_image(folder(tmp) / "a.png", size=0),
        },
        "save_image": {
            "shape": lambda tmp: wm.save_image(tmp / "a.png", PIXELS),
            "dtype": lambda tmp: wm.save_image(tmp / "a.png", PIXELS[0].astype(np.float32)),
            "range": lambda tmp: wm.save_image(tmp / "a.png", PIXELS[0].astype(np.int16) - 1),
            "empty": lambda tmp: wm.save_image(tmp / "a.png", PIXELS[0, :0]),
        },
        "list_images": {
            "no folder": lambda tmp: wm.list_images(tmp / "missing"),
            "no images": lambda tmp: wm.list_images(tmp),
        },
        "psnr": {
            **images(lambda bad: wm.psnr(bad, IMAGES)),
            "reference shape": lambda _: wm.psnr(IMAGES, IMAGES[:1]),
            "data_range": lambda _: wm.psnr(IMAGES, IMAGES, data_range=0.0),
        },
        "ssim": {
            **images(lambda bad: wm.ssim(bad, IMAGES)),
            "reference shape": lambda _: wm.ssim(IMAGES, IMAGES[:1]),
        },
        "linf": {
            **images(lambda bad: wm.linf(bad, IMAGES)),
            "reference shape": lambda _: wm.linf(IMAGES, IMAGES[:1]),
        },
        "BadNetsTrigger": {
            **images(PATCH),
            "image_size": lambda _: wm.BadNetsTrigger(image_size=0),
            "size": lambda _: wm.BadNetsTrigger(image_size=SIZE, size=SIZE + 1),
            "value": lambda _: wm.BadNetsTrigger(image_size=SIZE, value=1.5),
        },
        "BlendTrigger": {
            **images(wm.BlendTrigger(image_size=SIZE, channels=1)),
            "alpha": lambda _: wm.BlendTrigger(image_size=SIZE, channels=1, alpha=2.0),
            "channels": lambda _: wm.BlendTrigger(image_size=SIZE, channels=2),
            "picture": lambda _: wm.BlendTrigger(image_size=SIZE, channels=1, picture=IMAGES),
        },
        "BppTrigger": {
            **images(wm.BppTrigger(image_size=SIZE)),
            "levels": lambda _: wm.BppTrigger(image_size=SIZE, levels=1),
        },
        "WaNetTrigger": {
            **images(wm.WaNetTrigger(image_size=SIZE)),
            "grid": lambda _: wm.WaNetTrigger(image_size=SIZE, grid=1),
            "strength": lambda _: wm.WaNetTrigger(image_size=SIZE, strength=-1.0),
            "static plan": lambda _: wm.WaNetTrigger(image_size=SIZE).noise_hook(
                PLAN, num_classes=3
            ),
        },
        "RefoolTrigger": {
            **images(lambda bad: wm.RefoolTrigger(**TINY, count=2)(bad, ids=IDS)),
            "no ids": lambda _: wm.RefoolTrigger(**TINY, count=2)(IMAGES),
            "alpha": lambda _: wm.RefoolTrigger(**TINY, alpha=2.0),
            "ghost_rate": lambda _: wm.RefoolTrigger(**TINY, ghost_rate=-1.0),
            "count": lambda _: wm.RefoolTrigger(**TINY, count=0),
            "reflections": lambda tmp: wm.RefoolTrigger(**TINY, reflections=str(tmp / "none")),
        },
        "BlindNetTrigger": {
            **images(wm.BlindNetTrigger(**TINY)),
            "band": lambda _: wm.BlindNetTrigger(**TINY, band=(0.4, 0.3)),
            "strength": lambda _: wm.BlindNetTrigger(**TINY, strength=-1.0),
            "watermark": lambda tmp: wm.BlindNetTrigger(**TINY, watermark=str(tmp / "none")),
        },
        "SsbaTrigger": {
            **images(wm.SsbaTrigger(**TINY, bits=4, width=4)),
            "bits": lambda _: wm.SsbaTrigger(**TINY, bits=0),
            "width": lambda _: wm.SsbaTrigger(**TINY, width=0),
        },
        "SigTrigger": {
            **images(wm.SigTrigger(image_size=SIZE)),
            "amplitude": lambda _: wm.SigTrigger(image_size=SIZE, amplitude=-1.0),
            "frequency": lambda _: wm.SigTrigger(image_size=SIZE, frequency=0),
        },
        "FTrojanTrigger": {
            **images(wm.FTrojanTrigger(**TINY)),
            "magnitude": lambda _: wm.FTrojanTrigger(**TINY, magnitude=-1.0),
            "block": lambda _: wm.FTrojanTrigger(**TINY, block=0),
        },
        "LfTrigger": {
            **images(wm.LfTrigger(**TINY)),
            "limit": lambda _: wm.LfTrigger(**TINY, limit=2.0),
        },
        "MarksmanTrigger": {
            **images(lambda bad: MARKSMAN(bad, target=LABELS)),
            **labels(lambda bad: MARKSMAN(IMAGES, target=bad)),
            "no target": lambda _: MARKSMAN(IMAGES),
            "epsilon": lambda _: wm.MarksmanTrigger(**TINY, num_classes=3, epsilon=-1.0),
            "num_classes": lambda _: wm.MarksmanTrigger(**TINY, num_classes=1),
        },
        "InputAwareTrigger": {
            **images(wm.InputAwareTrigger(**TINY, width=4)),
            "width": lambda _: wm.InputAwareTrigger(**TINY, width=0),
            "density": lambda _: wm.InputAwareTrigger(**TINY, density=2.0),
        },
        "Attack": {
            "profile": lambda _: replace(wm.attack("badnets"), profile="huge"),  # type: ignore[arg-type]
            "settings": lambda _: wm.attack("badnets", colour=1).fit(wm.FitContext(**CONTEXT)),
            "fitted elsewhere": lambda _: wm.ATTACKS["watermark"].fit(wm.FitContext(**CONTEXT)),
            "ratio": lambda _: wm.attack("badnets").plan(LABELS, target=0, ratio=2.0),
            "no target class": lambda _: wm.attack("sig").plan(LABELS, target=7),
            "another's trigger": lambda _: wm.attack("wanet").hook(
                PATCH, wm.PoisonPlan(mode="per_batch"), num_classes=3
            ),
        },
        "attack": {
            "name": lambda _: wm.attack("watermark"),
            "profile": lambda _: wm.attack("badnets", profile="huge"),  # type: ignore[arg-type]
        },
        "FitContext": {
            **images(lambda bad: wm.FitContext(**{**CONTEXT, "images": bad})),
            **labels(lambda bad: wm.FitContext(**{**CONTEXT, "labels": bad})),
            "target": lambda _: wm.FitContext(**{**CONTEXT, "target": 3}),
            "not square": lambda _: wm.FitContext(**{**CONTEXT, "images": IMAGES[..., :-1]}),
        },
        "WatermarkTrigger": {
            **images(wm.WatermarkTrigger(INJECTOR)),
            "strength": lambda _: wm.WatermarkTrigger(INJECTOR, strength=-1.0),
            "watermark": lambda _: wm.WatermarkTrigger(INJECTOR, watermark=MARK[:, :-1]),
            "no injector": lambda _: wm.WatermarkTrigger(),
        },
        "build_trigger": {
            "kind": lambda _: wm.build_trigger("nothing", {}),
            "settings": lambda _: wm.build_trigger("badnets", {"colour": 1}),
            "state": lambda _: wm.build_trigger("badnets", PATCH.config, state=NAN),
        },
        "save_trigger": {
            "another module": lambda tmp: wm.save_trigger(nn.Identity(), tmp / "t.safetensors"),
            "metadata": lambda tmp: wm.save_trigger(
                PATCH, tmp / "t.safetensors", {"when": object()}
            ),
        },
        "load_trigger": checkpoint_files(wm.load_trigger),
        "pretrained_card": {"name": lambda _: wm.pretrained_card("huge")},
        "save_checkpoint": {
            "nan": lambda tmp: wm.save_checkpoint(tmp / "c", kind="x", config={}, state=NAN),
            "kind": lambda tmp: wm.save_checkpoint(tmp / "c", kind="", config={}, state={}),
            "config": lambda tmp: wm.save_checkpoint(
                tmp / "c", kind="x", config={"f": print}, state={}
            ),
            "state": lambda tmp: wm.save_checkpoint(
                tmp / "c",
                kind="x",
                config={},
                state={"w": [1.0]},  # type: ignore[dict-item]
            ),
        },
        "load_checkpoint": {
            **checkpoint_files(lambda path: wm.load_checkpoint(path, kind="badnets")),
            "another kind of ours": loaded_elsewhere,
            "too large": lambda tmp: wm.load_checkpoint(write(tmp / "big"), max_bytes=3),
        },
        "to_torchscript": {
            **images(lambda bad: wm.to_torchscript(PATCH, bad, Path("never.pt"))),
            "too few": lambda tmp: wm.to_torchscript(PATCH, IMAGES[:2], tmp / "m.pt"),
            "tolerance": lambda tmp: wm.to_torchscript(PATCH, IMAGES, tmp / "m.pt", tolerance=0),
            "module": lambda tmp: wm.to_torchscript(print, IMAGES, tmp / "m.pt"),  # type: ignore[arg-type]
        },
        "to_onnx": {
            **images(lambda bad: wm.to_onnx(PATCH, bad, Path("never.onnx"))),
            "too few": lambda tmp: wm.to_onnx(PATCH, IMAGES[:2], tmp / "m.onnx"),
            "tolerance": lambda tmp: wm.to_onnx(PATCH, IMAGES, tmp / "m.onnx", tolerance=-1.0),
            "module": lambda tmp: wm.to_onnx(print, IMAGES, tmp / "m.onnx"),  # type: ignore[arg-type]
            "precision": lambda tmp: wm.to_onnx(
                PATCH,
                IMAGES,
                tmp / "m.onnx",
                precision="float8",  # type: ignore[arg-type]
            ),
            "output_names": lambda tmp: wm.to_onnx(
                PATCH, IMAGES, tmp / "m.onnx", output_names=("a", "b")
            ),
        },
        "OnnxModel": {
            "shape": lambda tmp: wm.OnnxModel(onnx(tmp))(FLOATS[..., :-1]),
            "dtype": lambda tmp: wm.OnnxModel(onnx(tmp))(FLOATS.astype(np.float64)),
            "range": lambda tmp: wm.OnnxModel(onnx(tmp, uint8=True))(GREY.astype(np.int16) - 1),
            "empty": lambda tmp: wm.OnnxModel(onnx(tmp))(FLOATS[:0]),
            "type": lambda tmp: wm.OnnxModel(onnx(tmp))(FLOATS.tolist()),
            **model_files(wm.OnnxModel),
            "threads": lambda tmp: wm.OnnxModel(write(tmp / "m"), threads=0),
        },
        "Poisoner": {
            "shape": lambda tmp: wm.Poisoner(onnx(tmp))(GREY[:, :-1]),
            "dtype": lambda tmp: wm.Poisoner(onnx(tmp))(GREY.astype(np.float32)),
            "range": lambda tmp: wm.Poisoner(onnx(tmp))(GREY.astype(np.int16) - 1),
            "empty": lambda tmp: wm.Poisoner(onnx(tmp))(GREY[:0]),
            "other channels": lambda tmp: wm.Poisoner(onnx(tmp))(PIXELS),
            **model_files(wm.Poisoner),
        },
        "fast_trigger": {
            **images(lambda bad: wm.fast_trigger(wm.WatermarkTrigger(INJECTOR))(bad)),
            "no watermark": lambda _: wm.fast_trigger(PATCH),  # type: ignore[arg-type]
            "precision": lambda _: wm.fast_trigger(
                wm.WatermarkTrigger(INJECTOR),
                precision="float16",  # type: ignore[arg-type]
            ),
            "compile on a CPU": lambda _: wm.fast_trigger(
                wm.WatermarkTrigger(INJECTOR), compile=True
            ),
        },
        "Extractor": {
            **judges(lambda tmp: wm.Extractor(detector(tmp))),
            **model_files(wm.Extractor),
            "no detector": lambda tmp: wm.Extractor(onnx(tmp)),
        },
        "Scanner": {
            **judges(lambda tmp: wm.Scanner(detector(tmp))),
            **model_files(wm.Scanner),
            "no detector": lambda tmp: wm.Scanner(onnx(tmp)),
            "nothing": lambda _: wm.Scanner(),
        },
        "poison_folder": {
            **model_files(lambda path: wm.poison_folder(path, path.parent, path.parent / "out")),
            "no images": lambda tmp: wm.poison_folder(onnx(tmp), tmp, tmp.parent / "out"),
            "batch_size": lambda tmp: wm.poison_folder(
                onnx(tmp), folder(tmp), tmp / "out", batch_size=0
            ),
            "out inside": lambda tmp: wm.poison_folder(onnx(tmp), folder(tmp), tmp / "in" / "out"),
        },
        "PoisonPlan": {
            "ratio": lambda _: wm.PoisonPlan(ratio=0.0),
            "ratio above 1": lambda _: wm.PoisonPlan(ratio=1.5),
            "target": lambda _: wm.PoisonPlan(target=-1),
            "label_map": lambda _: wm.PoisonPlan(label_map="nothing"),  # type: ignore[arg-type]
            "pool": lambda _: wm.PoisonPlan(pool="target"),
            "mode": lambda _: wm.PoisonPlan(mode="nothing"),  # type: ignore[arg-type]
            "target class": lambda _: wm.PoisonPlan(target=9).relabel(LABELS, 3),
            "pool too small": lambda _: wm.PoisonPlan(
                ratio=1.0, pool="target", target=0, label_map="clean-label"
            ).choose(LABELS),
            "labels shape": lambda _: PLAN.choose(LABELS[None]),
            **{k: c for k, c in labels(PLAN.choose).items() if k != "labels shape"},
        },
        "poison": {
            **images(lambda bad: poison(bad, LABELS, PATCH, PLAN, num_classes=3)),
            **labels(lambda bad: poison(IMAGES, bad, PATCH, PLAN, num_classes=3)),
            "label above K": lambda _: poison(IMAGES, LABELS, PATCH, PLAN, num_classes=2),
            "plan": lambda _: poison(
                IMAGES, LABELS, PATCH, wm.PoisonPlan(mode="per_batch"), num_classes=3
            ),
        },
        "vit_config": {
            "size": lambda _: wm.vit_config("huge", image_size=SIZE, channels=1),
            "recipe": lambda _: wm.vit_config("tiny", image_size=SIZE, channels=1, recipe="secret"),
        },
        "ViTInjector": {
            "channels": lambda _: wm.ViTInjector(**{**SHAPE, "channels": 2}),
            "heads": lambda _: wm.ViTInjector(**{**SHAPE, "heads": 3}),
            "image_size": lambda _: wm.ViTInjector(**{**SHAPE, "image_size": 0}),
            "patch_size": lambda _: wm.ViTInjector(**{**SHAPE, "patch_size": 5}),
            "MAE weights": lambda _: INJECTOR.load_mae_encoder(NAN),
        },
        "default_watermark": {"size": lambda _: wm.default_watermark(7)},
        "Lpips": {
            "not its state": lambda tmp: wm.Lpips(write(tmp / "lpips_alex.safetensors")),
        },
    },
    nothing={
        "list_attacks": "takes no arguments",
        "find_lpips_weights": "takes nothing: it looks where the environment says",
    },
    partly={
        "quantize": "values outside [0, 1] are what it is there to clip",
        "save_checkpoint": "weights have any shape, dtype and range; only finite ones are taken",
        "ViTInjector": "a layer of the training graph; WatermarkTrigger is the border that checks",
        "Lpips": "wants trained weights, which do not ship; wm-inject's own tests check its calls",
    },
)
