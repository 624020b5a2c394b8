"""Architectures by name, from the local lists of torchvision and timm."""

from __future__ import annotations

import contextlib
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from wm_inject.core.text import printable
from wm_victim.loading.contract import Candidate, LoadingError, ModelOptions
from wm_victim.loading.image_sizes import guess_note, sizes_that_run
from wm_victim.loading.subtrees import find_subtree
from wm_victim.models import Normalize

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_STATISTICS = {"mean": "std", "mu": "sigma", "new_mean": "new_std"}
_SMALL = 32  # pixels of the images that small stems are made for
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class _Form:
    """An architecture and what its name leaves open; None for what is its own."""

    full: str
    image_size: int | None = None
    channels: int = 3
    small_stem: bool = False  # 3x3 with stride 1 and no max-pool, instead of 7x7 with stride 2
    patch_size: int | None = None


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

    The weights are those under the one prefix that fits. The number of classes is read off the
    classifier's shape, channels and the kind of stem off the first convolution, the image size of a
    transformer off its positions; else image size, mean and std are the architecture's own.

    Raises:
        LoadingError: An unknown name, or weights that are missing, left over or of another shape.
        RuntimeError: The library of the architecture is not installed.
    """
    full = find_arch(str(options.arch))
    own = _shapes(_meta(_Form(full), 2))
    weights, others, subtree_notes = find_subtree(state, own)
    form, notes = _form(full, own, weights, options)
    classes = options.num_classes
    if classes is None:
        classes = _classes(form, weights)
        notes.append(f"{classes} classes, by the shape of the classifier")
    size = form.image_size or (_SMALL if form.small_stem else _default_size(full))
    _refuse_layers_behind(others, classes)
    _compare(full, weights, _shapes(_meta(form, classes)))
    # On the CPU only now, when its size is known to be the file's.
    module = _make(form, classes)
    fresh = module.state_dict()
    fitting: OrderedDict[str, Tensor] = OrderedDict(
        (n, t.float() if t.is_floating_point() else t) for n, t in weights.items() if n in fresh
    )
    # Counters may be missing. The versions of layers, which safetensors does not keep, are today's.
    fitting.update((n, t) for n, t in fresh.items() if n not in fitting)
    vars(fitting)["_metadata"] = vars(fresh)["_metadata"]
    module.load_state_dict(fitting)
    mean, std = options.mean, options.std
    if mean is None or std is None:
        mean, std, note = _statistics(full, form.channels, others)
        notes.append(note)
    model = nn.Sequential(Normalize(mean, std), module).eval()
    sizes: tuple[int, ...] = ()
    if form.image_size is None:
        sizes = sizes_that_run(model, form.channels, also=(size,))
        notes.append(guess_note(size, sizes))
    return Candidate(
        model,
        "safetensors",
        full,
        form.channels,
        size,
        notes=(*subtree_notes, *notes),
        image_sizes=sizes,
    )


def _form(
    full: str, own: Shapes, weights: Mapping[str, Tensor], options: ModelOptions
) -> tuple[_Form, list[str]]:
    """How the weights' architecture differs from the one that its name stands for."""
    notes: list[str] = []
    form = _Form(full, options.side, options.channels or 3)
    name = next((n for n, shape in own.items() if len(shape) == 4 and shape[1] == 3), None)
    if name is None or name not in weights or weights[name].ndim != 4:
        return form, notes
    kernel, stem = own[name][-1], weights[name]
    if options.channels is None and stem.shape[1] == 1:
        form = replace(form, channels=1)
    positions = next((n for n in own if n.endswith(("pos_embed", "pos_embedding"))), None)
    if positions is None:
        if kernel == 7 and stem.shape[-1] == 3:
            form = replace(form, small_stem=True)
            notes.append(
                f"{name!r} is 3x3: taken as the stem for small images, stride 1 and no max-pool"
            )
    elif positions in weights and weights[positions].ndim == 3:
        patch, extra = stem.shape[-1], own[positions][1] - (_default_size(full) // kernel) ** 2
        side = math.isqrt(max(0, weights[positions].shape[1] - extra))
        if patch != kernel:
            form = replace(form, patch_size=patch)
            notes.append(f"patches of {patch} pixels, by the first convolution")
        if options.image_size is None and side * patch != _default_size(full):
            form = replace(form, image_size=side * patch)
            notes.append(f"image size {side * patch}, by the number of positions")
    return form, notes


def _library(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise RuntimeError(f"{package} is not installed: install wm-inject[torch]") from error


def _make(form: _Form, classes: int) -> nn.Module:
    """The architecture with fresh weights; pretrained ones are never fetched."""
    library, _, name = form.full.partition(":")
    sized: dict[str, Any] = {}
    if library == "torchvision":
        if form.image_size is not None and name.startswith("vit_"):
            sized["image_size"] = form.image_size
        if name in ("googlenet", "inception_v3"):
            sized |= {"aux_logits": False, "init_weights": False, "transform_input": False}
        module: nn.Module = _library("torchvision.models").get_model(
            name, weights=None, num_classes=classes, **sized
        )
        if form.channels == 1:
            _replace_first(module, nn.Conv2d, lambda conv: _like(conv, channels=1))
        return _with_small_stem(module) if form.small_stem else module
    settings = {"pretrained": False, "num_classes": classes, "in_chans": form.channels}
    if form.patch_size is not None:
        settings["patch_size"] = form.patch_size
    if form.image_size is not None:
        sized["img_size"] = form.image_size
    try:
        model: nn.Module = _library("timm").create_model(name, **settings, **sized)
    except TypeError:  # convolutional models take any size
        model = _library("timm").create_model(name, **settings)
    return _with_small_stem(model) if form.small_stem else model


def _with_small_stem(module: nn.Module) -> nn.Module:
    _replace_first(module, nn.Conv2d, lambda conv: _like(conv, kernel_size=3, stride=1, padding=1))
    _replace_first(module, nn.MaxPool2d, lambda pool: nn.Identity())
    return module


def _like(conv: Any, *, channels: int | None = None, **changes: Any) -> nn.Conv2d:
    """A convolution with the settings of another but for some, and fresh weights."""
    names = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
    settings = {name: getattr(conv, name) for name in names} | changes
    bias = conv.bias is not None
    return nn.Conv2d(channels or conv.in_channels, conv.out_channels, bias=bias, **settings)


def _replace_first(
    module: nn.Module, kind: type[nn.Module], new: Callable[[nn.Module], nn.Module]
) -> None:
    for path, layer in module.named_modules():
        if isinstance(layer, kind):
            parent, _, name = path.rpartition(".")
            setattr(module.get_submodule(parent), name, new(layer))
            return
    raise LoadingError(f"expected an architecture with a {kind.__name__}")


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def _meta(form: _Form, classes: int) -> nn.Module:
    """An architecture without memory behind its weights, where its constructor can do without."""
    with contextlib.suppress(NotImplementedError, RuntimeError), torch.device("meta"):
        return _make(form, classes)
    return _make(form, classes)


def _classes(form: _Form, weights: Mapping[str, Tensor]) -> int:
    """The number of classes: the length that changes with it in the architecture."""
    few, many = _shapes(_meta(form, 7)), _shapes(_meta(form, 11))
    counts = set()
    for name, shape in few.items():
        for axis, length in enumerate(shape):
            fits = name in weights and weights[name].ndim == len(shape)
            if fits and length == 7 and many[name][axis] == 11:
                counts.add(weights[name].shape[axis])
    if len(counts) != 1:
        full = form.full
        raise LoadingError(f"expected weights of {full} with one classifier, found {len(counts)}")
    return int(counts.pop())


def _refuse_layers_behind(others: Mapping[str, Tensor], classes: int) -> None:
    """Refuse a layer that reads the model's logits: it would be left out of the answers."""
    for name, tensor in others.items():
        if name.endswith("weight") and tensor.ndim == 2 and tensor.shape[1] == classes:
            raise LoadingError(f"a layer behind the classifier, {printable(name, 60)!r}")


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


def _statistics(
    full: str, channels: int, others: Mapping[str, Tensor]
) -> tuple[tuple[float, ...], tuple[float, ...], str]:
    """Mean, standard deviation, and whether a layer of the file or the architecture has them."""
    for name, tensor in others.items():
        parent, _, last = name.rpartition(".")
        other = f"{parent}.{_STATISTICS.get(last)}".lstrip(".")
        if last in _STATISTICS and other in others:
            mean, std = (tuple(t.flatten().tolist()) for t in (tensor, others[other]))
            if len(mean) == len(std) == channels and all(0 < one <= 1 for one in std):
                return mean, std, f"mean and std as the file has them, at {printable(name, 60)!r}"
    mean, std = _IMAGENET
    library, _, short = full.partition(":")
    if library == "timm":
        own = _library("timm").get_pretrained_cfg(short)
        mean, std = tuple(own.mean), tuple(own.std)
    note = "normalisation of ImageNet, the architecture's own: give mean and std if not"
    return (mean, std, note) if channels == 3 else ((fmean(mean),), (fmean(std),), note)
