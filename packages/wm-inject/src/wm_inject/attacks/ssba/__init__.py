"""SSBA: a fixed bit string, hidden in every image by a learned encoder."""

from __future__ import annotations

from wm_inject.attacks.definition import Attack, FitContext, Fitted
from wm_inject.attacks.ssba.networks import SsbaDecoder, SsbaEncoder, SsbaTrigger
from wm_inject.attacks.ssba.training import SsbaConfig, SsbaFit, fit_ssba, measure_ssba


def _fit(attack: Attack, context: FitContext) -> Fitted:
    done = fit_ssba(
        context.images,
        config=attack.fit_config(**attack.settings),
        seed=context.seed,
        checkpoint=context.checkpoint,
        progress=context.progress,
    )
    return Fitted(done.trigger, {"history": [row._asdict() for row in done.history]})


ATTACK = Attack("ssba", "SSBA", SsbaTrigger, needs="images", config=SsbaConfig, fitter=_fit)

__all__ = [
    "ATTACK",
    "SsbaConfig",
    "SsbaDecoder",
    "SsbaEncoder",
    "SsbaFit",
    "SsbaTrigger",
    "fit_ssba",
    "measure_ssba",
]
