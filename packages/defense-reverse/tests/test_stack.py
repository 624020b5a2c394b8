from __future__ import annotations

import copy

import pytest
import torch

from defense_reverse import ReverseConfig, UNetGenerator
from defense_reverse.engines.stack import (
    GeneratorStack,
    initial_moments,
    pack,
    unpack,
    with_weights,
)

ROWS = 3


def generators(**changes: object) -> list[UNetGenerator]:
    settings = {"channels": 3, "width": 3, "depth": 2, "convs": 2, "residual": False} | changes
    return [UNetGenerator(**settings, seed=seed) for seed in range(ROWS)]


def stack(nets: list[UNetGenerator], kind: str = "apart", **changes: object) -> GeneratorStack:
    config = ReverseConfig(stack=kind, precision="float32", **changes)
    return GeneratorStack(nets[0], [initial_moments(net) for net in nets], steps=0, config=config)


def images(count: int = 4, seed: int = 0) -> torch.Tensor:
    drawn = torch.rand(count, 3, 9, 8, generator=torch.Generator().manual_seed(seed))
    return drawn.contiguous(memory_format=torch.channels_last)


def test_a_packed_generator_comes_back():
    net = generators()[0]
    vector = pack(net)
    assert vector.shape == (sum(p.numel() for p in net.parameters()),)
    again = with_weights(generators()[1], vector)
    for one, other in zip(net.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other) and other.is_contiguous()
    assert torch.equal(net(images()), again(images()))


def test_a_matrix_of_rows_unpacks_to_stacked_parameters():
    nets = generators()
    stacked = unpack(nets[0], torch.stack([pack(net) for net in nets]))
    for name, value in nets[2].named_parameters():
        assert stacked[name].shape == (ROWS, *value.shape)
        assert torch.equal(stacked[name][2], value)


@pytest.mark.parametrize("kind", ["apart", "vmapped"])
def test_each_row_generates_as_its_generator(kind):
    nets = generators()
    batches = [images(4, seed) for seed in range(ROWS)]
    made = stack(nets, kind).generate(batches)
    for row, (net, batch) in enumerate(zip(nets, batches, strict=True)):
        torch.testing.assert_close(made[row], net(batch), rtol=1e-4, atol=1e-5)
        one = stack(nets, kind).generator(row)(batch)
        torch.testing.assert_close(one, net(batch), rtol=1e-4, atol=1e-5)


@pytest.mark.integration
def test_one_adam_over_all_rows_is_an_adam_of_each(subtests):
    for kind in ["apart", "vmapped"]:
        for counts in [(4, 4, 4), (4, 2, 3)]:
            with subtests.test(kind=kind, counts=counts):
                nets = generators()
                together = stack(copy.deepcopy(nets), kind, lr=1e-2)
                adams = [torch.optim.Adam(net.parameters(), lr=1e-2) for net in nets]
                for step in range(5):
                    batches = [images(count, 10 * step + row) for row, count in enumerate(counts)]
                    made = together.generate(batches)
                    # each row has a loss of its own, and the sum is what the stack gets
                    together.step(
                        sum(((row + 1) * x.mean() - 0.2) ** 2 for row, x in enumerate(made))
                    )
                    for row, (net, adam, batch) in enumerate(
                        zip(nets, adams, batches, strict=True)
                    ):
                        adam.zero_grad()
                        (((row + 1) * net(batch).mean() - 0.2) ** 2).backward()
                        adam.step()
                for row, net in enumerate(nets):
                    torch.testing.assert_close(
                        together.weights(row), pack(net), rtol=1e-3, atol=2e-4
                    )


def test_rows_that_are_kept_go_on_as_if_nobody_had_left():
    whole, rest = stack(generators()), stack(generators())

    def train(stack: GeneratorStack, rows: list[int], steps: range) -> None:
        for step in steps:
            made = stack.generate([images(4, 10 * step + row) for row in rows])
            stack.step(sum(x.square().mean() for x in made))

    train(whole, [0, 1, 2], range(4))
    train(rest, [0, 1, 2], range(2))
    rest = rest.select([0, 2])
    train(rest, [0, 2], range(2, 4))
    assert torch.equal(rest.weights(0), whole.weights(0))
    assert torch.equal(rest.weights(1), whole.weights(2))
    assert all(torch.equal(a, b) for a, b in zip(rest.moments(1), whole.moments(2), strict=True))


def test_copies_do_not_change_with_the_next_step():
    trained = stack(generators())
    before, moments = trained.weights(0), trained.moments(0)
    kept = [part.clone() for part in (before, *moments)]
    trained.step(sum(x.mean() for x in trained.generate([images()] * ROWS)))
    assert all(torch.equal(a, b) for a, b in zip(kept, (before, *moments), strict=True))
    assert not torch.equal(trained.weights(0), before)


def test_the_start_is_not_changed():
    nets = generators()
    before = pack(nets[0]).clone()
    trained = stack(nets)
    trained.step(sum(x.mean() for x in trained.generate([images()] * ROWS)))
    assert torch.equal(pack(nets[0]), before)
    assert all(p.requires_grad and p.grad is None for p in nets[0].parameters())
