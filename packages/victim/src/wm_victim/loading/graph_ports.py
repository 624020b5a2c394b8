"""Which input of an ONNX graph takes the images, how it takes them, and which output answers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from wm_inject.core.errors import out_of_memory
from wm_inject.core.image_size import (
    as_image_size,
    describe_size,
    height_width,
    size_from_json,
)
from wm_inject.core.text import first_line, printable
from wm_victim.loading.image_sizes import sizes_that_run
from wm_victim.loading.onnx_module import LEAST_SIDE, MOST_SIDE, IoFormat
from wm_victim.loading.output_checks import probe_images

_FLOAT = 1
_PIXELS = {2: np.uint8, 6: np.int32, 7: np.int64}  # element types of 0 .. 255
_SHAPES = ("Identity", "Flatten", "Reshape", "Squeeze", "Unsqueeze", "Dropout", "Cast")
# How exporters call outputs beside the answers.
_BESIDE = re.compile("aux|embed|feat|hidden|pool|latent", re.IGNORECASE)
_MOST = 1024  # images of a fixed batch
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class ImageInput:
    """The input of a graph that takes images.

    Args:
        name: Its name.
        io_format: Its channels, size, layout and range.
        dtype: What its numbers are.
        batch: How many images it takes at once; 0 for any number.
        guess: One side of its images is open, and taken as long as the other.
    """

    name: str
    io_format: IoFormat
    dtype: Any = np.float32
    batch: int = 0
    guess: bool = False

    def resized(self, side: int) -> ImageInput:
        """The same input for images of another size."""
        return replace(self, io_format=replace(self.io_format, image_size=side))

    def run(self, session: Any, names: Sequence[str], images: Tensor) -> list[Any]:
        """Values of a graph by name, for images in [0, 1]; a last batch that is short is filled up.

        Raises:
            ValueError: ONNX Runtime cannot run it on them.
        """
        tensor = images.permute(0, 2, 3, 1) if self.io_format.nhwc else images
        array: Array = np.ascontiguousarray(tensor.numpy())
        if self.io_format.pixels:
            array = np.rint(array * 255).astype(self.dtype)
        batch = self.batch or len(array)
        runs = []
        for start in range(0, len(array), batch):
            part = array[start : start + batch]
            full = np.concatenate([part, np.repeat(part[-1:], batch - len(part), axis=0)])
            try:
                values = session.run(list(names), {self.name: full})
            # ONNX Runtime has an exception class for each kind of failure, with no common base.
            except Exception as error:
                reason = first_line(error)
                if out_of_memory(error):
                    raise MemoryError(reason) from error
                raise ValueError(f"it does not run under ONNX Runtime: {reason}") from error
            runs.append([_first(value, len(part), batch) for value in values])
        return [
            np.concatenate(parts)
            if isinstance(parts[0], np.ndarray) and parts[0].ndim
            else parts[0]
            for parts in zip(*runs, strict=True)
        ]


def _first(value: Any, count: int, batch: int) -> Any:
    by_image = isinstance(value, np.ndarray) and value.ndim and len(value) == batch
    return value[:count] if by_image else value


def image_input(model: Any, options: Mapping[str, Any]) -> tuple[ImageInput, bool, list[str]]:
    """The input that takes images, whether its size is open, and notes.

    An open size is 224 until `ways_to_run` finds one; a side that alone is open is as long as the
    other.

    Raises:
        ValueError: Other inputs, or one that takes no images.
    """
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    if len(inputs) != 1:
        names = ", ".join(printable(value.name, 40) for value in inputs[:6])
        raise ValueError(f"expected one input, the images, it takes {len(inputs)}: {names}")
    kind = inputs[0].type.tensor_type
    dims = [dim.dim_value if dim.dim_value > 0 else None for dim in kind.shape.dim]
    if kind.elem_type not in (_FLOAT, *_PIXELS):
        raise ValueError(f"expected a float or uint8 input, it has ONNX type {kind.elem_type}")
    if len(dims) != 4:
        raise ValueError(f"expected images (N, C, H, W) or (N, H, W, C), it takes {len(dims)} axes")
    notes = []
    nhwc = dims[1] not in (1, 3) and dims[3] in (1, 3)
    batch, axes = dims[0] or 0, dims[1:]
    channels, height, width = (axes[2], *axes[:2]) if nhwc else axes
    if channels is None:
        channels = options["channels"] or 3
        notes.append(f"{channels} channels: the graph does not say how many")
    users_size = None if options["image_size"] is None else size_from_json(options["image_size"])
    is_open = height is None and width is None and users_size is None
    guess = (height is None) != (width is None) and users_size is None
    fallback = height_width(users_size or height or width or 224)
    size = as_image_size(height or fallback[0], width or fallback[1])
    if channels not in (1, 3):
        raise ValueError(f"expected 1 or 3 channels, it takes {channels}")
    if options["channels"] not in (None, channels):
        raise ValueError(f"expected channels {options['channels']}, the graph takes {channels}")
    if users_size not in (None, size):
        own = describe_size(size) if height and width else f"{height or 'any'} x {width or 'any'}"
        raise ValueError(f"expected image_size {describe_size(users_size)}, the graph takes {own}")
    if not all(LEAST_SIDE <= side <= MOST_SIDE for side in height_width(size)):
        raise ValueError(
            f"expected images of {LEAST_SIDE} .. {MOST_SIDE} pixels, it takes {describe_size(size)}"
        )
    if guess:
        notes.append(
            f"image size {describe_size(size)}, a guess: one side is open, so give image_size if "
            "you know"
        )
    if batch > _MOST:
        raise ValueError(f"expected a batch of at most {_MOST} images, it takes {batch}")
    pixels = kind.elem_type in _PIXELS
    if pixels:
        notes.append("an input of integers: images are given as 0 .. 255, unrounded")
    io_format = IoFormat(channels, size, nhwc=nhwc, pixels=pixels)
    dtype = _PIXELS.get(kind.elem_type, np.float32)
    return ImageInput(inputs[0].name, io_format, dtype, batch, guess), is_open, notes


def ways_to_run(
    session: Any, port: ImageInput, *, is_open: bool
) -> tuple[ImageInput, tuple[int, ...]]:
    """The input with a batch size that runs, and the image sizes that do, if the size is open.

    Raises:
        ValueError: No size or no batch size that was tried runs.
    """
    names = [output.name for output in session.get_outputs()]
    channels = port.io_format.channels
    problem: ValueError | None = None
    for batch in dict.fromkeys((port.batch, *_batches(session, port))):
        sized = replace(port, batch=batch)

        def run(images: Tensor, sized: ImageInput = sized) -> None:
            sized.run(session, names, images)

        if is_open:
            if sizes := sizes_that_run(run, channels):
                return sized, sizes
            continue
        try:
            run(probe_images(2, channels, port.io_format.image_size))
        except ValueError as error:
            problem = problem or error
            continue
        return sized, ()
    if problem is not None and port.guess:
        raise ValueError(
            "expected image_size (--image-size HEIGHTxWIDTH): the graph leaves one side open, and "
            f"{describe_size(port.io_format.image_size)} pixels do not run"
        ) from problem
    raise problem or ValueError(
        "expected image_size: the graph takes any, and none of the usual ones runs"
    )


def _batches(session: Any, port: ImageInput) -> Iterator[int]:
    """Batch sizes that may be built into a graph whose input does not say so."""
    if port.batch:
        return
    yield 1
    for output in session.get_outputs():
        first = next(iter(output.shape), None)
        if isinstance(first, int) and 1 < first <= _MOST:
            yield first


def logits_output(
    model: Any, values: Mapping[str, Any], count: int, num_classes: int | None
) -> tuple[str, Array]:
    """The output that looks like a classifier's: its name, and its values ``(N, K)``.

    Args:
        model: The graph.
        values: All its outputs by name, for ``count`` images.
        count: N.
        num_classes: K, if the caller knows it.

    Raises:
        ValueError: No such output, or several of which none is computed from the others.
    """
    candidates = {
        name: rows for name, value in values.items() if (rows := _rows(value, count)) is not None
    }
    if num_classes is not None and len(candidates) > 1:
        candidates = {
            n: rows for n, rows in candidates.items() if rows.shape[1] == num_classes
        } or candidates
    if len(candidates) > 1:
        candidates = {name: candidates[name] for name in _answers(model, candidates)}
    if len(candidates) > 1:
        candidates = {
            n: rows for n, rows in candidates.items() if not _BESIDE.search(n)
        } or candidates
    if len(candidates) != 1:
        shapes = ", ".join(
            f"{printable(name, 40)} {tuple(getattr(value, 'shape', ()))}"
            for name, value in list(values.items())[:6]
        )
        which = (
            "; give num_classes (--classes)"
            if len({rows.shape[1] for rows in candidates.values()}) > 1
            else ""
        )
        raise ValueError(
            f"expected one output of shape (N, K), found {len(candidates)} among {shapes}{which}"
        )
    return candidates.popitem()


def _rows(value: Any, count: int) -> Array | None:
    """An output as (N, K), with axes of length one left out; None if it is something else."""
    if not isinstance(value, np.ndarray) or value.dtype != np.float32 or value.ndim < 2:
        return None
    classes = max(value.shape[1:])
    fits = len(value) == count and classes >= 2 and value.size == count * classes
    return value.reshape(count, classes) if fits else None


def _answers(model: Any, candidates: Mapping[str, Array]) -> list[str]:
    """The outputs that no other is computed from; of those in one order of classes the first."""
    makers = {name: node for node in model.graph.node for name in node.output}
    above = {name: _ancestors(makers, name) for name in candidates}
    names = list(candidates)
    for name in list(names):
        value = _before_shapes(makers, name)
        for other in names:
            if name == other or value not in above[other]:
                continue
            if candidates[name].shape != candidates[other].shape:
                names.remove(name)
                break
            # Probabilities beside their logits: the logits are the answer.
            if (candidates[name].argsort(1) == candidates[other].argsort(1)).all():
                names.remove(other)
                break
    return names


def _before_shapes(makers: Mapping[str, Any], name: str) -> str:
    """The value of which an output is another shape."""
    while name in makers and makers[name].op_type in _SHAPES:
        name = makers[name].input[0]
    return name


def _ancestors(makers: Mapping[str, Any], name: str) -> set[str]:
    ancestors: set[str] = set()
    waiting = [name]
    while waiting:
        node = makers.get(waiting.pop())
        for value in node.input if node is not None else ():
            if value not in ancestors:
                ancestors.add(value)
                waiting.append(value)
    return ancestors
