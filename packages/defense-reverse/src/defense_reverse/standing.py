"""What both engines of a scan give, and the file that a killed scan goes on from."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from defense_reverse.config import ReverseConfig
from defense_reverse.generator import UNetGenerator
from defense_reverse.trigger import ReversedTrigger
from wm_inject.core.resume import fingerprint, load_state, save_state

_KIND = "reverse-scan"


class Reversed(NamedTuple):
    """What became of all labels."""

    triggers: dict[int, ReversedTrigger]
    scores: dict[int, float]  # residuals at equal effort, see `Race.compare`
    steps: dict[int, int]  # how many each label took
    left_at: dict[int, int]  # the milestone at which a label left the race


class Task(NamedTuple):
    """One scan for an engine: everything that decides what it finds.

    Args:
        model: Images in [0, 1] to logits, in eval mode and frozen (`wm_victim.inference.frozen`).
        images: Clean float32 ``(N, C, H, W)`` in [0, 1], on the model's device.
        labels: int64 ``(N,)`` in 0 .. num_classes - 1, of at least two classes, there as well.
        num_classes: Labels to reverse.
        config: Settings.
        start: The generator that all labels start from; not changed.
        seed: Seeds every label's order of images alike.
    """

    model: nn.Module
    images: Tensor
    labels: Tensor
    num_classes: int
    config: ReverseConfig
    start: UNetGenerator
    seed: int = 0

    def others(self, label: int) -> Tensor:
        """Where the images are that are not of this class, int64 on the CPU."""
        return (self.labels.cpu() != label).nonzero().flatten()


def settings(config: ReverseConfig) -> dict[str, Any]:
    """The configuration, ready for JSON."""
    lists = {"lambdas": list(config.lambdas), "milestones": list(config.milestones)}
    return {**asdict(config), **lists}


class Keeper:
    """Keeps the state of a scan in a file; without a path it keeps nothing.

    Args:
        path: The file, or None.
        task: The scan whose state it is: the state of another one is refused.
    """

    def __init__(self, path: Path | None, task: Task) -> None:
        self._path = path
        self._run: dict[str, Any] = {}
        if path is not None:
            networks = (*task.model.state_dict().values(), *task.start.state_dict().values())
            self._run = {
                "config": settings(task.config),
                "seed": task.seed,
                "data": fingerprint(task.images, task.labels),
                "networks": fingerprint(*networks),
            }

    def save(self, state: Any) -> None:
        """Write the state, as `wm_inject.core.resume.save_state` does."""
        if self._path is not None:
            save_state(self._path, state, kind=_KIND, run=self._run)

    def load(self) -> Any:
        """The state to go on from, or None.

        Raises:
            ValueError: The file is damaged, or belongs to another scan.
        """
        if self._path is None:
            return None
        return load_state(self._path, kind=_KIND, run=self._run)

    def remove(self) -> None:
        """Delete the file: the scan is complete."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
