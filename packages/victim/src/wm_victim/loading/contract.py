"""What `open_model` takes and gives, its limits, and what its steps hand to each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from wm_inject.core.checks import check_channels
from wm_inject.core.image_size import (
    ImageSize,
    as_image_size,
    describe_size,
    height_width,
    size_to_json,
)

Source = Literal["safetensors", "onnx", "torchscript", "wm"]
MORE_MEMORY = "it asks for more memory than allowed"
_MIB = 2**20


class LoadingError(ValueError):
    """A file that is refused: one line with its name, the reason and, if any, a way out."""


@dataclass(frozen=True)
class Limits:
    """How much an untrusted file may ask for.

    The limits of the child process grow with the file, so that a large honest model fits while a
    small file stays small.

    Args:
        max_bytes: The largest file, or model with its external data, in bytes.
        memory: Bytes of private memory for a child on a small file.
        memory_per_byte: Further bytes for each byte of the file.
        seconds: CPU and wall-clock seconds for a child on a small file, its start included. Time
            spent waiting for a processor does not count, up to three times as much.
        bytes_per_second: The file's bytes that earn one second more.
        max_nodes: Nodes of an ONNX graph, its functions expanded.
        max_tensors: Tensors of one file, and records of one archive.
        max_classes: The largest plausible number of classes.
    """

    max_bytes: int = 2048 * _MIB
    memory: int = 1408 * _MIB
    memory_per_byte: int = 8
    seconds: float = 14.0
    bytes_per_second: int = 8 * _MIB
    max_nodes: int = 20_000
    max_tensors: int = 20_000
    max_classes: int = 100_000

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"expected a limit {name} > 0, got {value}")

    def memory_for(self, size: int) -> int:
        """Bytes of private memory for a child that reads a file of ``size`` bytes."""
        return self.memory + self.memory_per_byte * size

    def seconds_for(self, size: int) -> float:
        """Seconds for a child that reads a file of ``size`` bytes."""
        return self.seconds + size / self.bytes_per_second


@dataclass(frozen=True)
class ModelOptions:
    """What the caller knows of a model; None where it is to be inferred."""

    arch: str | None = None
    num_classes: int | None = None
    image_size: ImageSize | None = None
    channels: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    allow_torchscript: bool = False

    def __post_init__(self) -> None:
        if self.num_classes is not None and self.num_classes < 2:
            raise ValueError(f"expected num_classes of at least 2, got {self.num_classes}")
        if self.image_size is not None:
            sides = height_width(self.image_size)
            if not all(8 <= side <= 1024 for side in sides):
                raise ValueError(f"expected image_size in 8 .. 1024, got {self.image_size}")
            object.__setattr__(self, "image_size", as_image_size(*sides))
        if self.channels is not None:
            check_channels(self.channels)
        if (self.mean is None) != (self.std is None):
            raise ValueError("expected mean and std together")
        if self.std is not None and not all(0 < value < float("inf") for value in self.std):
            raise ValueError(f"expected positive standard deviations, got {self.std}")

    @property
    def side(self) -> int | None:
        """The image size where only square images are taken.

        Raises:
            LoadingError: The caller says another height than width.
        """
        if isinstance(self.image_size, tuple):
            raise LoadingError(
                "expected one side as image_size (--image-size), as only ONNX graphs may take "
                f"images that are not square, got {describe_size(self.image_size)}"
            )
        return self.image_size

    def for_child(self) -> dict[str, Any]:
        """The part that a conversion needs, as JSON types."""
        return {
            "image_size": None if self.image_size is None else size_to_json(self.image_size),
            "channels": self.channels,
            "num_classes": self.num_classes,
        }


@dataclass(frozen=True)
class Candidate:
    """A module that was read, before the last checks."""

    module: nn.Module
    source: Source
    arch: str
    channels: int
    image_size: ImageSize
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    probabilities: bool = False  # of the graph's own outputs; the module gives logits
    notes: tuple[str, ...] = ()
    class_names: object = None  # as the file stores them, unchecked
    image_sizes: tuple[int, ...] = ()  # that it runs on, where image_size is a guess
    at_once: int | None = None  # images to compute together in the checks; None for all


@dataclass(frozen=True)
class OpenedModel:
    """An untrusted model that passed the checks.

    Args:
        module: ``images`` to ``logits``, in eval mode, differentiable in its input, on the CPU.
            In a graph they are read before softmax, sigmoid and whatever else keeps their order;
            other models' probabilities are taken as logarithms.
        source: The form the weights came in.
        arch: The architecture's name, or "onnx" for a graph that brings its own.
        channels: 1 or 3.
        image_size: H = W in pixels, or (H, W) where the two differ.
        layout: The layout the file takes images in: "NCHW" or "NHWC".
        outputs: What the file gives: "logits" or "probabilities".
        notes: One-line remarks: what was inferred, left out or not available.
        sha256: Of the file.
        class_names: The K names that the file stores, in the order of its logits: unique and
            printable. None if it stores none.
        image_sizes: The usual sizes that the model runs on, ascending, where neither the file nor
            the caller says which: ``image_size`` is then a guess. Otherwise ``(image_size,)``.
    """

    module: nn.Module
    source: Source
    arch: str
    channels: int
    image_size: ImageSize
    num_classes: int
    layout: Literal["NCHW", "NHWC"]
    outputs: Literal["logits", "probabilities"]
    notes: tuple[str, ...]
    sha256: str
    class_names: tuple[str, ...] | None = None
    image_sizes: tuple[ImageSize, ...] = ()
