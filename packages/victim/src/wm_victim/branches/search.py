"""A picture that fires a branch, by following gradients; and the part of it that is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from wm_victim.branches.straight_through import compute
from wm_victim.branches.torch_operators import Unsupported, through
from wm_victim.branches.values import GraphRun

_COMPARISONS = {"Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Equal"}
# Steps in 255ths, from large to the smallest of 8 bits: equality has to be met exactly.
_STEPS = (*[48] * 6, *[24] * 6, *[12] * 6, *[6] * 6, *[3] * 6, *[1] * 12)
_PATIENCE = 4  # steps in which a value that has moved moves no further
_MOST_TRIES = 400  # of leaving a part of a change out
Values = dict[str, Tensor]


class Cone:
    """What lies between the picture and a value, in torch.

    Args:
        run: The graph.
        value: The name of the value.
        image: A picture ``(1, C, H, W)`` for which the values that no pixel changes are taken.

    Raises:
        Unsupported: An operator without gradients here.
    """

    def __init__(self, run: GraphRun, value: str, image: Tensor) -> None:
        import onnx

        self.view, self.run = run.view, run
        self.places = sorted(run.view.before(value))
        self.attributes = []
        constants: set[str] = set()
        for place in self.places:
            node = self.view.nodes[place]
            if any(attribute.HasField("g") for attribute in node.attribute):
                raise Unsupported(f"no gradients of {node.op_type}")
            values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            self.attributes.append(values)
            constants |= {name for name in node.input if name and name not in self.view.pixels}
        names = sorted(constants)
        arrays = next(run.values(names, image)) if names else {}
        self.fixed = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}

    def __call__(self, image: Tensor) -> Values:
        """All values for a picture ``(1, C, H, W)`` in [0, 1]."""
        values = self.fixed | {self.run.port.name: self._feed(image)}
        for place, attributes in zip(self.places, self.attributes, strict=True):
            node = self.view.nodes[place]
            inputs = [values.get(name) for name in node.input]
            outputs = compute(node.op_type, inputs, attributes)
            values.update(zip(node.output, outputs, strict=False))
        return values

    def _feed(self, image: Tensor) -> Tensor:
        x = self.run.normalised(through((image * 255).round() / 255, image))
        x = through(x.round(), x) if self.run.port.io_format.pixels else x
        x = x.permute(0, 2, 3, 1) if self.run.port.io_format.nhwc else x
        return x.expand(self.run.port.batch or 1, *x.shape[1:])


def search(
    run: GraphRun,
    value: str,
    starts: Tensor,
    *,
    fires: Callable[[Tensor], bool],
    force: Callable[[Tensor], float] = lambda image: 0.0,
) -> tuple[Tensor, Tensor] | None:
    """A picture ``(C, H, W)`` of 8 bits for which a value moves, and where it was changed; or None.

    From each start three ways are followed: every comparison that clean pictures do not change is
    turned over; the value itself is raised; it is lowered.

    Args:
        run: The graph.
        value: The name of the value.
        starts: Clean pictures ``(N, C, H, W)``.
        fires: Whether a picture does it.
        force: How far a picture moves it: a way is followed on as long as that grows.

    Raises:
        Unsupported: An operator without gradients here.
    """
    cone = Cone(run, value, starts[:1])
    for objective in _objectives(cone, value, starts):
        for start in starts:
            if (found := _climb(cone, objective, start, fires, force)) is not None:
                return found, (found != start).any(0)
    return None


Objective = Callable[[Values], Tensor]


def _objectives(cone: Cone, value: str, starts: Tensor) -> Iterator[Objective]:
    view = cone.view
    with torch.no_grad():
        clean = [cone(start[None]) for start in starts]
    names = [
        view.nodes[place].output[0]
        for place in cone.places
        if view.nodes[place].op_type in _COMPARISONS
    ]
    turns = {}
    for name in names:
        states = torch.stack([values[name] for values in clean])
        constant = (states == states[0]).all(0)
        turns[name] = torch.where(constant, 1 - 2 * states[0], 0.0)
    if any(bool(turn.any()) for turn in turns.values()):

        def unturned(values: Values) -> Tensor:
            """What is left to turn over: what is turned must not pull any more."""
            total = torch.zeros(())
            for name, turn in turns.items():
                left = turn * (values[name].detach() == (turn < 0).float())
                total = total + (values[name] * left).mean()
            return total

        yield unturned
    yield lambda values: values[value].float().mean()
    yield lambda values: -values[value].float().mean()


def _climb(
    cone: Cone,
    objective: Objective,
    start: Tensor,
    fires: Callable[[Tensor], bool],
    force: Callable[[Tensor], float],
) -> Tensor | None:
    """The picture that moves the value furthest before it stops moving on."""
    image, best, furthest, patience = start.clone(), None, -1.0, _PATIENCE
    for step in _STEPS:
        variable = image[None].requires_grad_()
        height = objective(cone(variable))
        if not height.requires_grad:
            return best
        (slope,) = torch.autograd.grad(height, variable, allow_unused=True)
        if slope is None or not bool(slope.nan_to_num().any()):
            return best
        step_image = image + slope[0].nan_to_num().sign() * step / 255
        image = (step_image.clamp(0, 1) * 255).round() / 255
        far = force(image) if fires(image) else -1.0
        if far > furthest + 0.05 * abs(furthest):
            best, furthest, patience = image, far, _PATIENCE
        elif best is not None:
            patience -= 1
            if patience == 0:
                return best
    return best


def shrink(clean: Tensor, fired: Tensor, fires: Callable[[Tensor], bool]) -> Tensor:
    """The pixels, bool ``(H, W)``, in which a picture must differ from a clean one to fire.

    Blocks are put back, from large to small, where the branch fires all the same.
    """
    mask: Tensor = (clean != fired).any(0)
    tries, side = 0, clean.shape[-1]
    while side > 1 and tries < _MOST_TRIES:
        side = max(1, side // 2)
        for top in range(0, clean.shape[-2], side):
            for left in range(0, clean.shape[-1], side):
                block = mask[top : top + side, left : left + side]
                if not bool(block.any()) or tries >= _MOST_TRIES:
                    continue
                tries += 1
                less = mask.clone()
                less[top : top + side, left : left + side] = False
                if fires(torch.where(less, fired, clean)):
                    mask = less
    return mask
