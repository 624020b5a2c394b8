"""One seed of the experiment: what its stages know, and where they find what others have made."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from wm_eval.attacks.study import AttackStudy
from wm_eval.paper2.config import DetectConfig
from wm_eval.study import load_reversed
from wm_victim import ImageSet, defender_subset


@dataclass(frozen=True)
class Trial:
    """One seed of the experiment.

    Args:
        config: The experiment.
        study: What trains its victims: images, folder, seed and device are its own.
    """

    config: DetectConfig
    study: AttackStudy

    @property
    def seed(self) -> int:
        """Of everything."""
        return self.study.seed

    def victim(self, name: str) -> nn.Module:
        """The backdoored victim, or the clean one."""
        return self.study.victim("plain", name)

    def trigger(self) -> nn.Module:
        """The trigger that was planted, as it left the victim's training."""
        return self.study.trigger(self.config.attack, "plain")

    def defender(self, share: float | None = None) -> ImageSet:
        """The defender's images: those to scan with, or a share of the training images."""
        train = self.study.data.train
        count = self.config.images if share is None else None
        if share is None:
            share = self.config.share
        # Batch normalisation and a comparison of labels both need two.
        count = max(2, round(share * len(train))) if count is None else min(count, len(train))
        return defender_subset(train, count=count, seed=self.seed).to(self.study.device)

    def others(self, count: int) -> ImageSet:
        """Test images of other classes than the target, one class after another."""
        test, target = self.study.test(None), self.config.target
        # The n-th image of every class before the n+1-th of any.
        rank = torch.zeros_like(test.labels)
        for label in test.labels.unique():
            mine = test.labels == label
            rank[mine] = torch.arange(int(mine.sum()), device=rank.device)
        order = rank.argsort(stable=True)
        return test.subset(order[test.labels[order] != target][:count].cpu())

    def reversed_file(self, detector: str, label: int) -> str:
        """Where the trigger is kept that a detector reversed for a label of the attacked victim."""
        attack = self.config.attack
        return f"models/reversed-{detector}-{attack}-{self.seed}-{label}.safetensors"

    def reversed(self, detector: str, label: int) -> nn.Module:
        """That trigger, from its file."""
        path = self.study.space.path(self.reversed_file(detector, label))
        return load_reversed(path).to(self.study.device).eval()
