"""Judged models, counted: how many were named, and how well scores tell the two kinds apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from defense_nc import Verdict, auroc
from wm_eval.attacks.config import CLEAN
from wm_eval.intervals import Interval, exact_interval
from wm_eval.population.config import EVERYWHERE

_HUGE = 1e9  # stands in for an infinite index


class Scan(NamedTuple):
    """One recorded scan of one model."""

    world: str
    name: str  # of the record
    values: Mapping[str, Any]

    @property
    def attack(self) -> str:
        """The attack that was planted, or "clean"."""
        return str(self.values["attack"])


class Judged(NamedTuple):
    """A model of the test half, judged by what the calibration half taught."""

    scan: Scan
    verdict: Verdict
    suspected: tuple[int, ...]
    p_value: float
    paper_index: float | None  # None for several detectors together
    paper_flagged: tuple[int, ...]

    @property
    def named(self) -> bool:
        """Whether the verdict is "backdoored"."""
        return self.verdict is Verdict.BACKDOORED

    @property
    def right(self) -> bool:
        """Whether it is, and the true target is among the suspected labels."""
        return self.named and self.scan.values["true_target"] in self.suspected


class Rate(NamedTuple):
    """So many of so many, with the exact 95 % interval."""

    hits: int
    n: int

    @property
    def interval(self) -> Interval:
        """Clopper and Pearson's."""
        return exact_interval(self.hits, self.n)


class Row(NamedTuple):
    """One detector and one kind of model; rates are None where there is no such model."""

    detector: str
    attack: str  # or "clean"
    world: str  # or "all"
    trained: int  # models of this kind
    judged: int  # of them, backdoored ones whose attack success reached the floor
    asr_min: float | None
    flagged: Rate | None  # verdict "backdoored"
    named: Rate | None  # with the true target among the suspected labels
    inconclusive: int
    paper_flagged: Rate | None  # index above 2
    paper_named: Rate | None
    auroc: float | None  # of the smallest p-value, against the clean models of the same worlds
    auroc_interval: tuple[float, float] | None
    paper_auroc: float | None  # of the papers' index


def count_rows(detector: str, attack: str, test: Sequence[Judged], floor: float) -> list[Row]:
    """One row for every world that has such models, and one for all if there are several."""
    mine = [j for j in test if j.scan.attack == attack]
    worlds = sorted({j.scan.world for j in mine})
    clean = [j for j in test if j.scan.attack == CLEAN]
    rows = []
    for world in [*worlds, EVERYWHERE] if len(worlds) > 1 else worlds:
        here = [j for j in mine if world in (EVERYWHERE, j.scan.world)]
        peers = [j for j in clean if j.scan.world in {h.scan.world for h in here}]
        rows.append(_row(detector, attack, world, here, peers, floor))
    return rows


def _row(
    detector: str,
    attack: str,
    world: str,
    models: Sequence[Judged],
    clean: Sequence[Judged],
    floor: float,
) -> Row:
    backdoored = attack != CLEAN
    rates = [float(j.scan.values["asr"] or 0.0) for j in models]
    kept = [j for j, asr in zip(models, rates, strict=True) if not backdoored or asr >= floor]
    n, paper = len(kept), all(j.paper_index is not None for j in kept)
    targets = [j.scan.values["true_target"] for j in kept]
    paper_right = sum(t in j.paper_flagged for t, j in zip(targets, kept, strict=True))
    compared = backdoored and bool(kept) and bool(clean)
    truths = torch.tensor([False] * len(clean) + [True] * n)
    # Smaller p-values are more suspicious.
    ours = torch.tensor([-j.p_value for j in (*clean, *kept)], dtype=torch.float64)
    # Infinite where most scores are the same, and then above all others.
    index = torch.tensor([min(j.paper_index or 0.0, _HUGE) for j in (*clean, *kept)]).double()
    return Row(
        detector,
        attack,
        world,
        trained=len(models),
        judged=n,
        asr_min=min((asr for asr in rates if asr >= floor), default=None) if backdoored else None,
        flagged=Rate(sum(j.named for j in kept), n) if n else None,
        named=Rate(sum(j.right for j in kept), n) if n and backdoored else None,
        inconclusive=sum(j.verdict is Verdict.INCONCLUSIVE for j in kept),
        paper_flagged=Rate(sum(bool(j.paper_flagged) for j in kept), n) if n and paper else None,
        paper_named=Rate(paper_right, n) if n and backdoored and paper else None,
        auroc=auroc(ours, truths) if compared else None,
        auroc_interval=auroc_interval(ours, truths) if compared else None,
        paper_auroc=auroc(index, truths) if compared and paper else None,
    )


def auroc_interval(
    scores: torch.Tensor, truths: torch.Tensor, *, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """A 95 % bootstrap interval of `defense_nc.auroc`: models of either kind are drawn anew.

    Where the models are perfectly separated it is a point, however few they are.

    Args:
        scores: Float ``(N,)``, larger for models held to be backdoored.
        truths: bool ``(N,)``, both kinds.
        draws: Bootstrap samples.
        seed: Of the samples.

    Raises:
        ValueError: As `defense_nc.auroc`, or no draws.
    """
    if draws < 1:
        raise ValueError(f"expected draws >= 1, got {draws}")
    auroc(scores, truths)  # refuses what cannot be compared
    generator = torch.Generator().manual_seed(seed)
    low, high = scores[~truths].double(), scores[truths].double()
    wins = (high[:, None] > low[None]).double() + 0.5 * (high[:, None] == low[None]).double()
    times_high, times_low = (_times_drawn(len(x), draws, generator) for x in (high, low))
    found = ((times_high @ wins) * times_low).sum(1) / wins.numel()
    bounds = found.quantile(torch.tensor([0.025, 0.975]).double())
    return float(bounds[0]), float(bounds[1])


def _times_drawn(count: int, draws: int, generator: torch.Generator) -> torch.Tensor:
    """How often each of ``count`` models is in each sample, float64 ``(draws, count)``."""
    drawn = torch.randint(count, (draws, count), generator=generator)
    ones = torch.ones(draws, count, dtype=torch.float64)
    return torch.zeros_like(ones).scatter_add_(1, drawn, ones)


__all__ = ["Judged", "Rate", "Row", "Scan", "auroc_interval", "count_rows"]
