"""From the stages of a study to units of work that an executor can hand out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from wm_eval.executors import Outcome, Unit
from wm_eval.workspace import Made

if TYPE_CHECKING:
    from wm_eval.attacks.config import Recipe


class Task(NamedTuple):
    """A stage that is to be done."""

    name: str
    attack: str | None
    recipe: Recipe | None
    settings: Mapping[str, Any]
    inputs: tuple[str, ...]
    work: Callable[[Path], Made]


def grouped(tasks: Iterable[tuple[str, Task]]) -> dict[str, list[Task]]:
    """The tasks of every unit, each with the first that names it."""
    groups: dict[str, list[Task]] = {}
    seen = set[str]()
    for name, task in tasks:
        if task.name not in seen:
            seen.add(task.name)
            groups.setdefault(name, []).append(task)
    return groups


def to_units(groups: Mapping[str, Sequence[Task]], work: Callable[..., Outcome]) -> list[Unit]:
    """Units that come after those whose stages they need.

    Args:
        groups: The tasks of every unit.
        work: Does some tasks; called with the set of their names and a `Turn`. It is pickled.
    """
    owner = {task.name: name for name, tasks in groups.items() for task in tasks}
    units = []
    for name, tasks in groups.items():
        needed = {owner[i] for task in tasks for i in task.inputs if i in owner} - {name}
        mine = frozenset(task.name for task in tasks)
        units.append(Unit(name, partial(work, mine), tuple(sorted(needed))))
    return units


__all__ = ["Task", "grouped", "to_units"]
