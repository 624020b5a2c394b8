"""Maximum margins (MM-BD): how far above all others can each label's logit be driven?

No form of a trigger is assumed: the images may become anything. A backdoor's label has a direction
of its own, in which its logit grows far beyond what the features of a class allow.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor, nn

from defense_nc.config import check_rule
from defense_nc.gradients import GradientCount, reached, vanished
from defense_nc.scan_inputs import ScanInputs, open_scan
from defense_nc.verdict import ScanReport, judge_scan
from defense_reverse.detectors.common import check_settings
from wm_inject.core.checks import check_choice
from wm_inject.core.presets import preset_of
from wm_inject.core.progress import progress as show_progress


class Margins(NamedTuple):
    """What the ascent has reached."""

    margins: Tensor  # float64 (K,): of each label the largest, its logit less the next highest
    rates: Tensor  # float64 (K,): share of the images that end at the label
    starved: tuple[float, ...]  # by label: as `ScanReport.starved`


@dataclass(frozen=True)
class MarginAscent:
    """MM-BD as a `defense_nc.Detector`.

    Args:
        starts: Images a label.
        start: "images", clean ones of other classes; or "noise", uniform: no data is needed then.
        steps: Of the ascent.
        lr: Length of the first step, in units of [0, 1]; it falls linearly to a fiftieth.
        ascent: "sign" follows the sign of the gradient, "gradient" itself.
        alpha: As for `defense_nc.NeuralCleanse`, and so is ``max_ratio``.

    Source: Wang, Xiang, Miller and Kesidis, "MM-BD: Post-Training Detection of Backdoor Attacks
        with Arbitrary Backdoor Pattern Types Using a Maximum Margin Statistic" (IEEE S&P 2024).
        Clean images to start from, and steps by sign, are those of a variant that did well in a
        contest.
    """

    name: ClassVar[str] = "mm-bd"
    starts: int = 20
    start: Literal["images", "noise"] = "images"
    steps: int = 30
    lr: float = 0.1
    ascent: Literal["sign", "gradient"] = "sign"
    alpha: float = 0.05
    max_ratio: float = 0.5

    def __post_init__(self) -> None:
        check_settings(self, ("starts", "steps"), ("lr",))
        check_choice("a start", self.start, ("images", "noise"))
        check_choice("an ascent", self.ascent, ("sign", "gradient"))
        check_rule(self.alpha, self.max_ratio)

    @classmethod
    def preset(cls, name: str = "fast", **changes: Any) -> MarginAscent:
        """Settings by name, with changes.

        "paper" starts from noise, with the paper's steps at its rate, which falls here; "fast" is
        ours.
        """
        return preset_of(cls, PRESETS, name, **changes)

    @property
    def settings(self) -> Mapping[str, Any]:
        """The settings of the ascent, ready for JSON."""
        return {k: v for k, v in asdict(self).items() if k not in ("alpha", "max_ratio")}

    def scan(
        self,
        model: nn.Module,
        images: Tensor,
        *,
        labels: Tensor | None = None,
        seed: int = 0,
        progress: bool = True,
        device: torch.device | str | None = None,
        checkpoint: Path | None = None,
    ) -> ScanReport:
        """Drive every label's margin up, and decide whether one goes unusually far.

        ``checkpoint`` is ignored.

        Returns:
            A report whose scores are 1 / softplus(margin): small where the margin is large, and
            defined where a label was not reached. ``log["raw"]`` has the margins and the p-value of
            the paper's rule (a gamma distribution fitted to all margins but the largest).

        Source: the verdict rests on `judge_scan`; the paper's rule stands beside it.
        """
        with open_scan(model, images, labels=labels, device=device) as inputs:
            ascent = self.ascend(inputs, seed=seed, progress=progress)
        report = judge_scan(
            self.name,
            1 / F.softplus(ascent.margins).clamp(min=1e-6),
            ascent.rates,
            model=model,
            images=images,
            settings=self.settings,
            floor=0.0,  # a label that is never reached is a score in itself: its margin is negative
            alpha=self.alpha,
            max_ratio=self.max_ratio,
            seed=seed,
            starved=ascent.starved,
            notes=inputs.notes,
        )
        raw = {"margins": ascent.margins.tolist(), "gamma_p": gamma_p_value(ascent.margins)}
        return replace(report, log={"raw": raw})

    def ascend(self, inputs: ScanInputs, *, seed: int, progress: bool = False) -> Margins:
        """The largest margin of every label."""
        random = torch.Generator().manual_seed(seed)
        margins, rates, starved = [], [], []
        bar = show_progress(range(inputs.num_classes), desc="margins", enabled=progress)
        for label in bar:
            start, gradients = self._start(inputs, label, random), GradientCount()
            images, goals = start, torch.full((len(start),), label, device=start.device)
            for step in range(self.steps):
                images = images.detach().requires_grad_()
                with torch.enable_grad():
                    logits = inputs.model(images)
                    # The second sum is there for models of thresholds, which depend on no pixel.
                    value = margin(logits, label).sum() + 0 * images.sum()
                    (gradient,) = torch.autograd.grad(value, images)
                away = int((~reached(logits, goals)).sum())
                gradients.add(away, int(vanished(gradient, logits, goals).sum()))
                length = self.lr * (1 - 0.98 * step / max(1, self.steps - 1))
                move = gradient.sign() if self.ascent == "sign" else gradient
                images = (images.detach() + length * move).clamp(0, 1)
            with torch.no_grad():
                ends = margin(inputs.model(images), label).double().cpu()
            margins.append(ends.max())
            rates.append((ends > 0).double().mean())
            starved.append(gradients.share)
        return Margins(torch.stack(margins), torch.stack(rates), tuple(starved))

    def _start(self, inputs: ScanInputs, label: int, random: torch.Generator) -> Tensor:
        shape = inputs.images.shape[1:]
        if self.start == "noise":
            return torch.rand(self.starts, *shape, generator=random).to(inputs.images.device)
        others = inputs.images[inputs.labels != label]
        order = torch.randperm(len(others), generator=random)[: self.starts]
        return others[order.to(others.device)].clone()


PRESETS: dict[str, dict[str, Any]] = {
    "fast": {},
    "paper": {"starts": 30, "start": "noise", "steps": 300, "lr": 0.01, "ascent": "gradient"},
}


def margin(logits: Tensor, label: int) -> Tensor:
    """The logit of a label less the highest of the others: ``(N, K)`` to ``(N,)``."""
    others = torch.cat([logits[:, :label], logits[:, label + 1 :]], 1)
    return logits[:, label] - others.amax(1)


def gamma_p_value(margins: Tensor) -> float:
    """The p-value of the largest of the margins ``(K,)``, after a gamma distribution of the others.

    1 if fewer than four of the others are positive, or all are alike.

    Source: MM-BD, section IV: p = 1 - F(largest)^K, F fitted to the others.
    """
    values = np.sort(margins.double().cpu().numpy())
    rest = values[:-1][values[:-1] > 0]
    if len(rest) < 4 or float(np.ptp(rest)) == 0:
        return 1.0
    shape, _, scale = stats.gamma.fit(rest, floc=0)
    log_cdf = stats.gamma.logcdf(values[-1], shape, scale=scale)
    return float(-np.expm1(len(values) * log_cdf))
