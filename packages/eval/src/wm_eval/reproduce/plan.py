"""What is run to reproduce both papers, in order of value: every number stands here alone.

The settings of a study are those of its own profile, unless they are named here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Kind = Literal["attacks", "figure3", "detect", "cleaning", "population"]
Scale = Literal["tiny", "small", "paper"]
SCALES: tuple[Scale, ...] = ("tiny", "small", "paper")


@dataclass(frozen=True)
class Part:
    """A study, in a folder of its own.

    Args:
        name: Of the folder.
        kind: What is run.
        title: Its heading.
        data: The data sets that it needs.
        settings: What differs from the profile of its kind.
        victims: The part whose victims it uses; it is run in any case, and trains them where they
            are missing.
    """

    name: str
    kind: Kind
    title: str
    data: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    victims: str | None = None


@dataclass(frozen=True)
class Plan:
    """The studies of one scale.

    Args:
        scale: The profile of every study that has one of this name.
        tables: Data sets of Tables 1 and 2 and of figure 1 of the watermark paper.
        indexed: Of its figure 3, by data set: the settings of the scans.
        detections: Of the reverse-generator paper, by the name of the folder: data set, network
            (the data set's usual one if None) and settings.
        cleanings: Of the comparison of mitigations, by data set.
        population: The profile of the populations, whose cross table is attacks by detectors.
        models: In every world of them, calibration and test: how many of each kind. The profile's
            own if None.
        population_data: What they need.
    """

    scale: Scale
    tables: Mapping[str, Mapping[str, Any]]
    indexed: Mapping[str, Mapping[str, Any]]
    detections: Mapping[str, tuple[str, str | None, Mapping[str, Any]]]
    cleanings: Mapping[str, Mapping[str, Any]]
    population: Literal["tiny", "small"] = "small"
    models: tuple[Mapping[str, int], Mapping[str, int]] | None = None
    population_data: tuple[str, ...] = ("mnist", "cifar10", "gtsrb")

    def parts(self) -> tuple[Part, ...]:
        """Every study in its order: what is worth most comes first."""
        tables = [
            Part(f"attacks-{data}", "attacks", f"Attacks under corruption, {data}", (data,), told)
            for data, told in self.tables.items()
        ]
        indices = [
            Part(
                f"figure3-{data}",
                "figure3",
                f"Neural Cleanse's index for every attack, {data}",
                (data,),
                told,
                f"attacks-{data}",
            )
            for data, told in self.indexed.items()
        ]
        detections = [
            Part(
                name,
                "detect",
                f"Detection and cleaning by reverse generators, {name.removeprefix('detect-')}",
                (data,),
                {"model": model, **told},
            )
            for name, (data, model, told) in self.detections.items()
        ]
        cleanings = [
            Part(
                f"cleaning-{data}",
                "cleaning",
                f"What mitigations leave, {data}",
                (data,),
                told,
                f"attacks-{data}" if data in self.tables else None,
            )
            for data, told in self.cleanings.items()
        ]
        settings = {"profile": self.population, "models": self.models}
        title = "Error rates on many small models, and attacks by detectors"
        many = Part("population", "population", title, self.population_data, settings)
        return (*tables, *indices, *detections, *cleanings, many)

    def only(self, kinds: tuple[str, ...]) -> tuple[Part, ...]:
        """The parts of some kinds, or of some names.

        Raises:
            ValueError: One that is neither.
        """
        parts = self.parts()
        known = {part.name for part in parts} | {part.kind for part in parts}
        if unknown := sorted(set(kinds) - known):
            raise ValueError(f"expected parts out of {', '.join(sorted(known))}, got {unknown[0]}")
        return tuple(part for part in parts if {part.name, part.kind} & set(kinds))


def plan_of(scale: Scale, data: str | None = None) -> Plan:
    """The plan of a scale.

    Args:
        scale: "tiny" (bundled digits, all stages real, minutes on two cores), "small" (hours on a
            CPU) or "paper" (the papers' settings, for a GPU).
        data: Another data set for every study of the scale "tiny".

    Raises:
        ValueError: No such scale, or a data set for another scale than "tiny".
    """
    if scale not in SCALES:
        raise ValueError(f"expected a profile in {', '.join(SCALES)}, got {scale!r}")
    plan = _PLANS[scale]
    if data is None:
        return plan
    if scale != "tiny":
        raise ValueError(f"expected another data set for the profile tiny alone, got {scale!r}")
    own = next(iter(plan.tables))
    detections = {
        f"detect-{data}": (data, "resnet10", {**told, "width": 8, "limit": 2000})
        for _, _, told in plan.detections.values()
    }
    return replace(
        plan,
        tables={data: plan.tables[own]},
        indexed={data: plan.indexed[own]},
        detections=detections,
        cleanings={data: plan.cleanings[own]},
    )


_SEEDS = tuple(range(10))
_WITH_LPIPS = ("nc", "reverse", "reverse-lpips")  # figure 6 compares the last two
_CLEANERS = ("fine-tuning", "nc", "reverse")
_TINY = Plan(
    "tiny",
    tables={"digits": {}},
    indexed={"digits": {"images": 500}},
    detections={
        "detect-digits": (
            "digits",
            None,
            {
                "attack": "badnets",
                "seeds": (0, 1),
                "images": 500,
                "cleaning_shares": (0.05, 0.1),
                "detectors": _WITH_LPIPS,
                "methods": _CLEANERS,
            },
        )
    },
    cleanings={"digits": {"attacks": ("badnets",)}},
    population="tiny",
    models=({"clean": 5}, {"clean": 2, "badnets": 1, "blend": 1}),
    population_data=("digits",),
)
_SMALL = Plan(
    "small",
    tables={"cifar10": {}, "mnist": {}},
    indexed={"cifar10": {"images": 500}},
    detections={
        "detect-mnist": ("mnist", None, {"seeds": _SEEDS}),
        "detect-gtsrb-vgg16": ("gtsrb", "vgg16", {"seeds": (0,)}),
    },
    cleanings={"cifar10": {"shares": (0.05,)}, "gtsrb": {"shares": (0.05,)}},
)
_PAPER = Plan(
    "paper",
    tables={"cifar10": {}, "gtsrb": {}, "imagenet10": {}},
    indexed={"cifar10": {"images": 500}, "gtsrb": {"images": 500}},
    detections={
        "detect-mnist": (
            "mnist",
            None,
            {
                "seeds": _SEEDS,
                "profile": "paper",
                "preset": "robust",
                "detectors": _WITH_LPIPS,
                "methods": _CLEANERS,
            },
        ),
        **{
            f"detect-{data}-{model}": (
                data,
                model,
                {
                    "seeds": _SEEDS,
                    "profile": "paper",
                    "preset": "robust",
                    "width": 64,
                    "limit": 0,
                    "images": None,
                },
            )
            for data in ("cifar10", "gtsrb")
            for model in ("preactresnet18", "vgg16")
        },
    },
    cleanings={"cifar10": {}, "gtsrb": {}, "mnist": {}},
)
_PLANS = {"tiny": _TINY, "small": _SMALL, "paper": _PAPER}

__all__ = ["SCALES", "Kind", "Part", "Plan", "Scale", "plan_of"]
