"""Fit a calibration to scans of clean models."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from defense_nc.verdict.abstention import needed
from defense_nc.verdict.calibration import Calibration, CleanModel, alike
from defense_nc.verdict.model_info import ModelInfo
from defense_nc.verdict.report import at_least, check_scores
from defense_nc.verdict.shrinkage import Prior, log_scores, moderated_p_values, prior_of
from defense_nc.verdict.tail_fit import fit_tail

_DIGITS = 6  # of a stored log score; more would be noise


def clean_model(
    scores: Tensor,
    success_rates: Tensor,
    *,
    floor: float,
    subject: ModelInfo,
    dataset: str,
    arch: str,
    name: str = "",
    works: float = 0.0,
) -> CleanModel | None:
    """A clean model's part of a calibration, from a scan: its scores and so on as for `judge`.

    None where so few labels were reached that a scan would be inconclusive.
    """
    check_scores(scores, success_rates, floor=floor)
    rates = success_rates.double().cpu()
    labels = at_least(rates, floor).nonzero().flatten().tolist()
    if len(labels) < needed(len(scores)):
        return None
    return CleanModel(
        tuple(round(x, _DIGITS) for x in log_scores(scores[labels]).tolist()),
        subject,
        dataset,
        arch,
        name,
        labels=tuple(labels),
        idle=tuple(label for label in labels if not at_least(rates, works)[label]),
    )


def fit_calibration(
    models: Sequence[CleanModel],
    *,
    detector: str,
    preset: str,
    settings: Mapping[str, Any] | None = None,
    versions: Mapping[str, str] | None = None,
) -> Calibration:
    """Fit the null distribution of a detector's scores to at least five clean models.

    Twenty or more make a reliable verdict. The tail is that of the labels' p-values, each model
    judged by the spread of the *other* models like it, as a new model is.

    Source: ours, on the moments of Smyth (2004).
    """
    if len(models) < 5:
        raise ValueError(f"expected at least 5 clean models, got {len(models)}")
    logs = [torch.tensor(model.log_scores).double() for model in models]
    if min(len(values) for values in logs) < 2:
        raise ValueError("expected at least 2 log scores of every clean model")
    prior = prior_of([model.spread for model in models])
    nominal = [
        moderated_p_values(values, prior)
        for values, prior in zip(logs, priors_of_others(tuple(models)), strict=True)
    ]
    return Calibration(
        detector=detector,
        preset=preset,
        sigma0=prior.sigma,
        nu0=prior.df,
        tail=fit_tail(torch.cat(nominal)),
        models=tuple(models),
        # Through JSON, so that they compare equal to those read from a file.
        settings=json.loads(json.dumps(dict(settings or {}))),
        versions=dict(versions or {}),
    )


@lru_cache(maxsize=64)  # every joint null of a calibration needs them
def priors_of_others(models: tuple[CleanModel, ...]) -> tuple[Prior, ...]:
    """Of each model, the spread of the other models like it: what it is judged by as a new one."""
    others = (alike([*models[:i], *models[i + 1 :]], one.subject) for i, one in enumerate(models))
    return tuple(prior_of([other.spread for other in same]) for same in others)


def refit(calibration: Calibration) -> Calibration:
    """Fit a calibration again from its own scores."""
    again = fit_calibration(
        calibration.models, detector=calibration.detector, preset=calibration.preset
    )
    return replace(again, settings=calibration.settings, versions=calibration.versions)
