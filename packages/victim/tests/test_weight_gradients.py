import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wm_inject.core.precision import onednn_bfloat16
from wm_victim.weight_gradients import SideBySideGradients, _Convolution


def apart(first: Tensor, second: Tensor) -> float:
    return float((first - second).norm() / second.norm())


@pytest.mark.parametrize(("count", "height", "width"), [(1, 3, 3), (5, 4, 7), (19, 2, 2)])
def test_gradients_side_by_side_are_those_of_the_convolution(
    count: int, height: int, width: int
) -> None:
    images = torch.randn(count, 3, height, width, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(count, 4, height, width, dtype=torch.float64)
    ours = torch.autograd.grad(_Convolution.apply(images, weight), (images, weight), grad)
    theirs = torch.autograd.grad(F.conv2d(images, weight, padding=1), (images, weight), grad)
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference)


@pytest.mark.skipif(not onednn_bfloat16(), reason="needs convolutions in bfloat16")
def test_in_bfloat16_they_err_no_more_than_autocast() -> None:
    net = nn.Sequential(
        nn.Conv2d(8, 64, 3, padding=1, bias=False),  # too few channels to be replaced
        nn.Conv2d(64, 64, 3, padding=1, bias=False),
        nn.Conv2d(64, 64, 3, padding=1),  # has a bias
        nn.Conv2d(64, 64, 3, padding=1, stride=2, bias=False),
        nn.Conv2d(64, 64, 3, padding=1, bias=False),
    )
    images, calls = torch.randn(20, 8, 8, 8), []

    def gradients(mode: SideBySideGradients | None) -> Tensor:
        net.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            if mode is None:
                y = net(images)
            else:
                with mode:
                    y = net(images)
        nodes = [y.grad_fn]
        for node in nodes:
            nodes += [each for each, _ in node.next_functions if each is not None]
        calls.append(sum("_ConvolutionBackward" in type(node).__name__ for node in nodes))
        y.float().square().mean().backward()
        return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])

    plain, ours = gradients(None), gradients(SideBySideGradients())
    exact = net(images)
    net.zero_grad()
    exact.square().mean().backward()
    truth = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
    assert calls == [0, 2]
    assert apart(ours, truth) < 1.5 * apart(plain, truth)
