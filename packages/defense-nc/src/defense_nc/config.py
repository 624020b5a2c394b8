"""The settings of Neural Cleanse, and its presets."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from wm_inject.core.presets import preset_of

_SCHEDULES = ("original", "ports")
_PRECISIONS = ("auto", "float32", "bfloat16")
_STARTS = ("random", "ones", "faint")


def check_rule(alpha: float, max_ratio: float = 1.0) -> None:
    """Raise ``ValueError`` unless alpha is in (0, 1) and max_ratio in (0, 1]."""
    if not 0 < alpha < 1:
        raise ValueError(f"expected alpha in (0, 1), got {alpha}")
    if not 0 < max_ratio <= 1:
        raise ValueError(f"expected max_ratio in (0, 1], got {max_ratio}")


@dataclass(frozen=True)
class NCConfig:
    """Search settings of Neural Cleanse. The defaults are the preset "fast".

    Args:
        steps: Steps of the schedule, at most.
        batches: Mini-batches per step.
        schedule: "original" starts with a free mask (cost 0); "ports" begins at ``init_cost``.
        starts: One search each, the smallest result counts: "random" draws mask and pattern
            uniformly, as the original does; "ones" starts from a white mask of 0.88, as the ports
            do; "faint" draws the mask below 0.2, nearer to where searches end (ours). A single
            search can end in a mask several times too large, with BadNets on MNIST every second.
        init_cost: The first cost above zero, per pixel of mask.
        threshold: Share of a step's images that must reach the label, in (0, 1].
        patience: Steps in a row above (below) the threshold before the cost rises (falls).
        multiplier: The cost rises by this factor, and falls by its power of 1.5.
        early_stop: Stop when the best mask improves no more.
        early_stop_threshold: An improvement is a norm below this share of the best one so far.
        early_stop_patience: Steps in a row without one.
        fallbacks: How many of the best masks to keep. A mask shrinks on during the step that it is
            judged by; where the best then falls short of ``floor``, the next one counts. 1 takes
            the best in any case, as the paper does.
        floor: A label whose final trigger reaches fewer images than this has no comparable score.
        name: The preset's name, with a star if other fields differ from that preset's.
        engine: "stacked" searches all labels at once, "single" one after another.
        stack: Images of one pass through the victim, at most. None: 256 on a CPU, 8192 on a GPU.
        race: Labels that can no longer become outliers stop early (`LabelHalving`).
        milestones: The steps after which labels are compared, rising; those beyond ``steps`` are
            ignored.
        candidates: Labels with the smallest masks that go on from the last milestone; twice as many
            from the one before, and so on.
        references: Control labels around the median that go on with them.
        calm: All stop at the last milestone if the smallest mask is above this share of the median.
        precision: "auto" takes bfloat16 for the victim's passes where the hardware has it. Masks,
            their optimiser and the final success rates are always float32.

    Source: Neural Cleanse (Wang 2019), its released code, and two PyTorch ports of it.
    """

    steps: int = 64
    batches: int = 2
    batch_size: int = 32
    lr: float = 0.25
    betas: tuple[float, float] = (0.5, 0.9)
    schedule: Literal["original", "ports"] = "original"
    starts: tuple[Literal["random", "ones", "faint"], ...] = ("random", "random", "faint")
    init_cost: float = 1e-2
    threshold: float = 0.99
    patience: int = 2
    multiplier: float = 2.0
    early_stop: bool = True
    early_stop_threshold: float = 0.99
    early_stop_patience: int = 10
    fallbacks: int = 8
    floor: float = 0.9
    name: str = "fast"
    engine: Literal["stacked", "single"] = "stacked"
    stack: int | None = None
    race: bool = True
    milestones: tuple[int, ...] = (12, 24)
    candidates: int = 3
    references: int = 3
    calm: float = 0.75
    precision: Literal["auto", "float32", "bfloat16"] = "auto"

    def __post_init__(self) -> None:
        counts = ("steps", "batches", "batch_size", "patience", "early_stop_patience", "fallbacks")
        for name in counts:
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} >= 1, got {getattr(self, name)}")
        for name in ("lr", "init_cost"):
            if not getattr(self, name) > 0:
                raise ValueError(f"expected {name} > 0, got {getattr(self, name)}")
        for name in ("threshold", "floor", "early_stop_threshold"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"expected {name} in (0, 1], got {getattr(self, name)}")
        if not self.multiplier > 1:
            raise ValueError(f"expected a multiplier > 1, got {self.multiplier}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"expected two betas in [0, 1), got {self.betas}")
        known = self.starts and set(self.starts) <= set(_STARTS)
        if self.schedule not in _SCHEDULES or not known:
            raise ValueError(
                f"expected schedule in {', '.join(_SCHEDULES)} and starts from "
                f"{', '.join(_STARTS)}, got {self.schedule!r}, {self.starts!r}"
            )
        self._check_engine()
        base = self.name.rstrip("*")
        if base in PRESETS:
            unchanged = all(
                getattr(self, f.name) == PRESETS[base].get(f.name, f.default)
                for f in fields(self)
                if f.name != "name"
            )
            object.__setattr__(self, "name", base if unchanged else f"{base}*")

    def _check_engine(self) -> None:
        for name in ("stack", "candidates", "references"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"expected {name} >= 1, got {value}")
        if self.engine not in ("stacked", "single") or self.precision not in _PRECISIONS:
            raise ValueError(
                f"expected engine stacked or single and precision in {', '.join(_PRECISIONS)}, "
                f"got {self.engine!r}, {self.precision!r}"
            )
        rising = list(self.milestones) == sorted(set(self.milestones))
        if not self.milestones or not rising or self.milestones[0] < 1:
            raise ValueError(f"expected rising milestones >= 1, got {self.milestones}")
        if not 0 < self.calm <= 1:
            raise ValueError(f"expected calm in (0, 1], got {self.calm}")
        if self.race and self.engine == "single":
            raise ValueError("expected race=False with engine='single': one label is not compared")

    @classmethod
    def preset(cls, name: str = "fast", **changes: Any) -> NCConfig:
        """Named settings with some of them changed.

        Verdicts are calibrated for "fast". "robust" takes more and smaller steps from four starts;
        "reference" is robust with one label after another, in float32, and no label stops early.
        "paper" is the original's example script: up to 1000 steps of 31 batches per label. "ports"
        is what the PyTorch ports do (their early stop as written never stops; this one does).
        """
        return preset_of(cls, PRESETS, name, **{"name": name, **changes})


_ROBUST: dict[str, Any] = {
    "steps": 150,
    "batches": 4,
    "lr": 0.1,
    "init_cost": 1e-3,
    "patience": 3,
    "early_stop_patience": 15,
    "starts": ("ones", "random", "random", "faint"),
    "milestones": (20, 40),
}
_REFERENCE: dict[str, Any] = {**_ROBUST, "race": False, "precision": "float32"}
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        **_REFERENCE,
        "steps": 1000,
        "batches": 31,
        "patience": 5,
        "early_stop_threshold": 1.0,
        "early_stop_patience": 25,
        "fallbacks": 1,
        "starts": ("random",),
    },
    "ports": {
        **_REFERENCE,
        "steps": 50,
        "batches": 31,
        "batch_size": 64,
        "schedule": "ports",
        "starts": ("ones",),
        "threshold": 0.98,
        "patience": 5,
        "early_stop_patience": 25,
        "fallbacks": 1,
    },
    "robust": _ROBUST,
    "reference": {**_REFERENCE, "engine": "single"},
    "fast": {},
}
