"""Measure attacks and defences: studies, their records, tables and pages, and audits of a model.

The names below are imported when they are first used, so that the command line answers at once.
"""

from typing import TYPE_CHECKING

from wm_eval.__about__ import __version__ as __version__
from wm_inject.core.lazy import lazy_names

if TYPE_CHECKING:
    from wm_eval.config import DataConfig as DataConfig
    from wm_eval.config import DefenderConfig as DefenderConfig
    from wm_eval.config import MeasureConfig as MeasureConfig
    from wm_eval.config import Setting as Setting
    from wm_eval.config import Study as Study
    from wm_eval.config import VictimConfig as VictimConfig
    from wm_eval.config import WatermarkConfig as WatermarkConfig
    from wm_eval.config import load_study as load_study
    from wm_eval.config import shipped_studies as shipped_studies
    from wm_eval.detectors import DETECTORS as DETECTORS
    from wm_eval.detectors import detector as detector
    from wm_eval.effectiveness import der as der
    from wm_eval.engine import Outcome as Outcome
    from wm_eval.engine import Result as Result
    from wm_eval.engine import Stage as Stage
    from wm_eval.engine import Store as Store
    from wm_eval.engine import run as run
    from wm_eval.intervals import Difference as Difference
    from wm_eval.intervals import Interval as Interval
    from wm_eval.intervals import exact_interval as exact_interval
    from wm_eval.intervals import exact_lower as exact_lower
    from wm_eval.intervals import exact_upper as exact_upper
    from wm_eval.intervals import paired_difference as paired_difference
    from wm_eval.intervals import wilson as wilson
    from wm_eval.numbers import Number as Number
    from wm_eval.pages import write_page as write_page
    from wm_eval.pages import write_tables as write_tables
    from wm_eval.pages.report import render_report as render_report
    from wm_eval.population import summarise as summarise
    from wm_eval.records import Failure as Failure
    from wm_eval.records import Record as Record
    from wm_eval.records import StudyRecords as StudyRecords
    from wm_eval.records import read_study as read_study
    from wm_eval.render import Page as Page
    from wm_eval.render import Table as Table
    from wm_eval.robustness import Metrics as Metrics
    from wm_eval.robustness import Outcomes as Outcomes
    from wm_eval.robustness import compare as compare
    from wm_eval.robustness import constant_score as constant_score
    from wm_eval.robustness import evaluate as evaluate
    from wm_eval.robustness import outcomes as outcomes
    from wm_eval.robustness import summarize as summarize
    from wm_eval.study import study_stages as study_stages
    from wm_extract import balanced_bit_accuracy as balanced_bit_accuracy
else:
    __getattr__, __dir__, __all__ = lazy_names(__name__)
