"""Head weights: does one label's row of the last linear layer hold unusually much positive weight?

A trigger's features speak for its label beside those of the label's own images, so that more of
the row is positive. Nothing is searched: a passing look at the weights, at any size of image.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from defense_nc.config import check_rule
from defense_nc.scan_inputs import open_scan
from defense_nc.verdict import ScanReport, judge_scan
from defense_reverse.detectors.common import check_settings
from wm_inject.core.presets import preset_of
from wm_victim.inference import predict

_EXACT = 1e-3  # of a gradient's largest number: what rounding may leave where there is nothing


@dataclass(frozen=True)
class HeadWeights:
    """The weights of the last linear layer as a `defense_nc.Detector`.

    Args:
        probes: Images that the layer is looked for with; one of them is enough.
        alpha: As for `defense_nc.NeuralCleanse`, and so is ``max_ratio``.

    Source: Fields, Samragh, Javaheripi, Koushanfar and Javidi, "Trojan Signatures in DNN Weights"
        (ICCV Workshops 2021): the mean of the target's row is unusually large. The sum of the
        positive weights, and the test, are ours.
    """

    name: ClassVar[str] = "head"
    probes: int = 32
    alpha: float = 0.05
    max_ratio: float = 0.5

    def __post_init__(self) -> None:
        check_settings(self, ("probes",), ())
        check_rule(self.alpha, self.max_ratio)

    @classmethod
    def preset(cls, name: str = "fast", **changes: Any) -> HeadWeights:
        """Settings by name, with changes; "fast" and "paper" are the same."""
        return preset_of(cls, PRESETS, name, **changes)

    @property
    def settings(self) -> Mapping[str, Any]:
        """What the layer is looked for with, ready for JSON."""
        return {k: v for k, v in asdict(self).items() if k not in ("alpha", "max_ratio")}

    def scan(
        self,
        model: nn.Module,
        images: Tensor,
        *,
        labels: Tensor | None = None,
        seed: int = 0,
        progress: bool = True,
        device: torch.device | str | None = None,
        checkpoint: Path | None = None,
    ) -> ScanReport:
        """Sum up every label's row, and decide whether one is unusual.

        ``progress`` and ``checkpoint`` are ignored.

        Returns:
            A report whose scores are the median of the rows' sums over a label's own: below 1
            where a row holds more than the middle one.

        Raises:
            ValueError: As `open_scan`, or no such layer: see `head_of`.
        """
        with open_scan(model, images, labels=labels, device=device) as inputs:
            head = head_of(inputs.model, inputs.images[: self.probes])
            if head is None:
                raise ValueError(
                    "expected logits that a linear layer of the model's own weights gives, found "
                    "none: its last layer is constant, quantised or of another kind"
                )
            sums, notes = positive_sums(head), inputs.notes
        if not float(sums.median()) > 0:
            raise ValueError("expected rows that differ in the last linear layer, got equal ones")
        return judge_scan(
            self.name,
            sums.quantile(0.5) / sums.clamp(min=1e-6 * float(sums.max())),
            torch.ones_like(sums),  # no label is reached: all may be compared
            model=model,
            images=images,
            settings=self.settings,
            floor=0.0,
            alpha=self.alpha,
            max_ratio=self.max_ratio,
            seed=seed,
            notes=notes,
        )


PRESETS: dict[str, dict[str, Any]] = {"fast": {}, "paper": {}}


def head_of(model: nn.Module, images: Tensor) -> Tensor | None:
    """The weights of a classifier's last linear layer, float64 ``(K, D)``; None if it has none.

    It is known by what it does, not by its name, so that a graph from any file will do: the
    derivative of the difference of two logits is +h in the row of the one, -h in that of the other
    (h being what the layer reads), and zero in all others. Softmax changes nothing of this, nor
    does a mean over places behind a 1 x 1 convolution. The layers of several classifiers whose
    logits are added up stand side by side.

    Args:
        model: Images ``(N, C, H, W)`` in [0, 1] to logits ``(N, K)``, in eval mode.
        images: Some, of which that with the two closest logits is taken.
    """
    logits = predict(model, images)
    two = logits.topk(2)
    nearest = int((two.values[:, 0] - two.values[:, 1]).argmin())
    first, second = two.indices[nearest].tolist()
    classes = logits.shape[1]
    named = itertools.chain(model.parameters(), model.buffers())
    tensors = [t for t in named if t.is_floating_point() and t.ndim > 1 and classes in t.shape[:2]]
    frozen = [t for t in tensors if not t.requires_grad]
    if not tensors:
        return None
    try:
        for tensor in frozen:
            tensor.requires_grad_(True)
        with torch.enable_grad():
            outputs = model(images[nearest : nearest + 1])[0]
            gradients = torch.autograd.grad(
                outputs[first] - outputs[second], tensors, allow_unused=True
            )
    finally:
        for tensor in frozen:
            tensor.requires_grad_(False)
    rows = [
        _rows(tensor, axis)
        for tensor, gradient in zip(tensors, gradients, strict=True)
        if gradient is not None
        for axis in _axes(tensor, classes)
        if _tells_apart(_rows(gradient, axis), first, second)
    ]
    return torch.cat(rows, dim=1) if rows else None


def positive_sums(head: Tensor) -> Tensor:
    """Of every row ``(K, D)`` the sum of what it holds above the mean row, float64 ``(K,)``.

    Logits matter by their differences alone, so what is common to all rows says nothing.
    """
    return (head - head.mean(0)).clamp(min=0).sum(1)


def _axes(tensor: Tensor, classes: int) -> list[int]:
    """The axes of a weight that may be the classes': of a square one either."""
    return [axis for axis in (0, 1) if tensor.shape[axis] == classes]


def _rows(tensor: Tensor, axis: int) -> Tensor:
    return tensor.detach().movedim(axis, 0).flatten(1).double().cpu()


def _tells_apart(gradient: Tensor, first: int, second: int) -> bool:
    """Whether rows ``(K, D)`` are opposite for two labels, and zero for all others."""
    largest = float(gradient.abs().max())
    rest = gradient.clone()
    rest[[first, second]] = 0
    opposite = gradient[first] + gradient[second]
    left = max(float(rest.abs().max()), float(opposite.abs().max()))
    return largest > 0 and left <= _EXACT * largest
