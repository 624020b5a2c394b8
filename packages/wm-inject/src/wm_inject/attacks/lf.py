"""LF: one smooth pattern, searched on a clean classifier with DeepFool steps towards the target."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wm_inject.attacks.common import check_batch, show_config
from wm_inject.attacks.cotraining import in_mode
from wm_inject.attacks.definition import Attack, FitContext, Fitted
from wm_inject.core.checks import check_channels
from wm_inject.core.images import check_images, check_side
from wm_inject.core.presets import preset_of
from wm_inject.core.progress import Progress
from wm_inject.core.progress import progress as show_progress
from wm_inject.core.resume import fingerprint, load_state, save_state

_KIND = "lf-search"
_BATCH = 64  # images at once where only predictions are wanted
_FLAT = 5, 0.01  # the search stops when this many fooling rates lie this close together


class LfTrigger(nn.Module):
    """Add one low-frequency pattern to every image, and clip.

    Args:
        limit: Largest value of the pattern, in (0, 1]; the smallest is 0.
        pattern: float32 ``(C, H, H)`` in [0, limit]; zeros if None, to be filled from a state.

    Source: Zeng et al., "Rethinking the Backdoor Attacks' Triggers: A Frequency Perspective"
    (ICCV 2021), the smooth trigger. `fit_lf` searches for the pattern.
    """

    kind = "lf"
    extra_repr = show_config
    pattern: Tensor

    def __init__(
        self,
        *,
        image_size: int,
        channels: int,
        limit: float = 0.2,
        pattern: Tensor | None = None,
    ) -> None:
        super().__init__()
        check_side(image_size)
        check_channels(channels)
        if not 0 < limit <= 1:
            raise ValueError(f"expected limit in (0, 1], got {limit}")
        self.config: dict[str, Any] = {
            "image_size": image_size,
            "channels": channels,
            "limit": float(limit),
        }
        shape = (channels, image_size, image_size)
        if pattern is None:
            pattern = torch.zeros(shape)
        if not isinstance(pattern, Tensor) or pattern.shape != shape:
            got = tuple(pattern.shape) if isinstance(pattern, Tensor) else repr(pattern)
            raise ValueError(f"expected a pattern of shape {shape}, got {got}")
        check_images(pattern[None], name="pattern")
        if pattern.max() > limit:
            raise ValueError(f"expected a pattern up to {limit}, got {float(pattern.max()):.4g}")
        self.register_buffer("pattern", pattern.detach().clone())

    def forward(
        self, images: Tensor, *, ids: Tensor | None = None, target: Tensor | None = None
    ) -> Tensor:
        """Add the pattern."""
        check_batch(images, self.config)
        return (images + self.pattern).clamp(0, 1)


@dataclass(frozen=True)
class LfConfig:
    """How the pattern is searched; "paper" is the published search, the others give up sooner.

    Args:
        images: How many images to search on.
        passes: The most passes over them.
        iterations: The most DeepFool steps per image; an image that needs more is skipped.
        overshoot: How much further than DeepFool's step to go, as a share of it.
        limit: Largest value of the pattern, in (0, 1].
        enough: Stop when this share of the images gets another prediction with the pattern.
        sigma: Width of the low-pass in pixels at 32 pixels; it grows with the image [ours].
    """

    images: int = 100
    passes: int = 50
    iterations: int = 200
    overshoot: float = 0.02
    limit: float = 0.2
    enough: float = 0.2
    sigma: float = 6.0

    def __post_init__(self) -> None:
        for name in ("images", "passes", "iterations"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"expected {name} >= 1, got {getattr(self, name)}")
        for name in ("limit", "enough"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"expected {name} in (0, 1], got {getattr(self, name)}")
        if not 0 <= self.overshoot < float("inf") or not 0 < self.sigma < float("inf"):
            raise ValueError(
                f"expected overshoot >= 0 and sigma > 0, got {self.overshoot} and {self.sigma}"
            )

    @classmethod
    def preset(cls, name: str, **changes: Any) -> LfConfig:
        """Named settings, with changes."""
        return preset_of(cls, _PRESETS, name, **changes)


_PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"images": 20, "passes": 2, "iterations": 10},
    "small": {"passes": 8, "iterations": 30},
    "paper": {},
}


class LfFit(NamedTuple):
    """A searched trigger."""

    trigger: LfTrigger
    fooling_rate: float  # share of the searched images with another prediction, at its best
    passes: int
    rates: tuple[float, ...]  # the fooling rate after each pass


def fit_lf(
    surrogate: nn.Module,
    images: Tensor,
    *,
    target: int,
    config: LfConfig | None = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> LfFit:
    """Search one smooth pattern that moves a clean classifier's predictions towards a label.

    Image by image, where the pattern so far does not change the prediction, the smallest step to
    the target label (targeted DeepFool) is low-passed and added to the pattern, which is low-passed
    again and stretched to [0, limit].

    Args:
        surrogate: A trained clean classifier, a `model`.
        images: Square, on the surrogate's device; ``config.images`` of them are drawn.
        config: The preset "small" if None.

    Returns:
        The trigger with the best pattern, on the images' device, and its fooling rate.

    Raises:
        ValueError: Too few images, the checkpoint of another search, or a surrogate that no step
            moves to the target.

    Source: Zeng et al. (2021) with the released code's constants; Moosavi-Dezfooli et al.,
    "DeepFool" (2016), for the step. Ours: the target stays (the released code goes over to the
    label that most images end up with), images predicted as the target anyway are skipped, and
    every point is clipped to [0, 1] before the classifier sees it, as the trigger does.
    """
    config = LfConfig.preset("small") if config is None else config
    check_images(images)
    if images.shape[2] != images.shape[3] or len(images) < config.images:
        raise ValueError(
            f"expected at least {config.images} square images, got {tuple(images.shape)}"
        )
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(images), generator=generator)[: config.images]
    orders = [torch.randperm(len(chosen), generator=generator) for _ in range(config.passes)]
    with in_mode(surrogate, training=False):
        search = _Search(surrogate, images[chosen.to(images.device)], target, config)
        key = {**asdict(config), "target": target, "seed": seed, "inputs": search.fingerprint()}
        if checkpoint is not None:
            search.resume(load_state(checkpoint, kind=_KIND, run=key))
        bar: Progress[None] = show_progress(
            total=config.passes, desc="low-frequency search", enabled=progress
        )
        with bar:
            bar.update(len(search.rates))
            while not search.done:
                search.run_pass(orders[len(search.rates)])
                if checkpoint is not None:
                    save_state(checkpoint, search.state(), kind=_KIND, run=key)
                bar.update()
                bar.set_postfix(fooling=search.rates[-1])
    if not bool(search.best.any()):
        raise ValueError(
            f"expected a surrogate that small steps move to label {target}; none of "
            f"{config.images} images was moved in {len(search.rates)} passes"
        )
    side, channels = images.shape[3], images.shape[1]
    trigger = LfTrigger(
        image_size=side, channels=channels, limit=config.limit, pattern=search.best.cpu()
    )
    rates = tuple(search.rates)
    return LfFit(trigger.to(images.device).eval(), max(rates), len(rates), rates)


class _Search:
    """The pattern so far, and its fooling rate after each pass."""

    def __init__(self, surrogate: nn.Module, images: Tensor, target: int, config: LfConfig) -> None:
        self.surrogate, self.images = surrogate, images
        self.target, self.config = target, config
        self.kernel = _kernel(config.sigma * images.shape[3] / 32).to(images.device)
        self.clean = self._predict(images)
        self.pattern = torch.zeros_like(images[0])
        self.best = self.pattern
        self.rates: list[float] = []

    @property
    def done(self) -> bool:
        """The pattern is good enough, no longer changes much, or has had enough passes."""
        many, close = _FLAT
        last = self.rates[-many:]
        flat = len(last) == many and max(last) - min(last) <= close
        enough = bool(last) and last[-1] >= self.config.enough
        return enough or flat or len(self.rates) >= self.config.passes

    def run_pass(self, order: Tensor) -> None:
        """Go over the images once, and measure."""
        for place in order.tolist():
            start = (self.images[place : place + 1] + self.pattern).clamp(0, 1)
            step = self._deepfool(start, int(self.clean[place]))
            if step is None:
                continue
            smooth = _low_pass(self.pattern + _low_pass(step[0], self.kernel), self.kernel)
            low, high = torch.aminmax(smooth)
            if high > low:
                # The quotient first: then the largest value is the limit to the last bit.
                self.pattern = self.config.limit * ((smooth - low) / (high - low))
        rate = self._fooling_rate()
        if not self.rates or rate >= max(self.rates):
            self.best = self.pattern
        self.rates.append(rate)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"pattern": self.pattern, "best": self.best, "rates": self.rates}

    def resume(self, state: dict[str, Any] | None) -> None:
        """Go on from a checkpoint, if there is one."""
        if state is not None:
            self.pattern = state["pattern"].to(self.images)
            self.best = state["best"].to(self.images)
            self.rates = state["rates"]

    def fingerprint(self) -> str:
        """SHA-256 of the surrogate and the images."""
        return fingerprint(self.images, *self.surrogate.state_dict().values())

    def _deepfool(self, start: Tensor, clean: int) -> Tensor | None:
        """The smallest step from ``start`` ``(1, C, H, H)`` to the target.

        None if the prediction is no longer the clean one, is the target already, or no step is
        found.
        """
        change = torch.zeros_like(start)
        reach = 1 + self.config.overshoot
        for count in range(self.config.iterations + 1):
            with torch.enable_grad():
                point = (start + reach * change).clamp(0, 1).requires_grad_()
                logits = self.surrogate(point)[0]
                label = int(logits.argmax())
                if label == self.target:
                    return reach * change if count else None
                if count == 0 and label != clean:
                    return None
                gap = logits[self.target] - logits[clean]
                # Two classes are enough for a target, so one backward pass is, too.
                (slope,) = torch.autograd.grad(gap, point)
            step = gap.detach().abs() / slope.square().sum() * slope
            if not bool(step.isfinite().all()):
                return None
            change = change + step
        return None

    def _fooling_rate(self) -> float:
        moved = self._predict((self.images + self.pattern).clamp(0, 1)) != self.clean
        return float(moved.double().mean())

    def _predict(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            logits = torch.cat([self.surrogate(part) for part in images.split(_BATCH)])
        if logits.ndim != 2 or not 0 <= self.target < logits.shape[1]:
            raise ValueError(
                f"expected logits (N, K) with a target {self.target} below K, "
                f"got {tuple(logits.shape)}"
            )
        return logits.argmax(dim=1)


def _kernel(sigma: float) -> Tensor:
    """A Gaussian over 5 sigma, whose weights sum to 1: 30 of them for 6 pixels."""
    taps = max(1, round(5 * sigma))
    line = torch.arange(taps, dtype=torch.float64) - (taps - 1) / 2
    weights = torch.exp(-line.square() / (2 * sigma**2))
    return (weights / weights.sum()).float()


def _low_pass(image: Tensor, kernel: Tensor) -> Tensor:
    """Smooth ``(C, H, H)`` along both sides, with black outside."""
    after = len(kernel) // 2
    before = len(kernel) - 1 - after
    padded = F.pad(image[:, None], (before, after, before, after))
    return F.conv2d(F.conv2d(padded, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1))[:, 0]


def _fit(attack: Attack, context: FitContext) -> Fitted:
    done = fit_lf(
        context.co_train(None),
        context.images,
        target=context.target,
        config=attack.fit_config(**attack.settings),
        seed=context.seed,
        checkpoint=context.checkpoint,
        progress=context.progress,
    )
    return Fitted(done.trigger, {"fooling_rate": done.fooling_rate, "passes": done.passes})


ATTACK = Attack("lf", "LF", LfTrigger, needs="clean-classifier", config=LfConfig, fitter=_fit)
