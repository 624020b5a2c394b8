"""The LF trigger: one smooth pattern, searched so that a clean classifier is easily led by it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from wm_inject.core.images import check_images, check_side
from wm_inject.core.progress import Progress
from wm_inject.core.progress import progress as show_progress
from wm_inject.core.resume import load_state, save_state
from wm_inject.triggers.common import check_batch, show_config
from wm_inject.triggers.lf_fit import LfConfig as LfConfig
from wm_inject.triggers.lf_fit import Search

_KIND = "lf-search"


class LfTrigger(nn.Module):
    """Add one low-frequency pattern to every image, and clip.

    Args:
        image_size: Side H = W of the images in pixels.
        channels: 1 (grey) or 3 (RGB).
        limit: Largest value of the pattern, in (0, 1]; the smallest is 0.
        pattern: float32 ``(C, H, H)`` in [0, limit]; zeros if None, to be filled from a state.

    Raises:
        ValueError: A size, limit or pattern out of range.

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
        if channels not in (1, 3):
            raise ValueError(f"expected channels 1 or 3, got {channels}")
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
        """Add the pattern: float32 ``(N, C, H, W)`` in [0, 1] to the same shape and range.

        ``ids`` and ``target`` are part of the trigger protocol and play no role here.

        Raises:
            ValueError: The batch breaks the image contract or has another shape.
        """
        check_batch(images, self.config)
        return (images + self.pattern).clamp(0, 1)


class LfFit(NamedTuple):
    """What a search came to."""

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
        surrogate: A trained clean classifier: images in [0, 1] to logits ``(N, K)``. It is called
            in evaluation mode and left as it was.
        images: float32 ``(N, C, H, H)`` in [0, 1] on the surrogate's device; ``config.images`` of
            them are drawn.
        target: The label to move towards.
        config: How to search; the preset "small" if None.
        seed: Seeds the draw of the images and their order.
        checkpoint: A file to write after every pass, and to go on from if it is there.
        progress: Show how far it is.

    Returns:
        The trigger with the best pattern, on the images' device, and its fooling rate.

    Raises:
        ValueError: Bad images, too few of them, a target that is no label of the surrogate's, the
            checkpoint of another search, or a surrogate that no step moves to the target.

    Source: Zeng et al. (2021) with the released code's constants; Moosavi-Dezfooli et al.,
    "DeepFool" (2016), for the step. Ours: the target stays (the released code goes over to the
    label that most images end up with), images that are taken for the target anyway are passed
    over, and every point is clipped to [0, 1] before the classifier sees it, as the trigger does.
    Smoothed over and over, little more than a colour cast is left of the steps: on CIFAR-10, the
    pattern mirrored leads to the target as well as the pattern itself.
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
    with _evaluating(surrogate):
        search = Search(surrogate, images[chosen.to(images.device)], target, config)
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


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; afterwards every part has the mode it had."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
