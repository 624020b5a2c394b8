"""BTI-DBF's unlearning: reverse a trigger, unlearn it in a copy, and repeat."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defense_nc.batches import training_batches
from defense_nc.mitigations import check_repair, trainable
from defense_nc.protocols import Repaired
from defense_reverse.detectors.bti_dbf import frequent_label, invert
from defense_reverse.detectors.bti_losses import BtiDbfConfig
from defense_reverse.detectors.common import check_settings, open_split
from defense_reverse.detectors.split import split_at_last_map
from defense_reverse.generator import UNetGenerator
from defense_reverse.label_state import descend
from wm_inject.core.plan import Trigger
from wm_inject.core.presets import preset_of
from wm_inject.core.progress import progress as show_progress
from wm_inject.core.randomness import seeded


@dataclass(frozen=True, kw_only=True)
class BtiDbfUnlearning:
    """Rounds of inversion and unlearning.

    Args:
        inversion: How a trigger is reversed, in every round.
        rounds: How often.
        steps: Steps of unlearning, all rounds together, at least one a round.
        batch_size: Images per step of unlearning, at least 2.
        lr: Adam's learning rate.
        trigger_share: Share of a batch that goes through the generator, in (0, 1].

    Source: Xu et al. 2024 and its released code. The label of the first round is the target of all
        later ones.
    """

    name: ClassVar[str] = "bti-dbf"
    inversion: BtiDbfConfig = field(default_factory=BtiDbfConfig)
    rounds: int = 2
    steps: int = 200
    batch_size: int = 64
    lr: float = 1e-4
    trigger_share: float = 0.1

    def __post_init__(self) -> None:
        check_settings(self, ("rounds",), ("lr",))
        if self.steps < self.rounds or self.batch_size < 2:
            raise ValueError(
                "expected a step for each round and batch_size >= 2, "
                f"got {self.steps} steps, {self.rounds} rounds, batch_size {self.batch_size}"
            )
        if not 0 < self.trigger_share <= 1:
            raise ValueError(f"expected trigger_share in (0, 1], got {self.trigger_share}")

    @classmethod
    def preset(cls, name: str = "fast", **changes: Any) -> BtiDbfUnlearning:
        """Settings by name, with changes.

        "paper" is five rounds of thirty passes over 2,500 images; "fast" is two rounds of a
        hundred steps.
        """
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
        """Unlearn what the inversion finds in a copy of the model.

        The log has the settings and, per round, the label and the mean losses.

        Raises:
            ValueError: Images of one class, or a model that cannot be split.
        """
        check_repair(model, images, labels)
        cleaned = copy.deepcopy(model)
        parameters = trainable(cleaned)
        device = parameters[0].device
        images, labels = images.to(device), labels.to(device)
        optimizer = torch.optim.Adam(parameters, lr=self.lr)
        generator: UNetGenerator | None = None
        target: int | None = None
        rounds: list[dict[str, Any]] = []
        for turn in show_progress(range(self.rounds), desc="rounds", enabled=progress):
            with open_split(cleaned, images, labels=labels) as inputs:
                generator = invert(
                    inputs, self.inversion, seed=seed + turn, target=target, start=generator
                ).generator
                label, share = frequent_label(inputs, generator, self.inversion, seed=seed)
            target = label if target is None else target
            steps = self.steps // self.rounds + (turn < self.steps % self.rounds)
            loss = self._unlearn(
                cleaned, optimizer, generator, images, labels, steps=steps, seed=seed + turn
            )
            rounds.append({"label": label, "share": share, **loss})
        log = {"settings": asdict(self), "target": target, "rounds": rounds}
        return Repaired(cleaned.eval(), log)

    def _unlearn(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        generator: UNetGenerator,
        images: Tensor,
        labels: Tensor,
        *,
        steps: int,
        seed: int,
    ) -> dict[str, float]:
        """Train the model on batches with a few generated images; the mean losses."""
        split = split_at_last_map(model)
        random = torch.Generator().manual_seed(seed)
        totals = {"prediction": 0.0, "features": 0.0}
        # Dropout draws from the global generators.
        with seeded(seed, images.device), torch.enable_grad():
            model.train()
            for rows in training_batches(len(images), self.batch_size, steps, random):
                batch, goal = images[rows.to(images.device)], labels[rows.to(images.device)]
                share = max(1, round(self.trigger_share * len(batch)))
                chosen = torch.randperm(len(batch), generator=random)[:share].to(batch.device)
                mixed = batch.clone()
                with torch.no_grad():
                    mixed[chosen] = generator(batch[chosen])
                features = split.features(mixed)
                prediction = F.cross_entropy(split.head(features), goal)
                drift = F.mse_loss(split.features(batch), features)
                descend(optimizer, prediction + drift)
                totals["prediction"] += float(prediction.detach()) / steps
                totals["features"] += float(drift.detach()) / steps
        model.eval()
        return totals


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "inversion": BtiDbfConfig.preset("paper"),
        "rounds": 5,
        "steps": 5 * 30 * 20,
        "batch_size": 128,
    },
    "fast": {},
}
