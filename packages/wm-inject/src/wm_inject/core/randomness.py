"""Seeds, and blocks of code in which torch's global generators are seeded."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """Seed torch's global generators inside the block; they are put back afterwards.

    For layer initialisers and dropout, which take no generator. The generator of ``device`` is
    seeded beside the CPU's.

    Raises:
        ValueError: A seed outside 0 .. 2**63 - 1.
    """
    if not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(f"expected a seed in 0 .. 2**63 - 1, got {seed!r}")
    device = torch.device(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        if device.type == "cuda":
            torch.manual_seed(seed)
        else:  # `torch.manual_seed` would also reseed every GPU, for good
            torch.default_generator.manual_seed(seed)
        yield


def derive_seed(*parts: str | int) -> int:
    """A seed in 0 .. 2**48 - 1 from a purpose and numbers, such as ``("train", seed, epoch)``.

    Far from the small seeds of users: the same seed for a poisoning plan and an epoch would put
    all poisoned images into the first batches.
    """
    text = " ".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")
