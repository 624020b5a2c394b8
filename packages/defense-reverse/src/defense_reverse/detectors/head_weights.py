"""Head weights: does a label's row of the last linear layer speak for more than its own images?

In a clean classifier a label's weights point to what sets the features of its own images apart. A
backdoor's label has weights for the features of the trigger beside them, which no clean image has.
Nothing is searched: one pass of the images at any size, and seconds of work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from defense_nc.config import check_rule
from defense_nc.scan_inputs import ScanInputs, open_scan
from defense_nc.verdict import ScanReport, judge_scan
from defense_nc.verdict.abstention import needed
from defense_reverse.detectors.common import check_settings
from defense_reverse.linear_head import (
    FEW,
    NO_HEAD,
    HeadPart,
    find_head,
    read_features,
    readable,
)
from wm_inject.core.presets import preset_of
from wm_victim.inference import predict


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
            head = find_head(inputs.model, inputs.images[:FEW])
            if not head:
                raise ValueError(NO_HEAD)
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
        answers = torch.where(readable(inputs.model, logits), logits.argmax(1), -1)
        order = torch.randperm(len(answers), generator=torch.Generator().manual_seed(seed))
        order = order.to(answers.device)
        own = [order[answers[order] == label] for label in range(inputs.num_classes)]
        known = torch.tensor([len(indices) >= self.least for indices in own])
        # A mean of fewer images is further from the truth: all are of equally many.
        count = min([self.most, *(len(i) for i in own if len(i) >= self.least)])
        nothing = torch.full((sum(p.rows.shape[1] for p in head),), torch.nan, dtype=torch.float64)
        means = [
            read_features(inputs.model, inputs.images[indices[:count]], head).mean(0)
            if known[label]
            else nothing
            for label, indices in enumerate(own)
        ]
        return torch.stack(means), known


PRESETS: dict[str, dict[str, Any]] = {"fast": {}, "paper": {"most": 500}}


def refusal(model: nn.Module, images: Tensor, labels: Tensor | None = None) -> str | None:
    """Why `HeadWeights` cannot scan a model, None if it can.

    Args:
        labels: Believed to be the answers to the images, which are not asked for here.
    """
    head = find_head(model, images[:FEW])
    if not head:
        return NO_HEAD
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
