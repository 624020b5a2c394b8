"""Phase B: the patterns; their generator and a victim learn side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wm_inject.attacks.common import check_batch
from wm_inject.attacks.cotraining import (
    channels_last,
    check_keys,
    in_mode,
    load_optimizer,
    load_weights,
    victim_logits,
)
from wm_inject.attacks.input_aware.masks import BETAS, InputAwareConfig, diversity, set_rate
from wm_inject.attacks.input_aware.trigger import InputAwareTrigger
from wm_inject.core.images import check_labels, quantize
from wm_inject.core.plan import PoisonPlan

_MILESTONES = (1 / 3, 1 / 2, 2 / 3, 5 / 6)  # epochs 200, 300, 400 and 500 of 600


class InputAwareHook:
    """Input-aware training batches: some with their own trigger, some with another's, most clean.

    Of a batch of B images, ``n = int(ratio B)`` get their own trigger and its label, and n others
    get the trigger of another image of the batch and keep their label (cross triggers), which
    teaches the classifier that a trigger works on its own image only. Before that, the generator of
    the patterns takes one step of Adam on those 2n images against the victim as it stands: their
    cross entropy, summed and divided by B, plus the diversity of the patterns.

    Args:
        trigger: With fitted masks, on the images' device; its patterns are trained in place.
        plan: A per-batch plan; its ratio, at most half, is the share with their own trigger.

    Source: Nguyen & Tran (NeurIPS 2020) and the released code, where one loss over the whole batch
    trains both networks in one step. Ours: the two take turns; donors come from the batch instead
    of a second loader; triggers go in before augmentation, from the generator in evaluation mode;
    the generator's gradients start from zero every step (the released code never clears them); the
    images to train on are rounded to 8 bits, as `CrossTriggerHook`'s are.
    """

    def __init__(
        self,
        trigger: InputAwareTrigger,
        plan: PoisonPlan,
        *,
        num_classes: int,
        config: InputAwareConfig | None = None,
    ) -> None:
        if plan.mode != "per_batch":
            raise ValueError(f"expected a per-batch plan, got mode {plan.mode!r}")
        if (plan.ratio or 1) > 0.5:
            raise ValueError(f"expected a ratio up to 0.5 beside cross images, got {plan.ratio}")
        self.trigger, self.plan, self.num_classes = trigger.eval(), plan, num_classes
        self.config = config or InputAwareConfig()
        self.steps = 0
        trigger.mask_net.requires_grad_(False)
        parameters = trigger.pattern_net.requires_grad_(True).parameters()
        self.optimizer = torch.optim.Adam(parameters, lr=self.config.lr, betas=BETAS)

    def __repr__(self) -> str:
        return f"InputAwareHook({self.plan}, {self.config})"

    def transform(
        self, images: Tensor, labels: Tensor, *, model: nn.Module, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Let the generator take a step on one batch, and mix its three parts, stored in 8 bits."""
        check_batch(images, self.trigger.config)
        check_labels(labels, len(images), num_classes=self.num_classes)
        images = channels_last(images)
        roles = self._roles(labels, generator)
        new_labels = self.plan.relabel(labels, self.num_classes)
        labels = labels.clone()
        labels[roles.own] = new_labels[roles.own]
        if len(roles.own) == 0:
            return images, labels
        places = torch.cat([roles.own, roles.cross])
        hosts, sources = images[places], images[torch.cat([roles.own, roles.donors])]
        with torch.no_grad():
            masks = self.trigger.mask(sources)
        self._learn(hosts, sources, masks, labels[places], model, batch=len(images))
        with torch.no_grad():
            patterns = self.trigger.pattern(sources)
            images[places] = quantize(self.trigger.blend(hosts, patterns, masks))
        return images, labels

    def _roles(self, labels: Tensor, generator: torch.Generator) -> _Roles:
        attacked = self.plan.choose(labels, generator=generator).cpu()
        own, rest = attacked.nonzero().flatten(), (~attacked).nonzero().flatten()
        cross = rest[torch.randperm(len(rest), generator=generator)[: len(own)]]
        own = own[: len(cross)]
        shift = torch.randint(1, max(2, len(labels)), (len(cross),), generator=generator)
        donors = (cross + shift) % len(labels)  # uniform over all images but the host
        return _Roles(*(place.to(labels.device) for place in (own, cross, donors)))

    def _learn(
        self,
        hosts: Tensor,
        sources: Tensor,
        masks: Tensor,
        labels: Tensor,
        model: nn.Module,
        *,
        batch: int,
    ) -> None:
        """One step of the generator; the first half of the images bears its own triggers."""
        config, half = self.config, len(hosts) // 2
        if config.total_steps is not None:
            set_rate(self.optimizer, config.lr, self.steps, config.total_steps, _MILESTONES)
        self.optimizer.zero_grad(set_to_none=True)
        with (
            torch.enable_grad(),
            torch.autocast(hosts.device.type, enabled=False),
            in_mode(self.trigger.pattern_net, training=True),
        ):
            patterns = self.trigger.pattern(sources)
            logits = victim_logits(model, self.trigger.blend(hosts, patterns, masks))
            loss = F.cross_entropy(logits, labels, reduction="sum") / batch
            pairs = (sources[:half], sources[half:]), (patterns[:half], patterns[half:])
            (loss + config.lambda_div * diversity(*pairs)).backward()
        self.optimizer.step()
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        """Both generators, the optimiser and the count of steps."""
        return {
            "trigger": self.trigger.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "steps": self.steps,
        }

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Refuse the state of another attack."""
        check_keys(state, ("trigger", "optimizer", "steps"), name="input-aware")
        load_weights(self.trigger, state["trigger"])
        load_optimizer(self.optimizer, state["optimizer"])
        self.steps = int(state["steps"])


class _Roles(NamedTuple):
    """Row numbers in a batch. ``cross[i]`` gets the trigger of ``donors[i]``."""

    own: Tensor
    cross: Tensor
    donors: Tensor
