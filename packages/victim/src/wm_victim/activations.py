"""Look inside a classifier: outputs of its layers, its convolutional stages, its last layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from wm_inject.core.images import check_images
from wm_victim.inference import device_of, frozen


class _Output(NamedTuple):
    """One output of one layer."""

    name: str
    shape: tuple[int, ...]
    convolved: bool  # whether a convolution had run by then


@contextmanager
def record_outputs(model: nn.Module, layers: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Record the outputs of some layers, by name, while the model runs.

    The tensors are part of the graph: gradients flow through them. A second pass replaces them.

    Raises:
        ValueError: No layers, an unknown name, or, while it runs, a layer whose output is not one
            tensor.
    """
    outputs: dict[str, Tensor] = {}

    def record(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not isinstance(output, Tensor):
                raise ValueError(f"expected a tensor from layer {name!r}, got {type(output)}")
            outputs[name] = output

        return hook

    modules = [(name, get_layer(model, name)) for name in layers]
    if not modules:
        raise ValueError("expected the names of layers, got none")
    handles = [layer.register_forward_hook(record(name)) for name, layer in modules]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def record_inputs(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, list[Tensor]]]:
    """Record the first input of some layers, call by call, while their model runs.

    Without gradients, and as they were: a layer may work in place.
    """
    inputs: dict[str, list[Tensor]] = defaultdict(list)

    def record(name: str) -> Any:
        return lambda module, args: inputs[name].append(args[0].detach().clone())

    handles = [layer.register_forward_pre_hook(record(name)) for name, layer in layers.items()]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


def get_layer(model: nn.Module, name: str) -> nn.Module:
    """The submodule of this name, as in ``model.named_modules()``.

    Raises:
        ValueError: The model has none of this name.
    """
    layers = dict(model.named_modules())
    if not name or name not in layers:
        some = ", ".join([other for other in layers if other][:8])
        raise ValueError(f"expected a layer of the model ({some} ...), got {name!r}")
    return layers[name]


def last_linear(model: nn.Module) -> nn.Linear:
    """The linear layer that gives the logits: ``head`` if there is one, else the last registered.

    Raises:
        ValueError: Not a torch module, or one without a linear layer.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"expected a torch module as the model, got {type(model).__name__}")
    head = getattr(model, "head", None)
    if isinstance(head, nn.Linear):
        return head
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise ValueError("expected a model with a linear layer, found none")
    return layers[-1]


def penultimate(model: nn.Module, images: Tensor, *, batch_size: int = 256) -> Tensor:
    """The inputs of the last linear layer: ``(N, F)``, without gradients.

    Raises:
        ValueError: Bad images, no linear layer, or one that does not run once a pass on ``(N, F)``.
    """
    check_images(images)
    layer = last_linear(model)
    parts = images.split(batch_size)
    with frozen(model), torch.no_grad(), record_inputs({"last": layer}) as inputs:
        for part in parts:
            model(part)
    rows = inputs["last"]
    if [tuple(part.shape) for part in rows] != [(len(p), layer.in_features) for p in parts]:
        raise ValueError("expected a last linear layer that reads (N, F) once a pass, got another")
    return torch.cat(rows)


def conv_stages(model: nn.Module, image: Tensor) -> tuple[str, ...]:
    """The names of the layers that end the stages of a convolutional network, largest maps first.

    A stage is all that happens at one size of the maps; its end is the last layer or block that
    gives maps ``(N, C, H, W)`` of this size. A block that halves the size inside itself belongs to
    the stage that it opens. Maps of a single pixel are no stage: nothing spatial is left in them.

    Args:
        model: Run once.
        image: One or more images ``(N, C, H, W)``; their content does not matter.

    Raises:
        ValueError: Bad images, or a network without convolutional maps before its logits: a linear
            one, or a transformer, which cuts the image into tokens.
    """
    check_images(image)
    outputs = _trace(model, image[:1])
    calls = [output.name for output in outputs]
    blocks = {output.name for output in outputs if _is_block(model, output, outputs)}
    stages: dict[tuple[int, ...], str] = {}  # by (H, W): the last one stays
    last_map = last_tokens = -1
    for index, output in enumerate(outputs):
        if len(output.shape) == 3:
            last_tokens = index
        inside = any(output.name.startswith(f"{block}.") for block in blocks)
        # A module that runs twice (a shared ReLU) gives maps of several stages.
        once = calls.count(output.name) == 1
        if output.name in blocks and output.convolved and once and not inside:
            stages[output.shape[2:]] = output.name
            last_map = index
    if not stages or last_tokens > last_map:
        raise ValueError(
            f"expected a network with convolutional maps, found none in {type(model).__name__}"
        )
    return tuple(sorted(stages.values(), key=calls.index))


def _is_block(model: nn.Module, output: _Output, outputs: Sequence[_Output]) -> bool:
    """Whether a layer gives maps as a whole: it halves at most once, and is no mere sequence."""
    if not output.name or len(output.shape) != 4 or output.shape[2] * output.shape[3] == 1:
        return False
    if isinstance(model.get_submodule(output.name), nn.Sequential):
        return False
    within = [o.shape for o in outputs if f"{o.name}.".startswith(f"{output.name}.")]
    # A map of one pixel (squeeze and excitation) is no halving.
    return len({shape[2:] for shape in within if len(shape) == 4 and shape[2:] != (1, 1)}) <= 2


def _trace(model: nn.Module, image: Tensor) -> list[_Output]:
    """Every tensor that a layer of the model gives for one image, in the order they finish."""
    outputs: list[_Output] = []
    convolved = False

    def record(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            nonlocal convolved
            convolved = convolved or isinstance(module, nn.Conv2d)
            if isinstance(output, Tensor):
                outputs.append(_Output(name, tuple(output.shape), convolved))

        return hook

    handles = []
    try:
        with frozen(model), torch.no_grad():
            for name, layer in model.named_modules():
                handles.append(layer.register_forward_hook(record(name)))
            model(image.to(device_of(model)))
    finally:
        for handle in handles:
            handle.remove()
    return outputs
