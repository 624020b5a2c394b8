"""What `evaluate` costs beyond the classifier's own forward passes, as a ratio in one run."""

from __future__ import annotations

import time

import pytest
import torch

from wm_eval import evaluate
from wm_extract import PAPER_CORRUPTIONS
from wm_inject import BadNetsTrigger
from wm_victim import ImageSet, build_classifier, predict

ROUNDS = 3


@pytest.mark.bench
def test_evaluate_against_bare_forward_passes(benchmark) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(128, 3, 32, 32, generator=generator)
    data = ImageSet(images, torch.arange(128) % 10, torch.arange(128))
    model = build_classifier("resnet10", num_classes=10, channels=3, image_size=32, width=16).eval()
    trigger = BadNetsTrigger(image_size=32)
    passes = 2 * len(PAPER_CORRUPTIONS)
    spent = {"evaluate": 0.0, "bare": 0.0}

    def one_round() -> None:
        # Interleaved, so that whatever else the machine does falls on both alike.
        start = time.perf_counter()
        evaluate(model, trigger, data, target=0, corruptions=PAPER_CORRUPTIONS)
        middle = time.perf_counter()
        for _ in range(passes):
            predict(model, images)
        spent["evaluate"] += middle - start
        spent["bare"] += time.perf_counter() - middle

    benchmark.pedantic(one_round, rounds=ROUNDS, warmup_rounds=1)
    benchmark.extra_info["evaluate / bare forward passes"] = spent["evaluate"] / spent["bare"]
