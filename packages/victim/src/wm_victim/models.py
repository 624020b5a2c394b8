"""Classifiers by name: images in [0, 1] to logits, with the normalisation inside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wm_inject.core.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from wm_inject.core.checks import check_channels
from wm_inject.core.randomness import seeded
from wm_victim.airbench import AirbenchBody
from wm_victim.imagenet_weights import imagenet_weights, load_imagenet_weights
from wm_victim.mnist_net import MnistNetBody
from wm_victim.mobilenet import MobileNetBody
from wm_victim.resnet import Form, ResNetBody
from wm_victim.train_config import CLASSIFIERS as CLASSIFIERS
from wm_victim.vgg import VggBody

_RESNETS: dict[str, tuple[Form, tuple[int, ...]]] = {
    "resnet18": ("post", (2, 2, 2, 2)),
    "preactresnet18": ("pre", (2, 2, 2, 2)),
    "resnet10": ("post", (1, 1, 1, 1)),
    "preactresnet10": ("pre", (1, 1, 1, 1)),
}

# Mean and standard deviation per channel, as WaNet and BackdoorBench use them.
DATASET_STATS: Mapping[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)),
    "gtsrb": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "mnist": ((0.5,), (0.5,)),
    "fashion-mnist": ((0.5,), (0.5,)),
    "digits": ((0.5,), (0.5,)),
}
_BY_CHANNELS = {1: DATASET_STATS["mnist"], 3: DATASET_STATS["cifar10"]}


class Normalize(nn.Module):
    """Subtract a mean and divide by a positive standard deviation, channel by channel."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if not mean or len(mean) != len(std):
            raise ValueError(f"expected as many means as deviations, got {mean} and {std}")
        if not all(0 < value < float("inf") for value in std):
            raise ValueError(f"expected positive standard deviations, got {std}")
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Images to normalised images."""
        return (images - self.mean) / self.std


class Classifier(nn.Module):
    """Normalisation, a body and a linear head; ``config`` has arguments of `build_classifier`."""

    def __init__(
        self, *, normalize: nn.Module, body: nn.Module, head: nn.Module, config: Mapping[str, Any]
    ) -> None:
        super().__init__()
        self.normalize, self.body, self.head = normalize, body, head
        self.config = dict(config)

    def features(self, images: Tensor) -> Tensor:
        """Images to the features ``(N, F)`` that the head reads."""
        y: Tensor = self.body(self.normalize(images))
        return y

    def forward(self, images: Tensor) -> Tensor:
        """Images to logits."""
        y: Tensor = self.head(self.features(images))
        return y


def build_classifier(
    name: str,
    *,
    num_classes: int,
    channels: int,
    image_size: int,
    width: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seed: int = 0,
) -> Classifier:
    """Build a classifier with fresh weights.

    Args:
        name: "resnet18", "preactresnet18", "resnet10", "preactresnet10" (one block a stage),
            "vgg16", "mobilenetv2" (all in their 32-pixel forms), "wanet-mnist", "airbench" (its
            first layer is set from the training images), "timm:NAME" for a model of timm's own
            list, or "imagenet:NAME" for one with the weights of `IMAGENET_WEIGHTS`.
        num_classes: K, at least 2.
        channels: 1 or 3.
        image_size: H = W, in pixels, 8 .. 1024 (airbench takes 25, vgg16 28 and more).
        width: Channels of the first stage, 8 .. 512; 64, as published, if None. Not for timm.
        mean: Per channel, of images in [0, 1]; if None that of the weights from ImageNet, or else
            MNIST's or CIFAR-10's, by ``channels``.
        std: Likewise.
        seed: Of the fresh weights. The global random state is not changed.

    Returns:
        The classifier in train mode.
    """
    _check_range("num_classes", num_classes, 2, 100_000)
    _check_range("image_size", image_size, 8, 1024)
    check_channels(channels)
    default_mean, default_std = _BY_CHANNELS[channels]
    trained = name.removeprefix("imagenet:") if name.startswith("imagenet:") else None
    if trained is not None:  # the name that is kept builds the network, without those weights
        name, weights = f"timm:{trained}", imagenet_weights(trained)
        default_mean, default_std = weights.mean, weights.std
        if channels != len(weights.mean):
            raise ValueError(f"expected colour images for imagenet:{trained}, got grey ones")
    mean, std = tuple(mean or default_mean), tuple(std or default_std)
    if len(mean) != channels or len(std) != channels:
        raise ValueError(f"expected {channels} means and deviations, got {mean} and {std}")
    normalize = Normalize(mean, std)
    if width is not None:
        _check_range("width", width, 8, 512)
    elif not name.startswith("timm:"):
        width = 64
    with seeded(seed):
        body, num_features = _body(name, channels=channels, image_size=image_size, width=width)
        head = nn.Linear(num_features, num_classes)
    if trained is not None:
        load_imagenet_weights(body, trained)
    config = {
        "name": name,
        "num_classes": num_classes,
        "channels": channels,
        "image_size": image_size,
        "width": width,
        "mean": list(mean),
        "std": list(std),
    }
    return Classifier(normalize=normalize, body=body, head=head, config=config)


def save_classifier(
    model: nn.Module, path: str | Path, metadata: Mapping[str, Any] | None = None
) -> None:
    """Write a model of `build_classifier` to a safetensors file, atomically.

    ``metadata`` is recorded beside the weights (JSON types): data, training, seed.

    Raises:
        ValueError: Another model, or weights that are NaN or infinite.
    """
    config = getattr(model, "config", None)
    if not isinstance(model, Classifier) or not isinstance(config, dict):
        raise ValueError(f"expected a model of build_classifier, got {type(model).__name__}")
    save_checkpoint(
        path, kind="classifier", config=config, state=model.state_dict(), metadata=metadata
    )


def load_classifier(path: str | Path) -> Classifier:
    """Read a file of `save_classifier`, to the CPU and eval mode; nothing in it is executed.

    Raises:
        CheckpointError: Not such a file, damaged, or weights that do not fit its config.
    """
    saved = load_checkpoint(path, kind="classifier")
    try:
        model = build_classifier(**saved.config)
        model.load_state_dict(saved.state)
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        first_line = str(error).splitlines()[0]
        raise CheckpointError(f"{Path(path).name} is no classifier: {first_line}") from error
    return model.eval()


def _check_range(name: str, value: int, low: int, high: int) -> None:
    if not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"expected {name} in {low} .. {high}, got {value}")


def _body(name: str, *, channels: int, image_size: int, width: int | None) -> tuple[nn.Module, int]:
    if name.startswith("timm:"):
        if width is not None:
            raise ValueError(f"{name} has its own widths: expected width None, got {width}")
        return _timm_body(name.removeprefix("timm:"), channels=channels, image_size=image_size)
    assert width is not None
    body: ResNetBody | VggBody | MobileNetBody | MnistNetBody | AirbenchBody
    if name in _RESNETS:
        form, blocks = _RESNETS[name]
        body = ResNetBody(form=form, blocks=blocks, channels=channels, width=width)
    elif name == "vgg16":
        body = VggBody(channels=channels, image_size=image_size, width=width)
    elif name == "mobilenetv2":
        body = MobileNetBody(channels=channels, width=width)
    elif name == "wanet-mnist":
        body = MnistNetBody(channels=channels, image_size=image_size, width=width)
    elif name == "airbench":
        body = AirbenchBody(channels=channels, image_size=image_size, width=width)
    else:
        known = ", ".join(CLASSIFIERS)
        raise ValueError(f"expected a classifier in {known} or timm:NAME, got {name!r}")
    return body, body.num_features


def _timm_body(name: str, *, channels: int, image_size: int) -> tuple[nn.Module, int]:
    import timm

    # timm also takes "hf_hub:..." and "local-dir:...": only names of its own list are opened.
    if name not in timm.list_models():
        raise ValueError(f"expected a name in timm.list_models(), got {name!r}")
    settings: dict[str, Any] = {"pretrained": False, "num_classes": 0, "in_chans": channels}
    try:
        body = timm.create_model(name, img_size=image_size, **settings)
    except TypeError:  # convolutional models take any size, and no such argument
        body = timm.create_model(name, **settings)
    body.eval()
    try:
        with torch.no_grad():
            features = body(torch.zeros(1, channels, image_size, image_size))
    except (AssertionError, RuntimeError, ValueError) as error:  # transformers take few sizes
        raise ValueError(
            f"expected images of a size that timm:{name} takes, got {image_size}: {error}"
        ) from error
    if features.ndim != 2:
        raise ValueError(f"{name} gives features of shape {tuple(features.shape)}, expected (1, F)")
    return body.train(), features.shape[1]
