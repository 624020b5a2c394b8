"""Write the figures and the defaults into the pages of attacks and defences, from records and code.

Run ``python tools/render_pages.py`` after records were added or a default was changed; a test holds
the pages to them. A page is written by hand down to its marker, and by this tool after it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

from defense_nc import Sgd
from wm_eval.render import Table, to_markdown
from wm_eval.titles import method_title
from wm_inject.attacks import ATTACKS
from wm_inject.command.common import run_cli
from wm_inject.core.files import write_text

# Run as a script, Python would look for `tools` inside tools/.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from tools.page_tables import (
    attack_tables,
    blind_filters,
    detector_tables,
    filters_table,
    joined,
    mitigation_tables,
    without_repeats,
)

ROOT = Path(__file__).resolve().parents[1]
RESULTS, DOCS = ROOT / "results", ROOT / "docs"
MARK = "<!-- What follows is written by tools/render_pages.py from code and records. -->"
NO_RECORD = "No study here has measured it yet."


class Settings(NamedTuple):
    """A class whose defaults a page shows."""

    where: str  # module:class
    presets: tuple[str, ...] = ()


_PROFILES = ("tiny", "small", "paper")
_FAST = ("fast", "paper")


def _of_attack(name: str) -> tuple[Settings, ...]:
    """The classes whose settings the page of an attack shows: its trigger, then its fit."""
    if name == "watermark":
        fit = [Settings("wm_extract:JointConfig", ("robust", "paper"))]
    else:
        config = ATTACKS[name].config
        fit = [] if config is None else [Settings(_where(config), _PROFILES)]
    return (Settings(_where(ATTACKS[name].trigger)), *fit)


def _where(cls: type) -> str:
    return f"{cls.__module__}:{cls.__name__}"


ATTACK_PAGES = {name: _of_attack(name) for name in ATTACKS}
_SPEEDS = ("fast", "robust", "paper")
DETECTOR_PAGES: dict[str, tuple[str, tuple[Settings, ...]]] = {
    "neural-cleanse": ("nc", (Settings("defense_nc:NCConfig", _SPEEDS),)),
    "reverse-generators": ("reverse", (Settings("defense_reverse:ReverseConfig", _SPEEDS),)),
    "feature-re": ("feature-re", (Settings("defense_reverse:FeatureREConfig", _FAST),)),
    "bti-dbf": (
        "bti-dbf",
        (
            Settings("defense_reverse:BtiDbfConfig", _FAST),
            Settings("defense_reverse:BtiDbfUnlearning", _FAST),
        ),
    ),
    "patch-sweep": ("sweep", (Settings("defense_reverse:PatchSweep", _FAST),)),
    "universal-perturbations": (
        "uap",
        (Settings("defense_reverse:UniversalPerturbation", _FAST),),
    ),
    "universal-warps": ("warp", (Settings("defense_reverse:UniversalWarp", _FAST),)),
    "pair-perturbations": ("pairs", (Settings("defense_reverse:PairPerturbation", _FAST),)),
    "head-weights": ("head", (Settings("defense_reverse:HeadWeights", _FAST),)),
    "maximum-margins": ("mm-bd", (Settings("defense_reverse:MarginAscent", _FAST),)),
}
METHOD_PAGES = {
    "unlearning": (
        (
            "unlearning-nc",
            "unlearning-reverse",
            "unlearning-uap",
            "unlearning-warp",
            "unlearning-audit",
            "control",
            "control-nc",
        ),
        Settings("defense_nc:Unlearning", ("fast", "batch-128", "paper", "nc", "reverse")),
    ),
    "neuron-pruning": (("neuron-pruning",), Settings("defense_nc:NeuronPruning")),
    "fine-tuning": (
        ("fine-tuning", "control"),
        Settings("defense_reverse:FineTuning", ("fast", "batch-128", "paper", "reverse")),
    ),
    "fine-pruning": (("fine-pruning",), Settings("defense_reverse:FinePruning", _FAST)),
    "nad": (("nad",), Settings("defense_reverse:NAD", _FAST)),
    "anp": (("anp",), Settings("defense_reverse:ANP", _FAST)),
    "i-bau": (("i-bau",), Settings("defense_reverse:IBAU", _FAST)),
    "ft-sam": (
        ("ft-sam",),
        Settings("defense_reverse:FTSAM", ("fast", "batch-128", "paper", "paper-gtsrb")),
    ),
    "channel-lipschitz": (("clp",), Settings("defense_reverse:ChannelLipschitzPruning")),
    "feature-shift": (
        ("fst",),
        Settings(
            "defense_reverse:FeatureShiftTuning", ("fast", "batch-128", "paper", "fresh-head")
        ),
    ),
    "head-unlearning": (("head-unlearning",), Settings("defense_reverse:HeadUnlearning")),
}
IMAGE_PAGES = {
    "strip": Settings("defense_nc:Strip", _FAST),
    "input-filter": Settings("defense_nc:InputFilter"),
    "discriminant-filter": Settings("defense_nc:DiscriminantFilter"),
    "parameter-scaling": Settings("defense_nc:ParameterScaling"),
    "layer-ranks": Settings("defense_nc:LayerRanks"),
}


def render_pages(results: Path) -> Iterator[tuple[Path, str]]:
    """Each page's file, below docs/, and what stands in it after its marker."""
    for name, shown in ATTACK_PAGES.items():
        yield Path("attacks", f"{name}.md"), _tail(shown, attack_tables(results, name))
    for page, (name, shown) in DETECTOR_PAGES.items():
        yield Path("defences", f"{page}.md"), _tail(shown, detector_tables(results, name))
    for page, (names, settings) in METHOD_PAGES.items():
        titles = {method_title(n, oracle_label=oracle) for n in names for oracle in (False, True)}
        tables = list(mitigation_tables(results, titles))
        yield Path("defences", f"{page}.md"), _tail((settings,), tables)
    filters = filters_table(results)
    for page, settings in IMAGE_PAGES.items():
        tables = [filters] if page == "discriminant-filter" else blind_filters(results, page)
        yield Path("defences", f"{page}.md"), _tail((settings,), tables)


def _tail(settings: Iterable[Settings], tables: Sequence[Table]) -> str:
    parts = ["## Settings", "", *(to_markdown(settings_table(one)) for one in settings)]
    parts += ["## Measured here", ""]
    if not tables:
        return "\n".join([*parts, NO_RECORD, ""])
    parts += ["From records; [results](../../results/README.md) has the commands.", ""]
    return "\n".join([*parts, *(to_markdown(table) for table in without_repeats(joined(tables)))])


def settings_table(settings: Settings) -> Table:
    """Every setting of a class with its default, and with what its presets change it to."""
    module, _, name = settings.where.partition(":")
    kind = getattr(import_module(module), name)
    defaults = dict(_defaults(kind))
    presets = [dict(_flat(vars(kind.preset(preset)))) for preset in settings.presets]
    headers = ("setting", *(settings.presets or ("default",)))
    rows = tuple(
        (f"`{key}`", *([_text(p[key]) for p in presets] or [_text(default)]))
        for key, default in _flat(defaults)
    )
    title = f"{name} ({module.partition('.')[0]})"
    return Table(name, title, headers, rows)


def _flat(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The settings, with those of SGD among them."""
    for key, value in settings.items():
        if isinstance(value, Sgd):
            yield from vars(value).items()
        else:
            yield key, value


def _defaults(kind: type) -> Iterator[tuple[str, Any]]:
    if is_dataclass(kind):
        for field in fields(kind):
            factory = field.default_factory
            yield field.name, field.default if factory is MISSING else factory()
        return
    for key, parameter in signature(kind).parameters.items():
        yield key, MISSING if parameter.default is parameter.empty else parameter.default


def _text(value: Any) -> str:
    if value is MISSING:
        return "required"
    if is_dataclass(value):
        return "its own settings"
    if isinstance(value, float):
        return f"`{value:.4g}`"
    return f"`{value!r}`"


def with_tail(page: str, tail: str) -> str:
    """A page with what follows its marker written anew.

    Raises:
        ValueError: The page has no marker, or several.
    """
    if page.count(MARK) != 1:
        raise ValueError(f"expected one line {MARK!r}, got {page.count(MARK)}")
    return f"{page.partition(MARK)[0]}{MARK}\n\n{tail}"


def _main(argv: Sequence[str] | None) -> int:
    for name, tail in render_pages(RESULTS):
        page = DOCS / name
        write_text(page, with_tail(page.read_text(encoding="utf-8"), tail))
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(_main))
