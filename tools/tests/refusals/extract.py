"""What wm_extract refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tools.tests.refusals.common import IMAGES, SIZE, Call, Table, images
from tools.tests.refusals.inject import checkpoint_files
from torch import Tensor

import wm_extract as we
from wm_inject import default_watermark

MARK = default_watermark(SIZE)
EXTRACTOR = we.UNetExtractor(channels=1, width=1).eval()
MAPS = IMAGES
CONFIG = we.JointConfig(iterations=1)


def corruption(operation: we.Corruption) -> dict[str, Call]:
    generator = torch.Generator().manual_seed(0)
    return images(lambda bad: operation(bad, generator=generator))


def watermark(call: Callable[[Tensor], object]) -> dict[str, Call]:
    """Pictures that are no watermark."""
    return {
        "mark shape": lambda _: call(MARK[0]),
        "mark dtype": lambda _: call(MARK.double()),
        "mark range": lambda _: call(MARK * 2),
        "mark empty": lambda _: call(MARK[:0]),
    }


def train(bad: Tensor, mark: Tensor = MARK) -> object:
    return we.train_jointly(bad, config=CONFIG, watermark=mark, progress=False)


def calibrate(bad: Tensor, rate: float = 0.01, mark: Tensor = MARK) -> object:
    return we.MarkDetector.calibrate(EXTRACTOR, mark, bad, false_positive_rate=rate)


def detector() -> we.MarkDetector:
    return we.MarkDetector(EXTRACTOR, MARK, 0.0, 0.01, 50)


def average(counts: tuple[int, ...] = (1,), **changes: Tensor) -> object:
    names = ("marked", "clean", "seen_marked", "seen_clean")
    groups: dict[str, Any] = {name: IMAGES for name in names} | changes
    return we.attack_by_averaging(
        detector(), groups.pop("marked"), groups.pop("clean"), counts=counts, **groups
    )


def config(**changes: Any) -> Call:
    return lambda _: we.JointConfig(**changes)


MANY = IMAGES.repeat(20, 1, 1, 1)

TABLE = Table(
    module="wm_extract",
    cases={
        "Identity": corruption(we.Identity()),
        "RandomMask": {
            **corruption(we.RandomMask()),
            "mode": lambda _: we.RandomMask("stripe"),  # type: ignore[arg-type]
            "share": lambda _: we.RandomMask(share=1.0),
        },
        "Rotation": {
            **corruption(we.Rotation()),
            "degrees": lambda _: we.Rotation(-1),
        },
        "GaussianNoise": {
            **corruption(we.GaussianNoise()),
            "sigma": lambda _: we.GaussianNoise(-0.1),
        },
        "SaltPepper": {
            **corruption(we.SaltPepper()),
            "density": lambda _: we.SaltPepper(1.1),
        },
        "Rescale": {**corruption(we.Rescale()), "factors": lambda _: we.Rescale(2.0, 0.5)},
        "Jpeg": {**corruption(we.Jpeg()), "quality": lambda _: we.Jpeg(0)},
        "Blur": {**corruption(we.Blur()), "sigma": lambda _: we.Blur(0.0)},
        "CropResize": {
            **corruption(we.CropResize()),
            "share": lambda _: we.CropResize(0.0),
            "most": lambda _: we.CropResize(0.9, most=0.8),
        },
        "Grey": corruption(we.Grey()),
        "RandomCorruption": {
            **corruption(we.RandomCorruption([we.Identity()])),
            "probability": lambda _: we.RandomCorruption([we.Identity()], 1.1),
        },
        "named_corruption": {"name": lambda _: we.named_corruption("nothing")},
        "UNetExtractor": {
            **images(EXTRACTOR),
            "channels": lambda _: we.UNetExtractor(channels=2),
            "width": lambda _: we.UNetExtractor(channels=1, width=0),
            "other channels": lambda _: EXTRACTOR(IMAGES.repeat(1, 3, 1, 1)),
        },
        "extract": {
            **images(lambda bad: we.extract(EXTRACTOR, bad)),
            "train mode": lambda _: we.extract(we.UNetExtractor(channels=1, width=1), IMAGES),
        },
        "balanced_bit_accuracy": {
            **images(lambda bad: we.balanced_bit_accuracy(bad, MARK)),
            **watermark(lambda bad: we.balanced_bit_accuracy(MAPS, bad)),
            "constant mark": lambda _: we.balanced_bit_accuracy(MAPS, MARK * 0),
        },
        "mark_score": {
            **images(lambda bad: we.mark_score(bad, MARK)),
            **watermark(lambda bad: we.mark_score(MAPS, bad)),
            "constant mark": lambda _: we.mark_score(MAPS, MARK * 0 + 1),
        },
        "MarkDetector": {
            **images(lambda bad: detector().detect(bad)),
            **{f"clean {w}": c for w, c in images(calibrate, MANY).items()},
            **watermark(lambda bad: calibrate(MANY, mark=bad)),
            "too few": lambda _: calibrate(IMAGES),
            "rate": lambda _: calibrate(MANY, rate=0.5),
        },
        "attack_by_averaging": {
            **images(lambda bad: average(marked=bad)),
            **{f"seen {w}": c for w, c in images(lambda bad: average(seen_clean=bad)).items()},
            "counts": lambda _: average(counts=(len(IMAGES) + 1,)),
        },
        "save_detector": {
            "nan": lambda tmp: we.save_detector(
                we.MarkDetector(EXTRACTOR, MARK * float("nan"), 0.0, 0.01, 50), tmp / "d"
            ),
        },
        "load_detector": checkpoint_files(we.load_detector),
        "export_detector": {
            **images(lambda bad: we.export_detector(detector(), bad, Path("never.onnx"))),
            "no detector": lambda tmp: we.export_detector(MARK, IMAGES, tmp / "d.onnx"),  # type: ignore[arg-type]
            "suffix": lambda tmp: we.export_detector(detector(), IMAGES, tmp / "d.bin"),
        },
        "JointConfig": {
            "size": config(size="huge"),
            "optimizer": config(optimizer="nothing"),
            "precision": config(precision="float16"),
            "iterations": config(iterations=0),
            "lr": config(lr=-1.0),
            "max_change": config(max_change=0.0),
            "corruption_probability": config(corruption_probability=2.0),
            "weights": config(mark_weight=-1.0),
            "depth": config(depth=0),
            "psnr_floor": config(psnr_floor=-1.0),
            "preset": lambda _: we.JointConfig.preset("secret"),
            "preset field": lambda _: we.JointConfig.preset("paper", colour=1),
        },
        "train_jointly": {
            **images(train),
            **watermark(lambda bad: train(IMAGES, bad)),
            "not square": lambda _: train(IMAGES[..., :-1]),
        },
        "image_loss": {
            "shape": lambda _: we.image_loss(IMAGES[0], IMAGES[0]),
            "empty": lambda _: we.image_loss(IMAGES[:0], IMAGES[:0]),
            "two shapes": lambda _: we.image_loss(IMAGES, IMAGES[:1]),
        },
        "map_loss": {
            "shape": lambda _: we.map_loss([MAPS], MARK[..., :-1]),
            "empty": lambda _: we.map_loss([], MARK),
        },
    },
    partly={
        "image_loss": "a term of the training loss: marked images may leave [0, 1] on the way",
        "map_loss": "a term of the training loss: takes logits, which have no range",
    },
)
