"""Head weights: does a label's row of the last linear layer speak for more than its own images?

In a clean classifier a label's weights point to what sets the features of its own images apart. A
backdoor's label has weights for the features of the trigger beside them, which no clean image has.
Nothing is searched: one pass of the images at any size, and seconds of work.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from defense_nc.config import check_rule
from defense_nc.scan_inputs import ScanInputs, open_scan
from defense_nc.verdict import ScanReport, judge_scan
from defense_nc.verdict.abstention import needed
from defense_reverse.detectors.common import check_settings
from wm_inject.core.presets import preset_of
from wm_victim.inference import images_a_pass, predict
from wm_victim.logits import Logits

_EXACT = 1e-3  # of a gradient's largest number: what rounding may leave where there is nothing
_FEW = 8  # images that the layer is found with
_NO_HEAD = (
    "expected logits that a linear layer of the model's own weights gives, found none: the last "
    "layer is constant, quantised or of another kind"
)
_SURE = 20.0  # distance of two logits; probabilities that lie further apart have no derivative left


@dataclass(frozen=True)
class HeadWeights:
    """The weights of the last linear layer as a `defense_nc.Detector`.

    Args:
        most: Images of a label at most; the same number of every label, as far as it goes.
        least: With fewer images a label is not compared.
        alpha: As for `defense_nc.NeuralCleanse`, and so is ``max_ratio``.

    Source: ours. That the row of a backdoor's label is unusual: Fields, Samragh, Javaheripi,
        Koushanfar and Javidi, "Trojan Signatures in DNN Weights" (ICCV Workshops 2021). A label
        with more training images than the others has a heavier row too: its own images explain it.
    """

    name: ClassVar[str] = "head"
    most: int = 50
    least: int = 5
    alpha: float = 0.05
    max_ratio: float = 0.5

    def __post_init__(self) -> None:
        check_settings(self, ("most", "least"), ())
        if self.least > self.most:
            raise ValueError(f"expected least <= most, got {self.least} and {self.most}")
        check_rule(self.alpha, self.max_ratio)

    @classmethod
    def preset(cls, name: str = "fast", **changes: Any) -> HeadWeights:
        """Settings by name, with changes. There is no paper: "paper" reads more images."""
        return preset_of(cls, PRESETS, name, **changes)

    @property
    def settings(self) -> Mapping[str, Any]:
        """What is read, ready for JSON."""
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
        """Weigh every label's row, and decide whether one is unusual.

        A label's own images are those that the model calls so, whatever ``labels`` are;
        ``progress`` and ``checkpoint`` are ignored.

        Returns:
            A report whose scores are the median of all labels' `unexplained` weights over a label's
            own: small where there is much. Its rates are 1 for the labels that had enough images,
            which are compared, and 0 for the others.

        Raises:
            ValueError: As `open_scan`, no such layer (see `find_head`), or too few labels with
                images.
        """
        with open_scan(model, images, labels=labels, device=device) as inputs:
            head = find_head(inputs.model, inputs.images[:_FEW])
            if not head:
                raise ValueError(_NO_HEAD)
            means, known = self._means(inputs, head, seed)
            if reason := _too_few(known):
                raise ValueError(reason)
            weights = unexplained(torch.cat([part.rows for part in head], dim=1), means)
            notes = inputs.notes
        middle = float(weights[known].quantile(0.5))
        return judge_scan(
            self.name,
            # Equal rows, or rows that their images explain to the last digit: none stands out.
            middle / weights.clamp(min=1e-6 * middle) if middle > 0 else torch.ones_like(weights),
            known.double(),
            model=model,
            images=images,
            settings=self.settings,
            floor=0.5,
            alpha=self.alpha,
            max_ratio=self.max_ratio,
            seed=seed,
            notes=notes,
        )

    def _means(
        self, inputs: ScanInputs, head: Sequence[HeadPart], seed: int
    ) -> tuple[Tensor, Tensor]:
        """What the layer reads in each label's images, on average, and which labels had enough."""
        logits = predict(inputs.model, inputs.images)
        two = logits.topk(2)
        usable = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
        if isinstance(inputs.model, Logits) and inputs.model.squash is not None:
            usable = (two.values[:, 0] - two.values[:, 1]) < _SURE * inputs.model.factor
        answers = torch.where(usable, two.indices[:, 0], -1)
        order = torch.randperm(len(answers), generator=torch.Generator().manual_seed(seed))
        order = order.to(answers.device)
        own = [order[answers[order] == label] for label in range(inputs.num_classes)]
        known = torch.tensor([len(indices) >= self.least for indices in own])
        # A mean of fewer images is further from the truth: all are of equally many.
        count = min([self.most, *(len(i) for i in own if len(i) >= self.least)])
        read = [
            _mean_read(inputs.model, inputs.images[indices[:count]], label, head)
            if known[label]
            else torch.zeros(sum(part.rows.shape[1] for part in head), dtype=torch.float64)
            for label, indices in enumerate(own)
        ]
        return torch.where(known[:, None], torch.stack(read), torch.nan), known


PRESETS: dict[str, dict[str, Any]] = {"fast": {}, "paper": {"most": 500}}


class HeadPart(NamedTuple):
    """A weight of the model that is a last linear layer, or one of several."""

    tensor: Tensor
    axis: int  # which of its axes are the labels

    @property
    def rows(self) -> Tensor:
        """It as float64 ``(K, D)``, on the CPU."""
        return _rows(self.tensor, self.axis)


def find_head(model: nn.Module, images: Tensor) -> list[HeadPart]:
    """The last linear layer of a classifier; empty if it has none.

    It is known by what it does, not by its name, so that a graph from any file will do: the
    derivative of the difference of two logits is +h in the row of the one, -h in that of the other
    (h being what the layer reads), and zero in all others. Softmax changes nothing of this, nor
    does a mean over places behind a 1 x 1 convolution. Where the logits of several classifiers are
    added up it has several parts.

    Args:
        model: Images ``(N, C, H, W)`` in [0, 1] to logits ``(N, K)``, in eval mode.
        images: Some, of which that with the two closest logits is taken.
    """
    logits = predict(model, images)
    two, classes = logits.topk(2), logits.shape[1]
    nearest = int((two.values[:, 0] - two.values[:, 1]).argmin())
    first, second = two.indices[nearest].tolist()
    named = itertools.chain(model.parameters(), model.buffers())
    tensors = [t for t in named if t.is_floating_point() and t.ndim > 1 and classes in t.shape[:2]]
    gradients = _slopes(model, images[nearest : nearest + 1], tensors)
    return [
        HeadPart(tensor, axis)
        for tensor, gradient in zip(tensors, gradients, strict=True)
        if gradient is not None
        for axis in (0, 1)
        if tensor.shape[axis] == classes and _tells_apart(_rows(gradient, axis), first, second)
    ]


def refusal(model: nn.Module, images: Tensor, labels: Tensor | None = None) -> str | None:
    """Why `HeadWeights` cannot scan a model, None if it can.

    Args:
        labels: Believed to be the answers to the images, which are not asked for here.
    """
    head = find_head(model, images[:_FEW])
    if not head:
        return _NO_HEAD
    if labels is None:
        return None
    counts = labels.bincount(minlength=len(head[0].rows))
    return _too_few(counts.cpu() >= HeadWeights.least)


def _too_few(known: Tensor) -> str | None:
    """Too few labels have images of their own to compare them."""
    least = needed(len(known))
    if int(known.sum()) >= least:
        return None
    return (
        f"expected images that the model calls by at least {least} of its {len(known)} labels, "
        f"got enough of {int(known.sum())}"
    )


def unexplained(rows: Tensor, means: Tensor) -> Tensor:
    """How much of each label's row its own images do not explain, float64 ``(K,)``.

    It is the sum of what the row holds above the mean row, times one less its correlation with what
    sets the label's images apart: their mean less that of all labels. Logits matter by their
    differences alone, so what is common to all rows says nothing.

    Args:
        rows: Of the last layer, ``(K, D)``.
        means: Of what it reads in each label's images, ``(K, D)``; NaN where that is not known, and
            then nothing of that row is explained.
    """
    own, apart = rows - rows.mean(0), means - means.nanmean(0)
    sums = own.clamp(min=0).sum(1)
    x, y = own - own.mean(1, keepdim=True), apart - apart.mean(1, keepdim=True)
    lengths = x.norm(dim=1) * y.norm(dim=1)
    correlations = (x * y).sum(1) / lengths.clamp(min=1e-30)
    return sums * (1 - correlations.nan_to_num(0.0))


def _mean_read(model: nn.Module, images: Tensor, label: int, head: Sequence[HeadPart]) -> Tensor:
    """The mean of what the layer reads in images that are all called ``label``, ``(D,)``.

    Their distances to the second label have this derivative, times their number, in its row.
    """
    total: Tensor | None = None
    for part in images.split(images_a_pass(images, images.device, most=64)):
        slopes = _slopes(model, part, [weight.tensor for weight in head])
        pairs = zip(head, slopes, strict=True)
        rows = [_rows(slope, weight.axis)[label] for weight, slope in pairs if slope is not None]
        total = torch.cat(rows) if total is None else total + torch.cat(rows)
    assert total is not None
    return total / len(images)


def _slopes(model: nn.Module, images: Tensor, tensors: Sequence[Tensor]) -> list[Tensor | None]:
    """Derivatives of the summed distances of the two highest logits."""
    if not tensors:
        return []
    with _differentiable(tensors), torch.enable_grad():
        values = model(images).topk(2).values
        distances = (values[:, 0] - values[:, 1]).sum()
        if not distances.requires_grad:
            return [None] * len(tensors)
        return list(torch.autograd.grad(distances, tensors, allow_unused=True))


@contextmanager
def _differentiable(tensors: Sequence[Tensor]) -> Iterator[None]:
    frozen = [tensor for tensor in tensors if not tensor.requires_grad]
    try:
        for tensor in frozen:
            tensor.requires_grad_(True)
        yield
    finally:
        for tensor in frozen:
            tensor.requires_grad_(False)


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
