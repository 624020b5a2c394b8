"""What generators that learn beside a victim share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from wm_inject.core.resume import like_parameters


@contextmanager
def in_mode(module: nn.Module, *, training: bool) -> Iterator[None]:
    """Put a module in training or evaluation mode, and every part of it back afterwards."""
    before = [(part, part.training) for part in module.modules()]
    try:
        module.train(training)
        yield
    finally:
        for part, mode in before:
            part.training = mode


def victim_logits(model: nn.Module, images: Tensor) -> Tensor:
    """Float32 logits of a classifier in training, with a gradient to the images only.

    It runs in the mode that it is in, on copies of its buffers: its weights, their gradients and
    its running statistics stay as they are.
    """
    state = {name: weight.detach() for name, weight in model.named_parameters()}
    state |= {name: buffer.clone() for name, buffer in model.named_buffers()}
    with torch.autocast(images.device.type, enabled=False):
        logits: Tensor = functional_call(model, state, (images,))
    return logits.float()


def channels_last(images: Tensor) -> Tensor:
    """A copy without history in channels-last memory, where convolutions run faster on a CPU."""
    return images.detach().clone(memory_format=torch.channels_last)


def load_weights(module: nn.Module, state: Any) -> None:
    """Take back a module's weights.

    Raises:
        ValueError: They are those of another module.
    """
    try:
        module.load_state_dict(state)
    except (RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())  # torch writes a line for each tensor
        raise ValueError(f"these weights do not fit the trigger: {reason}") from error


def load_optimizer(optimizer: torch.optim.Optimizer, state: Any) -> None:
    """Take back an optimiser's state so that it goes on to the same bits."""
    optimizer.load_state_dict(state)
    like_parameters(optimizer)


def check_keys(state: Mapping[str, Any], wanted: tuple[str, ...], *, name: str) -> None:
    """Check that a hook's state holds what it should.

    Raises:
        ValueError: Other keys.
    """
    if not isinstance(state, Mapping) or set(state) != set(wanted):
        got = ", ".join(sorted(state)) if isinstance(state, Mapping) else type(state).__name__
        raise ValueError(f"expected the state of {name} ({', '.join(wanted)}), got {got or '{}'}")
