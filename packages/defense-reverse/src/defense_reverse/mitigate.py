"""Mitigation: unlearn a backdoor with the generator that was reversed for its label."""

from __future__ import annotations

from torch import Tensor, nn

from defense_nc import UnlearnConfig, unlearn
from wm_inject.core.plan import Trigger


def mitigate(
    model: nn.Module,
    trigger: Trigger,
    images: Tensor,
    labels: Tensor,
    *,
    config: UnlearnConfig | None = None,
    seed: int = 0,
    progress: bool = False,
) -> nn.Module:
    """Fine-tune a copy of the classifier on clean images and a generated copy of each.

    Generated images keep their true labels, so the copy learns that the change means nothing.

    Args:
        model: Images in [0, 1] to logits ``(N, K)``; not changed.
        trigger: The reversed generator of the label that a scan named; any trigger works.
        images: Clean float32 ``(N, C, H, W)`` in [0, 1], N >= 2.
        labels: int64 ``(N,)``, the true classes.
        config: Settings; the paper's if None: SGD with learning rate 1e-3 and momentum 0.9, ten
            epochs, every image clean and generated once each.
        seed: Seeds the order of the images, and dropout.
        progress: Show how far it is.

    Returns:
        The new model, in eval mode, on the same device.

    Raises:
        ValueError: As `defense_nc.unlearn`.

    Source: Zheng, Hua and Zhang, sections 3.5 and 4.3. The paper gives no batch size.
    """
    config = UnlearnConfig.preset("reverse") if config is None else config
    return unlearn(model, trigger, images, labels, config=config, seed=seed, progress=progress)
