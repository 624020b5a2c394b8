"""How each backdoor was learned: in how many steps, after how much poison, at what price."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from wm_eval.attacks.gather import (
    CLEAN,
    RECIPES,
    TITLES,
    AttackRecords,
    Number,
    Run,
    describe,
)
from wm_eval.attacks.render import Page
from wm_eval.attacks.spread import counted, over_seeds, plus_minus
from wm_eval.tables import ABSENT, Table, percent, points

LEARNED = 0.9  # attack success from which a backdoor counts as learned
ALLOWED_LOSS = 0.03  # of clean accuracy against the clean victim of the same seed
_TITLES = {
    "plain": "How each backdoor was learned",
    "corrupted": "How each backdoor was learned by victims trained under corruptions",
}


def learning(study: AttackRecords) -> Page:
    """Steps, poison exposures, final attack success and accuracy against the clean victim.

    Args:
        study: The records.

    Returns:
        For each recipe a table of attacks and, behind it, a line for every victim that missed 90 %
        attack success or lost more than 3 points of clean accuracy.
    """
    numbers, tables = [], []
    order = study.attacks()
    attacked = [run for run in study.victims if run.attack != CLEAN]
    attacked.sort(key=lambda run: (order.index(run.attack), run.seed))
    for recipe in RECIPES:
        runs = [run for run in attacked if run.recipe == recipe]
        if not runs:
            continue
        mine = [number for run in runs for number in _of_victim(study, run)]
        numbers += mine
        tables.append(_learning_table(study, recipe, runs, mine))
        if misses := [line for run in runs for line in _miss(study, run)]:
            headers = ("attack", "seed", "miss", "what else is known")
            title = f"Misses, {recipe} recipe"
            tables.append(Table(f"misses-{recipe}", title, headers, tuple(misses)))
    title = "How the backdoors were learned"
    return Page("learning", title, describe(study), tuple(tables), tuple(numbers), study.name)


def _of_victim(study: AttackRecords, run: Run) -> list[Number]:
    victim, cell = study.victims[run], study.cells.get(run)
    found: dict[str, float | None] = {
        "steps": victim["steps"],
        "poisoned": victim["poisoned"],
        "poisoned_of_target": victim.get("poisoned_of_target"),
        "learned_epoch": victim["learned"] and victim["learned"]["epoch"],
        "exposures": victim["learned"] and victim["learned"]["exposures"],
    }
    if cell is not None:
        found["asr"] = cell["corruptions"].get("none", {}).get("asr")
        found["cda_gap"] = cell["cda_gap"]["value"]
    losses = _losses(victim)
    if losses:
        found |= {"poison_loss_first": losses[0], "poison_loss_last": losses[-1]}
    return [
        Number(run.recipe, run.attack, measure, "", "measured", run.seed, float(value))
        for measure, value in found.items()
        if value is not None
    ]


def _learning_table(
    study: AttackRecords, recipe: str, runs: Sequence[Run], numbers: Sequence[Number]
) -> Table:
    attacks = dict.fromkeys(run.attack for run in runs)
    rows = tuple(_row(study, [r for r in runs if r.attack == a], numbers) for a in attacks)
    headers = (
        "attack",
        "steps",
        "poisoned images an epoch",
        "learned",
        "exposures until learned",
        "final ASR (%)",
        "CDA against clean (points)",
        "share of the target class poisoned",
        "loss on poisoned images",
    )
    note = (
        f"Learned: attack success of at least {percent(LEARNED, digits=0)} on held-out images at "
        "the end of an epoch. Exposures: poisoned images seen by then, repetitions included. The "
        "share of the target class is that of a clean-label attack, which poisons no other "
        "class. The loss is the cross-entropy to the target on held-out images with the trigger "
        "alone, after the first and after the last epoch. One seed: the difference comes with "
        "its 95 % interval, paired by image; more: mean ± sample standard deviation."
    )
    return Table(f"learning-{recipe}", _TITLES[recipe], headers, rows, note)


def _row(study: AttackRecords, runs: Sequence[Run], numbers: Sequence[Number]) -> tuple[str, ...]:
    attack = runs[0].attack

    def values(measure: str) -> list[float]:
        return [n.value for n in numbers if (n.attack, n.measure) == (attack, measure)]

    def mean(measure: str, **how: Any) -> str:
        return plus_minus(over_seeds(numbers, attack, measure, ""), **how)

    learned = values("exposures")
    losses = [over_seeds(numbers, attack, f"poison_loss_{when}", "") for when in ("first", "last")]
    return (
        TITLES.get(attack, attack),
        counted(map(int, values("steps"))),
        counted(map(int, values("poisoned"))),
        f"{len(learned)} of {len(runs)}",
        counted(map(int, learned)) if learned else "not learned",
        mean("asr", factor=100, digits=1),
        _gap(study, runs, mean("cda_gap", factor=100, digits=1, sign=True)),
        mean("poisoned_of_target", digits=2),
        " to ".join(f"{loss.mean:.2f}" for loss in losses if loss is not None) or ABSENT,
    )


def _gap(study: AttackRecords, runs: Sequence[Run], mean: str) -> str:
    """With its own interval if there is one seed, which has no spread."""
    cells = [study.cells[run] for run in runs if run in study.cells]
    return points(cells[0]["cda_gap"]) if len(cells) == 1 else mean


def _miss(study: AttackRecords, run: Run) -> list[tuple[str, ...]]:
    """A line for a victim that was measured and missed; those that were not are in Table 1."""
    cell, victim = study.cells.get(run), study.victims[run]
    if cell is None or "none" not in cell["corruptions"]:
        return []
    asr, gap = cell["corruptions"]["none"]["asr"], cell["cda_gap"]
    said = []
    if asr < LEARNED:
        said.append(f"ASR {percent(asr)}, below {percent(LEARNED, digits=0)}")
    if gap["value"] < -ALLOWED_LOSS:
        said.append(f"CDA {points(gap)} points against the clean victim")
    if not said:
        return []
    title = TITLES.get(run.attack, run.attack)
    return [(title, str(run.seed), "; ".join(said), _known(victim))]


def _known(victim: Mapping[str, Any]) -> str:
    """What a record says about the cause, as far as it says anything."""
    learned, losses = victim["learned"], _losses(victim)
    said = [
        f"{victim['steps']} steps",
        "at 90 % in no epoch"
        if learned is None
        else f"at 90 % in epoch {learned['epoch']}, after {learned['exposures']} exposures",
    ]
    if (share := victim.get("poisoned_of_target")) is not None:
        said.append(f"clean-label, {percent(share)} of the target class poisoned")
    if losses:
        said.append(f"loss on poisoned images {losses[0]:.2f} to {losses[-1]:.2f}")
    return "; ".join(said)


def _losses(victim: Mapping[str, Any]) -> list[float]:
    """The loss on poisoned images alone, epoch by epoch."""
    watched = victim["history"].get("watched") or []
    return [seen["poison_loss"] for seen in watched if seen.get("poison_loss") is not None]


__all__ = ["ALLOWED_LOSS", "LEARNED", "learning"]
