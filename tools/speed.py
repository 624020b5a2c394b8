"""How fast a network is, as a share of the machine's rate of matrix products in the same run.

Seconds of two machines, or of one machine on two days, do not compare. The share does: every round
of a benchmark runs the network once and then a set of matrix products, so that whatever else the
machine does falls on both. Seconds are those of the processor, with one thread, because a process
that waits for its turn is not slow. docs/speed.md has the definitions.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from wm_inject.watermark.fused_linear import packed_weight

ROUNDS = 7
LEAST = 0.02  # seconds in a round: below this, the clock and the caches tell of other things
SQUARES = ((1024, 1024, 1024), (2048, 2048, 2048))
Shape = tuple[int, int, int]  # M, K, N


def count_flops(model: nn.Module, *inputs: Tensor) -> int:
    """Floating-point operations of one call: two for each multiplication in a matrix product.

    Args:
        model: Any module; it runs once, without gradients.
        inputs: What it is called with.

    Raises:
        ValueError: A call without any matrix product or convolution.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*inputs)
    flops = int(counter.get_total_flops())
    if flops == 0:
        raise ValueError("expected a model with matrix products, got 0 FLOPs")
    return flops


def block_shapes(rows: int, width: int) -> tuple[Shape, ...]:
    """The products ``(M, K, N)`` of a transformer block over ``rows`` tokens of that width."""
    four = 4 * width
    return (
        (rows, width, 3 * width),
        (rows, width, width),
        (rows, width, four),
        (rows, four, width),
    )


def product(shape: Shape, dtype: torch.dtype) -> Callable[[], object]:
    """A bare product ``(M, K) x (K, N)``: by oneDNN with a laid-out weight, or else by torch."""
    m, k, n = shape
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(m, k, generator=generator).to(dtype)
    right = torch.randn(n, k, generator=generator).to(dtype)
    packed = packed_weight(right, m)
    if packed is None:
        return lambda: torch.mm(left, right.t())
    return lambda: torch.ops.mkldnn._linear_pointwise(left, packed, None, "none", [], "")


def plain_product(shape: Shape, dtype: torch.dtype) -> Callable[[], object]:
    """The same product by `torch.mm`: on some processors MKL is the slower, on others not."""
    m, k, n = shape
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(m, k, generator=generator).to(dtype)
    right = torch.randn(k, n, generator=generator).to(dtype)
    return lambda: torch.mm(left, right)


def share(
    model: Sequence[float], products: Mapping[Any, Sequence[float]], work: Mapping[Any, float]
) -> tuple[float, float, Any]:
    """The median share of the best product's rate, its spread, and which product was the best.

    Args:
        model: FLOP/s of the network, round by round.
        products: Seconds of each product in the same rounds.
        work: FLOPs of each product.

    Returns:
        The least, over products, of the median over rounds of model rate / product rate; the range
        of that ratio between its quartiles; the product.

    Raises:
        ValueError: No rounds or products, or not one time a round.
    """
    if not model or not products or any(len(times) != len(model) for times in products.values()):
        raise ValueError("expected rounds, and one time of every product in each")
    ratios = {
        name: [rate * seconds / work[name] for rate, seconds in zip(model, times, strict=True)]
        for name, times in products.items()
    }
    best = min(ratios, key=lambda name: statistics.median(ratios[name]))
    found = sorted(ratios[best])
    low, high = found[len(found) // 4], found[-1 - len(found) // 4]
    return statistics.median(found), high - low, best


def measure(
    benchmark: Any,
    call: Callable[[], object],
    *,
    flops: int,
    images: int,
    dtype: torch.dtype = torch.float32,
    shapes: Iterable[Shape] = (),
    rounds: int = ROUNDS,
) -> dict[str, Any]:
    """Time a network with pytest-benchmark, matrix products before every round of it.

    Args:
        benchmark: The fixture of pytest-benchmark; the figures go to its ``extra_info``.
        call: Runs the network on one batch.
        flops: What that call computes, from `count_flops`.
        images: In the batch.
        dtype: Of the products it is held against.
        shapes: The network's own products, beside squares of 1024 and 2048.
        rounds: After one to warm up.

    Returns:
        The figures: images_per_second, fraction_of_matmul, its spread, the same fraction of the
        best product by `torch.mm` alone, both rates in GFLOP/s.

    Raises:
        ValueError: More than one thread, whose seconds of the processor would add up.
    """
    _check_threads()
    for _ in range(2):  # TorchScript compiles in its first two calls
        call()
    repeats = max(1, math.ceil(LEAST / _time(call)))
    candidates = fastest_products(dtype, tuple(shapes))
    seconds: dict[Any, list[float]] = {name: [] for name in candidates}

    def products() -> None:
        for name, run in candidates.items():
            seconds[name].append(_time(run))

    spent: list[float] = []

    def model() -> None:
        start = time.process_time()
        for _ in range(repeats):
            call()
        spent.append(time.process_time() - start)

    benchmark.pedantic(model, setup=products, rounds=rounds, warmup_rounds=1)
    del spent[0]  # the warm-up
    paired = {name: times[1:] for name, times in seconds.items()}
    rates = [flops * repeats / one for one in spent]
    work = {name: 2.0 * math.prod(name[1]) for name in candidates}
    fraction, spread, best = share(rates, paired, work)
    torch_only = {name: times for name, times in paired.items() if name[0] == "mm"}
    figures = {
        "images_per_second": round(images * repeats / statistics.median(spent), 1),
        "fraction_of_matmul": round(fraction, 4),
        "fraction_spread": round(spread, 4),
        "fraction_of_torch_mm": round(share(rates, torch_only, work)[0], 4),
        "gflops": round(statistics.median(rates) / 1e9, 1),
        "matmul_gflops": round(work[best] / statistics.median(paired[best]) / 1e9, 1),
        "matmul": f"{best[0]} {'x'.join(map(str, best[1]))} {str(dtype).removeprefix('torch.')}",
    }
    benchmark.extra_info.update(figures)
    return figures


def in_turns(benchmark: Any, ways: Mapping[str, Callable[[], object]], images: int) -> None:
    """Run all ways once a round; images a second, and times as fast as the first way.

    Args:
        benchmark: The fixture of pytest-benchmark; the figures go into its ``extra_info``.
        images: That a way works through.
    """
    _check_threads()
    seconds: dict[str, list[float]] = {way: [] for way in ways}

    def one_round() -> None:
        for way, run in ways.items():
            seconds[way].append(_time(run))

    benchmark.pedantic(one_round, rounds=ROUNDS, warmup_rounds=1)
    reference = next(iter(seconds.values()))
    for way, spent in seconds.items():
        ratios = sorted(slow / fast for slow, fast in zip(reference[1:], spent[1:], strict=True))
        benchmark.extra_info[way] = {
            "images_per_second": round(images / statistics.median(spent[1:]), 1),
            "speed-up": round(statistics.median(ratios), 3),
            "quartiles": [round(ratios[ROUNDS // 4], 3), round(ratios[-1 - ROUNDS // 4], 3)],
        }


def _check_threads() -> None:
    """Seconds of several threads would add up."""
    if torch.get_num_threads() != 1:
        raise ValueError(f"expected one thread, got {torch.get_num_threads()}: OMP_NUM_THREADS=1")


def _time(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


@functools.cache
def fastest_products(
    dtype: torch.dtype, shapes: tuple[Shape, ...] = (), keep: int = 3
) -> dict[tuple[str, Shape], Callable[[], object]]:
    """The few products of the highest rate in three rounds: the others need not be timed again.

    The fastest by `torch.mm` is among them, whether it is one of the few or not.
    """
    every = {
        (name, shape): make(shape, dtype)
        for shape in dict.fromkeys([*SQUARES, *shapes])
        for name, make in (("oneDNN", product), ("mm", plain_product))
    }
    least = dict.fromkeys(every, math.inf)
    for _ in range(3):
        for name, run in every.items():
            least[name] = min(least[name], _time(run))
    ranked = sorted(every, key=lambda name: math.prod(name[1]) / least[name])
    by_torch = [name for name in ranked if name[0] == "mm"]
    return {name: every[name] for name in dict.fromkeys([by_torch[-1], *ranked[-keep:]])}
