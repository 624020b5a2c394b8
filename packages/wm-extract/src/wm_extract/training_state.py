"""What a training run must remember to go on after a kill as if nothing had happened."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def pack_training(
    modules: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Flatten modules, optimiser and generator into one dict of tensors, ready for a checkpoint.

    Args:
        modules: The trained modules by name.
        optimizer: Its per-parameter state must be tensors, as in SGD and Adam; learning rates
            are not kept, because a schedule computes them from the step.
        generator: The CPU generator of the run.
    """
    state = {f"{name}.{k}": v for name, m in modules.items() for k, v in m.state_dict().items()}
    for index, slots in optimizer.state_dict()["state"].items():
        for slot, value in slots.items():
            if value is not None:
                state[f"optimizer.{index}.{slot}"] = torch.as_tensor(value)
    state["generator"] = generator.get_state()
    return state


def unpack_training(
    state: Mapping[str, Tensor],
    modules: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
) -> None:
    """Put back what `pack_training` gave, into objects built the same way.

    Raises:
        ValueError: The tensors belong to other modules.
    """
    for name, module in modules.items():
        part = {k[len(name) + 1 :]: v for k, v in state.items() if k.startswith(f"{name}.")}
        try:
            module.load_state_dict(part)
        except RuntimeError as error:
            raise ValueError(f"the checkpoint belongs to another {name}") from error
    slots: dict[int, dict[str, Tensor]] = {}
    for key, value in state.items():
        if key.startswith("optimizer."):
            _, index, slot = key.split(".", 2)
            slots.setdefault(int(index), {})[slot] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": slots, "param_groups": groups})
    generator.set_state(state["generator"])
