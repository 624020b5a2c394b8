"""Measure attacks and defences: robustness tables, records, reports, and whole studies.

The names below are imported when they are first used, so that the command line answers at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from wm_eval.__about__ import __version__ as __version__

if TYPE_CHECKING:
    from wm_eval.attacks.config import AttackStudyConfig as AttackStudyConfig
    from wm_eval.attacks.figure import draw_figure as draw_figure
    from wm_eval.attacks.profiles import attack_profile as attack_profile
    from wm_eval.attacks.run import run_attack_study as run_attack_study
    from wm_eval.attacks.tables import write_tables as write_tables
    from wm_eval.cleaning.config import CleaningConfig as CleaningConfig
    from wm_eval.cleaning.measures import der as der
    from wm_eval.cleaning.profiles import cleaning_profile as cleaning_profile
    from wm_eval.cleaning.run import run_cleaning as run_cleaning
    from wm_eval.cleaning.tables import write_cleaning_tables as write_cleaning_tables
    from wm_eval.config import DataConfig as DataConfig
    from wm_eval.config import DefenceConfig as DefenceConfig
    from wm_eval.config import MeasureConfig as MeasureConfig
    from wm_eval.config import StudyConfig as StudyConfig
    from wm_eval.config import VictimConfig as VictimConfig
    from wm_eval.config import load_study as load_study
    from wm_eval.detectors import DETECTORS as DETECTORS
    from wm_eval.detectors import detector as detector
    from wm_eval.experiment import StudyResult as StudyResult
    from wm_eval.experiment import run_study as run_study
    from wm_eval.intervals import Difference as Difference
    from wm_eval.intervals import Interval as Interval
    from wm_eval.intervals import exact_interval as exact_interval
    from wm_eval.intervals import exact_lower as exact_lower
    from wm_eval.intervals import exact_upper as exact_upper
    from wm_eval.intervals import paired_difference as paired_difference
    from wm_eval.intervals import wilson as wilson
    from wm_eval.paper2.config import DetectConfig as DetectConfig
    from wm_eval.paper2.config import detect_preset as detect_preset
    from wm_eval.paper2.index_figure import write_index_figure as write_index_figure
    from wm_eval.paper2.index_scans import scan_victims as scan_victims
    from wm_eval.paper2.run import run_detect as run_detect
    from wm_eval.paper2.summary import summarise_detection as summarise_detection
    from wm_eval.population.config import PopulationConfig as PopulationConfig
    from wm_eval.population.config import World as World
    from wm_eval.population.config import population_profile as population_profile
    from wm_eval.population.run import run_population as run_population
    from wm_eval.population.summary import summarise as summarise
    from wm_eval.population.tables import write_population as write_population
    from wm_eval.presets import study_preset as study_preset
    from wm_eval.records import Record as Record
    from wm_eval.records import read_record as read_record
    from wm_eval.records import read_records as read_records
    from wm_eval.records import write_record as write_record
    from wm_eval.report import render_report as render_report
    from wm_eval.robustness import Metrics as Metrics
    from wm_eval.robustness import Outcomes as Outcomes
    from wm_eval.robustness import balanced_bit_accuracy as balanced_bit_accuracy
    from wm_eval.robustness import compare as compare
    from wm_eval.robustness import constant_score as constant_score
    from wm_eval.robustness import evaluate as evaluate
    from wm_eval.robustness import outcomes as outcomes
    from wm_eval.robustness import summarize as summarize
    from wm_eval.tables import Table as Table
    from wm_eval.tables import render_markdown as render_markdown

_MODULES = {
    "attacks.config": "AttackStudyConfig",
    "attacks.figure": "draw_figure",
    "attacks.profiles": "attack_profile",
    "attacks.run": "run_attack_study",
    "attacks.tables": "write_tables",
    "cleaning.config": "CleaningConfig",
    "cleaning.measures": "der",
    "cleaning.profiles": "cleaning_profile",
    "cleaning.run": "run_cleaning",
    "cleaning.tables": "write_cleaning_tables",
    "config": "DataConfig DefenceConfig MeasureConfig StudyConfig VictimConfig load_study",
    "detectors": "DETECTORS detector",
    "experiment": "StudyResult run_study",
    "intervals": "Difference Interval exact_interval exact_lower exact_upper paired_difference"
    " wilson",
    "paper2.config": "DetectConfig detect_preset",
    "paper2.index_figure": "write_index_figure",
    "paper2.index_scans": "scan_victims",
    "paper2.run": "run_detect",
    "paper2.summary": "summarise_detection",
    "population.config": "PopulationConfig World population_profile",
    "population.run": "run_population",
    "population.summary": "summarise",
    "population.tables": "write_population",
    "presets": "study_preset",
    "records": "Record read_record read_records write_record",
    "report": "render_report",
    "robustness": "Metrics Outcomes balanced_bit_accuracy compare constant_score evaluate outcomes"
    " summarize",
    "tables": "Table render_markdown",
}
_HOME = {name: module for module, names in _MODULES.items() for name in names.split()}
__all__ = sorted([*_HOME, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
