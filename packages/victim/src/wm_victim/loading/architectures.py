"""Architectures by name, from the lists that torchvision and timm carry with them."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from wm_victim.models import Normalize

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "backbone.", "encoder.", "classifier.")
Shapes = Mapping[str, Sequence[int]]


class BadFit(ValueError):
    """A name that is not known, or weights that do not fit it; says why."""


@dataclass(frozen=True)
class Built:
    """An architecture with its weights, and what was inferred on the way."""

    module: nn.Module
    arch: str
    channels: int
    image_size: int
    notes: tuple[str, ...]


def find_arch(name: str) -> str:
    """The full name, "torchvision:NAME" or "timm:NAME", of an architecture of the local lists.

    Raises:
        BadFit: A name of neither list: nothing is ever downloaded.
        RuntimeError: The library that the name asks for is not installed.
    """
    library, _, short = name.rpartition(":")
    if library not in ("", "torchvision", "timm"):
        raise BadFit(f"expected an architecture of torchvision or timm, got {name!r}")
    if library in ("", "torchvision"):
        models = _library("torchvision.models")
        if short in models.list_models(module=models):
            return f"torchvision:{short}"
    if library in ("", "timm") and short in _library("timm").list_models():
        return f"timm:{short}"
    raise BadFit(f"expected an architecture of torchvision or timm, got {name!r}")


def build(
    arch: str,
    state: Mapping[str, Tensor],
    *,
    num_classes: int | None = None,
    image_size: int | None = None,
    channels: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Built:
    """Build an architecture for weights, infer what was not said, and load them strictly.

    Args:
        arch: As `find_arch` takes it.
        state: Tensors by name, on the CPU; prefixes that all share are taken off.
        num_classes: K; read off the classifier's shape if None.
        image_size: In pixels; the architecture's own if None.
        channels: 1 or 3; read off the first convolution if None.
        mean: Per channel, of images in [0, 1]; the architecture's own if None.
        std: Likewise.

    Raises:
        BadFit: An unknown name, or weights that are missing, left over or of another shape.
    """
    full = find_arch(arch)
    given = _strip(state, set(_shapes(_meta(full, 2, None, 3))))
    channels = channels or _channels(full, given)
    notes = []
    classes = _classes(full, given, image_size) if num_classes is None else num_classes
    if num_classes is None:
        notes.append(f"{classes} classes, by the shape of the classifier")
    size = image_size or _default_size(full)
    if image_size is None:
        notes.append(f"image size {size}, the architecture's own")
    _compare(full, given, _shapes(_meta(full, classes, image_size, channels)))
    # On the CPU only now, when its size is known to be the file's.
    module = _make(full, classes, image_size, channels)
    own = module.state_dict()
    fitting: OrderedDict[str, Tensor] = OrderedDict(
        (n, t.float() if t.is_floating_point() else t) for n, t in given.items() if n in own
    )
    # Counters may be missing. The versions of layers, which safetensors does not keep, are today's.
    fitting.update((n, t) for n, t in own.items() if n not in fitting)
    vars(fitting)["_metadata"] = vars(own)["_metadata"]
    module.load_state_dict(fitting)
    own_mean, own_std = _statistics(full, channels)
    if mean is None or std is None:
        notes.append("normalisation of ImageNet, the architecture's own: give mean and std if not")
    normalize = Normalize(tuple(mean or own_mean), tuple(std or own_std))
    return Built(nn.Sequential(normalize, module).eval(), full, channels, size, tuple(notes))


def _library(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise RuntimeError(f"{package} is not installed: install wm-inject[torch]") from error


def _make(full: str, classes: int, image_size: int | None, channels: int) -> nn.Module:
    """The architecture with fresh weights; never anybody's."""
    library, _, name = full.partition(":")
    sized: dict[str, Any] = {}
    if library == "torchvision":
        if image_size is not None and name.startswith("vit_"):
            sized["image_size"] = image_size
        if name in ("googlenet", "inception_v3"):
            sized |= {"aux_logits": False, "init_weights": False, "transform_input": False}
        module: nn.Module = _library("torchvision.models").get_model(
            name, weights=None, num_classes=classes, **sized
        )
        return _grey(module) if channels == 1 else module
    timm = _library("timm")
    settings = {"pretrained": False, "num_classes": classes, "in_chans": channels}
    if image_size is not None:
        with contextlib.suppress(TypeError):  # convolutional models take any size
            found: nn.Module = timm.create_model(name, img_size=image_size, **settings)
            return found
    plain: nn.Module = timm.create_model(name, **settings)
    return plain


def _grey(module: nn.Module) -> nn.Module:
    """Put a convolution of one channel in the place of the first."""
    for path, layer in module.named_modules():
        if isinstance(layer, nn.Conv2d) and layer.in_channels == 3:
            parent = module.get_submodule(path.rpartition(".")[0])
            settings = {
                name: getattr(layer, name)
                for name in ("kernel_size", "stride", "padding", "dilation", "padding_mode")
            }
            grey = nn.Conv2d(1, layer.out_channels, bias=layer.bias is not None, **settings)
            setattr(parent, path.rpartition(".")[2], grey)
            return module
    raise BadFit("expected a convolution of three channels to turn into a grey one")


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def _strip(state: Mapping[str, Tensor], wanted: set[str]) -> dict[str, Tensor]:
    """Take off prefixes, such as that of data-parallel training, as long as more names fit."""
    found = dict(state)
    for _ in range(4):
        fits = len(wanted & set(found))
        for prefix in _PREFIXES:
            inner = {n.removeprefix(prefix): t for n, t in found.items() if n.startswith(prefix)}
            if len(inner) == len(found) and len(wanted & set(inner)) > fits:
                found = inner
                break
        else:
            return found
    return found


def _channels(full: str, given: Mapping[str, Tensor]) -> int:
    """1 if exactly the weights that read the image have one channel, else 3."""
    for name, shape in _shapes(_meta(full, 2, None, 3)).items():
        if len(shape) == 4 and shape[1] == 3 and name in given and given[name].ndim == 4:
            return 1 if given[name].shape[1] == 1 else 3
    return 3


def _meta(full: str, classes: int, image_size: int | None, channels: int) -> nn.Module:
    """An architecture without memory behind its weights, where its constructor can do without."""
    with contextlib.suppress(NotImplementedError, RuntimeError), torch.device("meta"):
        return _make(full, classes, image_size, channels)
    return _make(full, classes, image_size, channels)


def _classes(full: str, given: Mapping[str, Tensor], image_size: int | None) -> int:
    """The number of classes: the length that changes with it in the architecture."""
    few = _shapes(_meta(full, 7, image_size, 3))
    many = _shapes(_meta(full, 11, image_size, 3))
    counts = set()
    for name, shape in few.items():
        for axis, length in enumerate(shape):
            fits = name in given and given[name].ndim == len(shape)
            if fits and length == 7 and many[name][axis] == 11:
                counts.add(given[name].shape[axis])
    if len(counts) != 1:
        raise BadFit(f"expected weights of {full} with one classifier, found {len(counts)}")
    return int(counts.pop())


def _compare(full: str, given: Mapping[str, Tensor], wanted: Shapes) -> None:
    # Counters that batch normalisation keeps, and auxiliary heads, do not decide the output.
    optional = ("num_batches_tracked",)
    missing = [n for n in wanted if n not in given and not n.endswith(optional)]
    extra = [n for n in given if n not in wanted and not n.startswith(("AuxLogits.", "aux"))]
    other = [n for n in wanted if n in given and tuple(given[n].shape) != tuple(wanted[n])]
    problems = [
        f"{len(names)} {what} ({', '.join(map(repr, names[:3]))}{', ...' * (len(names) > 3)})"
        for what, names in (("missing", missing), ("left over", extra))
        if names
    ]
    if other:
        name = other[0]
        shapes = f"{name!r} is {tuple(given[name].shape)} instead of {tuple(wanted[name])}"
        problems.append(f"{len(other)} of another shape ({shapes})")
    if problems:
        raise BadFit(f"weights that do not fit {full}: {'; '.join(problems)}")


def _default_size(full: str) -> int:
    library, _, name = full.partition(":")
    if library == "timm":
        return int(_library("timm").get_pretrained_cfg(name).input_size[-1])
    try:
        weights = _library("torchvision.models").get_model_weights(name).DEFAULT
        return int(weights.transforms().crop_size[0])
    except (AttributeError, ValueError, TypeError, IndexError):
        return 224


def _statistics(full: str, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    mean, std = _IMAGENET
    library, _, name = full.partition(":")
    if library == "timm":
        own = _library("timm").get_pretrained_cfg(name)
        mean, std = tuple(own.mean), tuple(own.std)
    if channels == 1:
        return (fmean(mean),), (fmean(std),)
    return mean, std
