"""Unlearn what a scan names, and write the model back in the form in which it came."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from defense_nc import Unlearning, Verdict
from defense_nc.mitigations import DivergedError
from wm_eval.audit.checks import Checked, check_model
from wm_eval.audit.images import CleanImages
from wm_eval.audit.scan import Audit, all_triggers
from wm_eval.audit.unfold import fold, unfold
from wm_inject import to_onnx, to_torchscript
from wm_inject.core.plan import Trigger

TOLERANCE = 1e-3  # of the largest logit
_LOSS = 0.05  # of accuracy on the defender's images that unlearning may cost


class Mixed(nn.Module):
    """Several triggers as one: each image gets one of them, in turn.

    Args:
        triggers: One or more.
    """

    def __init__(self, triggers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.triggers = nn.ModuleList(triggers)

    def forward(self, images: Tensor, *, ids: Tensor | None = None, **_: object) -> Tensor:
        """Images ``(N, C, H, W)`` in [0, 1] with the trigger of number ``id % count``."""
        turn = torch.arange(len(images), device=images.device) if ids is None else ids
        turn = turn % len(self.triggers)
        marked = images.clone()
        for number, trigger in enumerate(self.triggers):
            mine = turn == number
            if bool(mine.any()):
                marked[mine] = trigger(images[mine])
        return marked


def clean_model(
    module: nn.Module,
    triggers: Sequence[nn.Module],
    images: Tensor,
    labels: Tensor,
    *,
    seed: int = 0,
    progress: bool = False,
) -> nn.Module:
    """A copy of the model that has unlearned reversed triggers, all together.

    Args:
        module: Images in [0, 1] to logits; not changed.
        triggers: Reversed ones; a fifth of the images carries each, half of them at most any.

    Raises:
        ValueError: No triggers, a model that no learning rate leaves whole, or as
            `defense_nc.Unlearning`.
    """
    if not triggers:
        raise ValueError("expected reversed triggers to unlearn, got none")
    before = _right(module, images, labels)
    share = min(0.5, len(triggers) * Unlearning.preset("nc").trigger_share)
    unlearning = Unlearning.preset("nc", trigger_share=share)
    lr, mixed = unlearning.sgd.lr, {0: Mixed(triggers)}
    start, folded = unfold(module, images)
    # Networks without normalisation of their own may still not stand a rate that is right for
    # others: the first that leaves the model what it knew is taken.
    for half_decades in range(5):
        sgd = replace(unlearning.sgd, lr=lr * 10 ** (-half_decades / 2))
        method = replace(unlearning, sgd=sgd)
        try:
            cleaned = method.repair(
                start, images, labels, triggers=mixed, seed=seed, progress=progress
            ).model
        except DivergedError:
            continue
        if _right(cleaned, images, labels) >= before - _LOSS:
            return fold(cleaned, folded)
    raise ValueError(
        f"not cleaned: unlearning took more than {_LOSS:.0%} of the accuracy at every learning rate"
    )


@dataclass(frozen=True, eq=False)
class Round:
    """What one round of cleaning gave.

    Args:
        number: From 1.
        checked: The cleaned model, checked again.
        audit: What a scan says of it.
        labels: Those whose triggers it has unlearned, sorted.
    """

    number: int
    checked: Checked
    audit: Audit
    labels: tuple[int, ...]


def clean_in_rounds(
    checked: Checked,
    clean: CleanImages,
    found: Audit,
    labels: Tensor,
    *,
    scan: Callable[[Checked, str], Audit],
    rounds: int = 3,
    seed: int = 0,
    progress: bool = True,
) -> Iterator[Round]:
    """Unlearn what a scan names, scan again, unlearn what that names as well, and so on.

    Every round starts from the given model and unlearns all triggers found so far, so that the
    bound on the loss of accuracy holds for all of them together.

    Args:
        checked: The model; not changed.
        clean: The defender's images.
        found: The scan of it.
        labels: int64 ``(N,)``: what the images are to be answered with.
        scan: Scans a model; the string names the round, "round-1" and so on.
        rounds: At most, 1 or more.

    Yields:
        Each round; the last one is not called backdoored, or nothing more can be done.

    Raises:
        ValueError: No rounds, a scan that reversed no trigger, or as `clean_model`.
    """
    if rounds < 1:
        raise ValueError(f"expected at least 1 round, got {rounds}")
    known: list[tuple[int, nn.Module]] = []
    for number in range(1, rounds + 1):
        known += all_triggers(found)
        triggers = [trigger for _, trigger in known]
        module = clean_model(
            checked.module, triggers, clean.images, labels, seed=seed, progress=progress
        )
        classes = len(module(clean.images[:1])[0])
        again = check_model(module, clean, num_classes=classes, guess_scale=False)
        found = scan(again, f"round-{number}")
        yield Round(number, again, found, tuple(sorted({label for label, _ in known})))
        if found.verdict is not Verdict.BACKDOORED or not all_triggers(found):
            return


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

    from wm_inject.core.files import atomic_path

    # Weights go back under the names that they came with, for the same architecture.
    inner = module[-1] if isinstance(module, nn.Sequential) else module
    state = {name: value.contiguous().clone() for name, value in inner.state_dict().items()}
    with atomic_path(out) as part:
        save_file(state, part)
    return f"wrote {out}: weights for {opened.arch}"
