"""Look inside a classifier: record what its layers give, and find its spatial stages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from defense_nc.inversion import frozen
from wm_inject.core.images import check_images


class _Output(NamedTuple):
    """What one call of one layer gave."""

    name: str
    shape: tuple[int, ...]
    convolved: bool  # whether a convolution had run by then


@contextmanager
def tap(model: nn.Module, layers: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Record the outputs of some layers while the model runs; the hooks are always removed.

    The recorded tensors are part of the graph: gradients flow through them. A second pass replaces
    what the first one left.

    Args:
        model: Any module.
        layers: Names of its submodules, as in ``model.named_modules()``.

    Yields:
        A dictionary that is filled by name as the model runs.

    Raises:
        ValueError: No layers, a name that the model does not have, or, while it runs, a layer whose
            output is not one tensor.
    """
    found: dict[str, Tensor] = {}

    def record(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not isinstance(output, Tensor):
                raise ValueError(f"expected a tensor from layer {name!r}, got {type(output)}")
            found[name] = output

        return hook

    chosen = [(name, get_layer(model, name)) for name in layers]
    if not chosen:
        raise ValueError("expected the names of layers, got none")
    handles = [layer.register_forward_hook(record(name)) for name, layer in chosen]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def get_layer(model: nn.Module, name: str) -> nn.Module:
    """The submodule of this name.

    Raises:
        ValueError: The model has none of this name.
    """
    layers = dict(model.named_modules())
    if not name or name not in layers:
        some = ", ".join([other for other in layers if other][:8])
        raise ValueError(f"expected a layer of the model ({some} ...), got {name!r}")
    return layers[name]


def conv_stages(model: nn.Module, image: Tensor) -> tuple[str, ...]:
    """The names of the layers that end the stages of a convolutional network.

    A stage is all that happens at one size of the maps; its end is the last layer or block that
    gives maps ``(N, C, H, W)`` of this size. A block that halves the size inside itself belongs to
    the stage that it opens. Maps of a single pixel are no stage: nothing spatial is left in them.

    Args:
        model: Images in [0, 1] to logits; run once in eval mode, given back as it came.
        image: One or more images ``(N, C, H, W)``; what is on them does not matter.

    Returns:
        Names for `tap`, in the order in which they run: the largest maps come first.

    Raises:
        ValueError: Bad images, or a network without convolutional maps before its answer: a linear
            one, or a transformer, which cuts the image into tokens.
    """
    check_images(image)
    outputs = _trace(model, image[:1])
    calls = [output.name for output in outputs]
    blocks = {output.name for output in outputs if _is_block(model, output, outputs)}
    stages: dict[tuple[int, ...], str] = {}  # by (H, W): the last one stays
    last_map = last_tokens = -1
    for place, output in enumerate(outputs):
        if len(output.shape) == 3:
            last_tokens = place
        inside = any(output.name.startswith(f"{block}.") for block in blocks)
        # A module that runs twice (a shared ReLU) gives maps of several stages.
        once = calls.count(output.name) == 1
        if output.name in blocks and output.convolved and once and not inside:
            stages[output.shape[2:]] = output.name
            last_map = place
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
            model(image.to(next(model.parameters(), image).device))
    finally:
        for handle in handles:
            handle.remove()
    return outputs
