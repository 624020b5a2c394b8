"""Architectures by name, from the local lists of torchvision and timm."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from wm_victim.loading.contract import Candidate, LoadingError, ModelOptions
from wm_victim.models import Normalize

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "backbone.", "encoder.", "classifier.")
Shapes = Mapping[str, Sequence[int]]


def find_arch(name: str) -> str:
    """The full name, "torchvision:NAME" or "timm:NAME", of an architecture of the local lists.

    Raises:
        LoadingError: A name of neither list: nothing is ever downloaded.
        RuntimeError: The library that the name asks for is not installed.
    """
    library, _, short = name.rpartition(":")
    if library not in ("", "torchvision", "timm"):
        raise LoadingError(f"expected an architecture of torchvision or timm, got {name!r}")
    if library in ("", "torchvision"):
        models = _library("torchvision.models")
        if short in models.list_models(module=models):
            return f"torchvision:{short}"
    if library in ("", "timm") and short in _library("timm").list_models():
        return f"timm:{short}"
    raise LoadingError(f"expected an architecture of torchvision or timm, got {name!r}")


def build(state: Mapping[str, Tensor], options: ModelOptions) -> Candidate:
    """Build the architecture ``options.arch`` and load weights strictly; infer what is None.

    The number of classes is read off the classifier's shape, the channels off the first
    convolution; image size, mean and std are the architecture's own. Prefixes that all names of
    ``state`` share are removed.

    Raises:
        LoadingError: An unknown name, or weights that are missing, left over or of another shape.
        RuntimeError: The library of the architecture is not installed.
    """
    full, image_size = find_arch(str(options.arch)), options.image_size
    weights = _without_prefixes(state, set(_shapes(_meta(full, 2, None, 3))))
    channels = options.channels or _channels(full, weights)
    notes = []
    classes = options.num_classes
    if classes is None:
        classes = _classes(full, weights, image_size)
        notes.append(f"{classes} classes, by the shape of the classifier")
    size = image_size or _default_size(full)
    if image_size is None:
        notes.append(f"image size {size}, the architecture's own")
    _compare(full, weights, _shapes(_meta(full, classes, image_size, channels)))
    # On the CPU only now, when its size is known to be the file's.
    module = _make(full, classes, image_size, channels)
    own = module.state_dict()
    fitting: OrderedDict[str, Tensor] = OrderedDict(
        (n, t.float() if t.is_floating_point() else t) for n, t in weights.items() if n in own
    )
    # Counters may be missing. The versions of layers, which safetensors does not keep, are today's.
    fitting.update((n, t) for n, t in own.items() if n not in fitting)
    vars(fitting)["_metadata"] = vars(own)["_metadata"]
    module.load_state_dict(fitting)
    own_mean, own_std = _statistics(full, channels)
    if options.mean is None or options.std is None:
        notes.append("normalisation of ImageNet, the architecture's own: give mean and std if not")
    normalize = Normalize(options.mean or own_mean, options.std or own_std)
    model = nn.Sequential(normalize, module).eval()
    return Candidate(model, "safetensors", full, channels, size, notes=tuple(notes))


def _library(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise RuntimeError(f"{package} is not installed: install wm-inject[torch]") from error


def _make(full: str, classes: int, image_size: int | None, channels: int) -> nn.Module:
    """The architecture with fresh weights; pretrained ones are never fetched."""
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
            sized_model: nn.Module = timm.create_model(name, img_size=image_size, **settings)
            return sized_model
    model: nn.Module = timm.create_model(name, **settings)
    return model


def _grey(module: nn.Module) -> nn.Module:
    """Replace the first convolution by one with a single input channel."""
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
    raise LoadingError("expected a convolution of three channels to turn into a grey one")


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def _without_prefixes(state: Mapping[str, Tensor], expected: set[str]) -> dict[str, Tensor]:
    """Remove prefixes, such as that of data-parallel training, as long as more names fit."""
    weights = dict(state)
    for _ in range(4):
        fits = len(expected & set(weights))
        for prefix in _PREFIXES:
            inner = {n.removeprefix(prefix): t for n, t in weights.items() if n.startswith(prefix)}
            if len(inner) == len(weights) and len(expected & set(inner)) > fits:
                weights = inner
                break
        else:
            return weights
    return weights


def _channels(full: str, weights: Mapping[str, Tensor]) -> int:
    """1 if exactly the weights that read the image have one channel, else 3."""
    for name, shape in _shapes(_meta(full, 2, None, 3)).items():
        if len(shape) == 4 and shape[1] == 3 and name in weights and weights[name].ndim == 4:
            return 1 if weights[name].shape[1] == 1 else 3
    return 3


def _meta(full: str, classes: int, image_size: int | None, channels: int) -> nn.Module:
    """An architecture without memory behind its weights, where its constructor can do without."""
    with contextlib.suppress(NotImplementedError, RuntimeError), torch.device("meta"):
        return _make(full, classes, image_size, channels)
    return _make(full, classes, image_size, channels)


def _classes(full: str, weights: Mapping[str, Tensor], image_size: int | None) -> int:
    """The number of classes: the length that changes with it in the architecture."""
    few = _shapes(_meta(full, 7, image_size, 3))
    many = _shapes(_meta(full, 11, image_size, 3))
    counts = set()
    for name, shape in few.items():
        for axis, length in enumerate(shape):
            fits = name in weights and weights[name].ndim == len(shape)
            if fits and length == 7 and many[name][axis] == 11:
                counts.add(weights[name].shape[axis])
    if len(counts) != 1:
        raise LoadingError(f"expected weights of {full} with one classifier, found {len(counts)}")
    return int(counts.pop())


def _compare(full: str, weights: Mapping[str, Tensor], expected: Shapes) -> None:
    # Counters that batch normalisation keeps, and auxiliary heads, do not decide the output.
    optional = ("num_batches_tracked",)
    missing = [n for n in expected if n not in weights and not n.endswith(optional)]
    extra = [n for n in weights if n not in expected and not n.startswith(("AuxLogits.", "aux"))]
    other = [n for n in expected if n in weights and tuple(weights[n].shape) != tuple(expected[n])]
    problems = [
        f"{len(names)} {what} ({', '.join(map(repr, names[:3]))}{', ...' * (len(names) > 3)})"
        for what, names in (("missing", missing), ("left over", extra))
        if names
    ]
    if other:
        name = other[0]
        shapes = f"{name!r} is {tuple(weights[name].shape)} instead of {tuple(expected[name])}"
        problems.append(f"{len(other)} of another shape ({shapes})")
    if problems:
        raise LoadingError(f"weights that do not fit {full}: {'; '.join(problems)}")


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
