"""BTI-DBF's unlearning: reverse a trigger, teach a copy that it means nothing, and again."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defense_nc.batches import training_batches
from defense_nc.mitigations import check_repair, trainable
from defense_nc.protocols import Repaired
from defense_reverse.detectors.bti_dbf import frequent_label, invert
from defense_reverse.detectors.bti_losses import BtiDbfConfig
from defense_reverse.detectors.common import check_settings, descend, examine
from defense_reverse.detectors.split import split_at_last_map
from defense_reverse.generator import UNetGenerator
from wm_inject.core.plan import Trigger
from wm_inject.core.progress import progress as show_progress


@dataclass(frozen=True)
class BtiDbf:
    """Rounds of inversion and unlearning. The defaults are the preset "small".

    Args:
        inversion: How a trigger is reversed, in every round.
        rounds: How often.
        steps: Steps of unlearning, all rounds together, at least one a round.
        batch_size: Images per step of unlearning, at least 2.
        lr: Adam's learning rate.
        trigger_share: Share of a batch that goes through the generator, in (0, 1].

    Raises:
        ValueError: A setting outside its range.

    Source: Xu et al. 2024 and its released code.
    """

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
    def preset(cls, name: str, **changes: Any) -> BtiDbf:
        """Settings by name, with changes.

        "paper" is five rounds of thirty passes over 2,500 images; "small" is two rounds of a
        hundred steps.

        Raises:
            ValueError: An unknown name, or a setting outside its range.
        """
        if name not in _PRESETS:
            raise ValueError(f"expected a preset in {', '.join(_PRESETS)}, got {name!r}")
        return replace(_PRESETS[name], **changes)

    @property
    def name(self) -> str:
        """What records and tables call it."""
        return "bti-dbf"

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

        Args:
            model: A classifier that `split_at_last_map` takes; not changed.
            images: Clean float32 ``(N, C, H, W)`` in [0, 1], N >= 2, at least two classes.
            labels: int64 ``(N,)``, the true classes.
            triggers: Not used: each round reverses its own.
            seed: Seeds everything that is drawn.
            progress: Show how far it is.

        Returns:
            The copy, and per round the label found and the mean losses.

        Raises:
            ValueError: As `check_repair`, images of one class, or a model that cannot be split.

        Source: the released code. The label of the first round is asked of all later ones.
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
            with examine(cleaned, images, labels, None) as seen:
                found = invert(
                    seen, self.inversion, seed=seed + turn, target=target, start=generator
                )
                label, share = frequent_label(seen, found.generator, self.inversion, seed=seed)
            generator, target = found.generator, label if target is None else target
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
        devices = [images.device] if images.device.type == "cuda" else []
        # Dropout draws from the global generators: seeded here, and given back as they were.
        with torch.random.fork_rng(devices=devices), torch.enable_grad():
            torch.manual_seed(seed)
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


_PRESETS = {
    "paper": BtiDbf(
        inversion=BtiDbfConfig.preset("paper"), rounds=5, steps=5 * 30 * 20, batch_size=128
    ),
    "small": BtiDbf(),
}
