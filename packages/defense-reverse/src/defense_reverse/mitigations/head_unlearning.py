"""Unlearning in the last layer: a label's weights are fitted anew, against what they spoke for.

A backdoor's label has weights for the features of the trigger, which clean images do not have. Its
row is fitted again, to clean images and to clean images whose features are moved along the old row
and that keep their label. Nothing is searched and no other weight changes: seconds at any size.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defense_nc.mitigations import check_repair
from defense_nc.protocols import Repaired
from defense_reverse.linear_head import FEW, NO_HEAD, find_head, read_features, readable
from wm_inject.core.plan import Trigger
from wm_inject.core.presets import preset_of
from wm_victim.inference import device_of, predict

_SHARES = (0.25, 0.5, 1.0)  # of the longest shift
_STEPS = 200  # of L-BFGS, at most; the loss is convex


@dataclass(frozen=True, kw_only=True)
class HeadUnlearning:
    """Fit the last layer's rows of suspected labels anew, against shifts along the old rows.

    Args:
        reach: The longest shift, in units of how far the labels' mean features lie from their
            common mean, on average; a half and a quarter of it are taken too.
        penalty: Weight of half the squared norm of the rows, for features of length 1 on average.
        most: Images that are read at most.

    Source: ours.
    """

    name: ClassVar[str] = "head-unlearning"
    reach: float = 4.0
    penalty: float = 1e-4
    most: int = 2000

    def __post_init__(self) -> None:
        if not 0 < self.reach < float("inf") or not 0 < self.penalty < float("inf"):
            raise ValueError(
                f"expected reach and penalty above 0, got {self.reach} and {self.penalty}"
            )
        if self.most < 2:
            raise ValueError(f"expected most >= 2, got {self.most}")

    @classmethod
    def preset(cls, name: str = "fast", **changes: Any) -> HeadUnlearning:
        """Settings by name, with changes: "paper" and "fast" are the same, there is no paper."""
        return preset_of(cls, PRESETS, name, **changes)

    def repair(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        *,
        triggers: Mapping[int, Trigger] | None = None,
        seed: int = 0,
        progress: bool = False,
    ) -> Repaired:
        """Fit the rows of the labels in ``triggers`` anew, in a copy; the triggers are not used.

        The log holds the labels.

        Raises:
            ValueError: ``triggers`` of None or of a label that the model does not have, a model
                without a last linear layer (`defense_reverse.linear_head.find_head`), or a label
                of which there are no images, or no others.
        """
        num_classes = check_repair(model, images, labels)
        if triggers is None:
            raise ValueError("expected the suspected labels, got None")
        suspected = sorted(triggers)
        if not all(0 <= label < num_classes for label in suspected):
            raise ValueError(f"expected labels in 0 .. {num_classes - 1}, got {suspected}")
        fitted = copy.deepcopy(model).eval()
        if not suspected:
            return Repaired(fitted, {"labels": []})
        chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        chosen = chosen[: self.most].to(labels.device)
        read, truth = images[chosen].to(device_of(fitted)), labels[chosen].cpu()
        head = find_head(fitted, read[:FEW])
        if not head:
            raise ValueError(NO_HEAD)
        logits = predict(fitted, read)
        kept = readable(fitted, logits)
        truth = truth[kept.cpu()]
        for label in suspected:
            if bool((truth == label).all()) or not bool((truth == label).any()):
                raise ValueError(f"expected images of label {label} and of others")
        features = read_features(fitted, read[kept], head)
        rows = torch.cat([part.rows for part in head], dim=1)
        biases = logits[kept].double().cpu() - features @ rows.T
        new = self._fitted(rows, features, biases, truth, suspected)
        widths = [part.rows.shape[1] for part in head]
        for part, columns in zip(head, new.split(widths, dim=1), strict=True):
            part.write(columns)
        return Repaired(fitted, {"labels": suspected})

    def _fitted(
        self,
        rows: Tensor,
        features: Tensor,
        biases: Tensor,
        labels: Tensor,
        suspected: Sequence[int],
    ) -> Tensor:
        """All rows ``(K, D)``, those of ``suspected`` new; ``biases`` are every image's, (N, K)."""
        length = features.square().sum(1).mean().sqrt()
        features, rows = features / length, rows * length
        shifts = self.reach * _directions(rows) * _distance(features, labels)
        # A feature does not go below what it is in clean images: rectified ones stay above 0.
        lowest, moved, source = features.amin(0), [features], [torch.arange(len(labels))]
        for label in suspected:
            others = (labels != label).nonzero().flatten()
            for share in _SHARES:
                moved.append(torch.maximum(features[others] + share * shifts[label], lowest))
                source.append(others)
        all_features, index = torch.cat(moved), torch.cat(source)
        fixed = rows.clone()
        fixed[suspected] = 0
        logits = all_features @ fixed.T + biases[index]
        # Clean images count as much as the moved ones, which are of other labels; a label's own
        # images count twice, so that it keeps its share of the whole.
        weights = torch.full((len(index),), 1 / len(suspected) / len(_SHARES), dtype=torch.float64)
        weights[: len(labels)] = 1
        weights[: len(labels)][torch.isin(labels, torch.tensor(suspected))] = 2
        weights /= weights.sum()
        new = torch.zeros(len(suspected), rows.shape[1], dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([new], max_iter=_STEPS, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            with torch.enable_grad():
                both = logits.index_add(1, torch.tensor(suspected), all_features @ new.T)
                errors = F.cross_entropy(both, labels[index], reduction="none")
                loss = (errors * weights).sum() + self.penalty * new.square().sum() / 2
                loss.backward()
            return loss

        optimizer.step(closure)
        fixed[suspected] = new.detach()
        return fixed / length


PRESETS: dict[str, dict[str, Any]] = {"fast": {}, "paper": {}}


def _directions(rows: Tensor) -> Tensor:
    """What every row has above the mean row, of length 1."""
    own = rows - rows.mean(0)
    return own / own.norm(dim=1, keepdim=True).clamp(min=1e-30)


def _distance(features: Tensor, labels: Tensor) -> Tensor:
    """How far the labels' mean features lie from their common mean, on average."""
    means = torch.stack([features[labels == label].mean(0) for label in labels.unique()])
    return (means - means.mean(0)).norm(dim=1).mean()
