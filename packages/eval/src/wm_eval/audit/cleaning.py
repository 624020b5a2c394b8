"""Unlearn what a scan names, and write the model back in the form in which it came."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from defense_nc import UnlearnConfig, unlearn
from wm_inject import to_onnx, to_torchscript
from wm_inject.poison import Trigger

TOLERANCE = 1e-3  # of the largest logit
_LOSS = 0.05  # of accuracy on the defender's images that unlearning may cost


def clean_model(
    module: nn.Module,
    triggers: Mapping[int, Trigger],
    images: Tensor,
    labels: Tensor,
    *,
    seed: int = 0,
    progress: bool = False,
) -> nn.Module:
    """A copy of the model that has unlearned one reversed trigger after the other.

    Args:
        module: Images in [0, 1] to logits; not changed.
        triggers: By label, as `wm_eval.audit.scan.reversed_triggers` gives them.
        images: Clean float32 ``(N, C, H, W)`` in [0, 1].
        labels: int64 ``(N,)``.
        seed: Of the order of the images.
        progress: Show how far it is.

    Raises:
        ValueError: No triggers, a model that no learning rate leaves whole, or as
            `defense_nc.unlearn`.
    """
    if not triggers:
        raise ValueError("expected reversed triggers to unlearn, got none")
    before = _right(module, images, labels)
    config = UnlearnConfig.preset("nc")
    # A graph that was exported has its batch norms folded in: a rate that is right for training
    # may blow it up. The first rate that leaves the model what it knew is taken.
    for half_decades in range(5):
        rate = config.lr * 10 ** (-half_decades / 2)
        cleaned = module
        for trigger in triggers.values():
            cleaned = unlearn(
                cleaned,
                trigger,
                images,
                labels,
                config=replace(config, lr=rate),
                seed=seed,
                progress=progress,
            )
        if _right(cleaned, images, labels) >= before - _LOSS:
            return cleaned.eval()
    raise ValueError(
        f"not cleaned: unlearning took more than {_LOSS:.0%} of the accuracy at every learning rate"
    )


def _right(module: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images that get their label; NaN answers are wrong."""
    with torch.no_grad():
        logits = torch.cat([module(part) for part in images.split(64)])
    right = torch.eq(logits.argmax(1), labels) & logits.isfinite().all(1)
    return float(right.double().mean())


def success(module: nn.Module, triggers: Mapping[int, Trigger], images: Tensor) -> dict[int, float]:
    """By label, the share of images that its reversed trigger sends there, in [0, 1]."""
    rates = {}
    with torch.no_grad():
        for label, trigger in triggers.items():
            marked = torch.cat([trigger(part) for part in images.split(64)])
            answers = torch.cat([module(part).argmax(1) for part in marked.split(64)])
            rates[label] = float((answers == label).double().mean())
    return rates


def write_like(
    module: nn.Module, opened: Any, images: Tensor, out: Path, metadata: Mapping[str, Any]
) -> str:
    """Write a cleaned model in the form of the file that it came from.

    Args:
        module: The cleaned model: images in [0, 1] to logits.
        opened: What `wm_victim.loading.open_model` gave for the original.
        images: At least three, to compare the file on.
        out: The file.
        metadata: Recorded inside it.

    Returns:
        What was written, in a line.

    Raises:
        ValueError: A suffix that does not fit, or a form that cannot be written.
    """
    form = {"onnx": ".onnx", "torchscript": ".pt"}.get(opened.source, ".safetensors")
    if out.suffix != form:
        raise ValueError(f"expected a file *{form} for a model that came as {opened.source}")
    record = {"kind": "cleaned classifier", **metadata}
    if form == ".onnx":
        parity = to_onnx(
            module,
            images,
            out,
            relative=True,
            tolerance=TOLERANCE,
            metadata=record,
            traced=True,
        )
        return f"wrote {out}: images in [0, 1] to logits, within {parity.max_rel:.1g} of the model"
    if form == ".pt":
        parity = to_torchscript(
            module, images, out, relative=True, tolerance=TOLERANCE, metadata=record
        )
        return f"wrote {out}: images in [0, 1] to logits, within {parity.max_rel:.1g} of the model"
    if opened.source == "wm":
        from wm_victim import save_classifier

        save_classifier(module, out, metadata=dict(metadata))
        return f"wrote {out}"
    from safetensors.torch import save_file

    from wm_inject.files import atomic_path

    # Weights go back under the names that they came with, for the same architecture.
    inner = module[-1] if isinstance(module, nn.Sequential) else module
    state = {name: value.contiguous().clone() for name, value in inner.state_dict().items()}
    with atomic_path(out) as part:
        save_file(state, part)
    return f"wrote {out}: weights for {opened.arch}"


__all__ = ["TOLERANCE", "clean_model", "success", "write_like"]
