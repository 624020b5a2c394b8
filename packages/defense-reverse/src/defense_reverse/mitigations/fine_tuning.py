"""Plain fine-tuning: more training on clean images, the control of every other mitigation."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from defense_nc.mitigations import Sgd, check_repair, fine_tune, sgd_preset
from defense_nc.protocols import Repaired
from wm_inject.core.plan import Trigger


@dataclass(frozen=True, kw_only=True)
class FineTuning:
    """Fine-tune all layers on the clean images.

    Source: the control of Neural Cleanse, NAD and the reverse-generator paper (section 4.3).
    """

    name: ClassVar[str] = "fine-tuning"
    sgd: Sgd = Sgd()

    @classmethod
    def preset(cls, name: str = "fast", **changes: Any) -> FineTuning:
        """Settings by name, with changes.

        "paper" is what BackdoorBench compares with: 100 passes over 2,500 images in batches of 256.
        "reverse" is the control of the reverse-generator paper: ten passes over 2,500 images at a
        constant 1e-3 (the batch of 32 is ours). "fast" takes 200 batches of 32 at 0.02 (ours): a
        higher rate removes more of a backdoor, and of the accuracy. "batch-128" takes batches of
        128 at 0.01 (ours): accurate networks lose less by it.
        """
        return sgd_preset(cls, PRESETS, name, **changes)

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
        """Fine-tune a copy; frozen parameters stay, batch normalisation adapts to the images.

        The log holds the loss of each tenth of the steps.

        Raises:
            DivergedError: The loss became NaN or infinite.
        """
        check_repair(model, images, labels)
        tuned = copy.deepcopy(model)
        losses = fine_tune(tuned, images, labels, sgd=self.sgd, seed=seed, progress=progress)
        return Repaired(tuned, {"steps": self.sgd.steps, "losses": losses})


PRESETS: dict[str, dict[str, Any]] = {
    "fast": {},
    "batch-128": {"batch_size": 128, "lr": 0.01},
    "paper": {"steps": 1000, "batch_size": 256, "lr": 0.01, "augmentation": "crop-flip"},
    "reverse": {"steps": 790, "lr": 1e-3, "weight_decay": 0.0, "schedule": "constant"},
}
