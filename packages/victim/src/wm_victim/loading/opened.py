"""What opening a model gives, what it refuses, and the limits it keeps to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

Source = Literal["safetensors", "onnx", "torchscript", "wm"]
_MIB = 2**20


class NotOpened(ValueError):
    """A file that was not opened: one line with its name, the reason and, if any, a way out."""


@dataclass(frozen=True)
class Limits:
    """How much a stranger's file may ask for.

    The allowances of the child process grow with the file, so that a large honest model fits while
    a small file stays small.

    Args:
        max_bytes: The largest file, or model with its external data, in bytes.
        memory: Bytes of private memory for a child on a small file.
        memory_per_byte: Further bytes for each byte of the file.
        seconds: CPU and wall-clock seconds for a child on a small file, its start included. Time
            in which it was ready and a busy machine had no processor for it does not count, up to
            three times as much.
        bytes_per_second: The file's bytes that earn one second more.
        max_nodes: Nodes of an ONNX graph, its functions expanded.
        max_tensors: Tensors of one file, and records of one archive.
        max_classes: The largest plausible number of classes.

    Raises:
        ValueError: A limit that is not positive.
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
class OpenedModel:
    """A stranger's model, checked and ready to be looked at.

    Args:
        module: float32 (N, C, H, W) in [0, 1], not normalised -> logits (N, K); in eval mode,
            differentiable in its input, on the CPU. Where the file gave probabilities, the
            logits are their logarithms.
        source: The form the weights came in.
        arch: The architecture's name, or "onnx" for a graph that brings its own.
        channels: 1 or 3.
        image_size: H = W, in pixels.
        num_classes: K.
        layout: The layout the file takes images in: "NCHW" or "NHWC".
        outputs: What the file gives: "logits" or "probabilities".
        notes: One-line remarks: what was guessed, left out or could not be had.
        sha256: Of the file.
    """

    module: nn.Module
    source: Source
    arch: str
    channels: int
    image_size: int
    num_classes: int
    layout: Literal["NCHW", "NHWC"]
    outputs: Literal["logits", "probabilities"]
    notes: tuple[str, ...]
    sha256: str


def plain(text: object, limit: int = 300) -> str:
    """A stranger's text as one printable line of at most ``limit`` characters."""
    line = " ".join(str(text).split())
    line = "".join(one if one.isprintable() else "?" for one in line)
    return line if len(line) <= limit else line[: limit - 3] + "..."


def first_line(error: BaseException) -> str:
    """What an exception says, in its first line; its class where it says nothing."""
    lines = str(error).strip().splitlines()
    return plain(lines[0]) if lines else type(error).__name__
