from __future__ import annotations

import asyncio
import threading
import time

import numpy as np
import pytest

from wm_inject.serve import Engine, Served, open_models
from wm_inject.serve.engine import Busy, Refused

SIDE = 4


def pixels(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, SIDE, SIDE, 3), dtype=np.uint8)


class Fake:
    """A model that notes its batches and answers when it is let."""

    def __init__(self, *, wait: threading.Event | None = None) -> None:
        self.wait, self.batches = wait, []

    def run(self, feeds, *, timeout=None):
        self.batches.append(len(feeds["image"]))
        if self.wait is not None and not self.wait.wait(timeout):
            raise TimeoutError
        if (feeds["image"] == 255).any():
            raise RuntimeError("a line\nand another")
        return {"output": feeds["image"] + 1}


def fake(**settings) -> Served:
    return Served("fake", Fake(**settings), None, joins=True)


def image(n: int = 1, value: int = 0) -> dict[str, np.ndarray]:
    return {"image": np.full((n, 2), value, np.uint8)}


def test_waiting_requests_share_runs_and_get_their_own_answers():
    async def scene() -> None:
        held = threading.Event()
        served, told = fake(wait=held), []
        engine = Engine(max_batch=8, on_batch=lambda name, images: told.append((name, images)))
        first = asyncio.ensure_future(engine.run(served, image(value=100), 1))
        await asyncio.sleep(0.02)
        counts = [1, 2, 1, 4, 3]
        rest = [
            asyncio.ensure_future(engine.run(served, image(n, value), n))
            for value, n in enumerate(counts)
        ]
        await asyncio.sleep(0.02)
        assert engine.images == 1 + sum(counts)
        held.set()
        assert (await first)["output"].tolist() == [[101, 101]]
        for value, (n, found) in enumerate(zip(counts, await asyncio.gather(*rest), strict=True)):
            assert found["output"].tolist() == [[value + 1] * 2] * n
        # 1 + 2 + 1 + 4 fill a batch; 3 come after.
        assert served.model.batches == [1, 8, 3] and engine.images == 0
        assert told == [("fake", 1), ("fake", 8), ("fake", 3)]
        await engine.close(1)

    asyncio.run(scene())


def test_requests_of_another_shape_or_model_run_apart(serve_models):
    async def scene() -> None:
        engine = Engine(delay=0.02)
        served = serve_models["float"]
        sizes = [(2, 3), (3, 2), (2, 3)]
        feeds = [np.full((1, 3, *size), 0.5, np.float32) for size in sizes]
        told = serve_models["told"]
        vectors = {"ids": np.array([7]), "target": np.array([1])}
        found = await asyncio.gather(
            *(engine.run(served, {"image": one}, 1) for one in feeds),
            engine.run(told, {"image": pixels(1, 0), **vectors}, 1),
        )
        for one, answer in zip(feeds, found[:3], strict=True):
            assert np.array_equal(answer["output"], one / 2)
        assert found[3]["sum"].tolist() == [8]
        await engine.close(1)

    asyncio.run(scene())


def test_a_delay_gathers_and_a_full_batch_does_not_wait():
    async def scene() -> None:
        served = fake()
        engine = Engine(max_batch=3, delay=5)
        start = time.monotonic()
        await asyncio.gather(*(engine.run(served, image(), 1) for _ in range(3)))
        assert served.model.batches == [3] and time.monotonic() - start < 4
        engine.delay = 0.05
        start = time.monotonic()
        await engine.run(served, image(), 1)
        assert time.monotonic() - start >= 0.04
        await engine.close(1)

    asyncio.run(scene())


def test_one_bad_request_does_not_spoil_its_neighbours(serve_models):
    async def scene() -> None:
        engine = Engine(delay=0.02)
        served = serve_models["table"]
        targets = [0, 1, 99, 3, -77, 4]
        found = await asyncio.gather(
            *(
                engine.run(served, {"image": pixels(1, t % 9), "target": np.array([t])}, 1)
                for t in targets
            ),
            return_exceptions=True,
        )
        for target, answer in zip(targets, found, strict=True):
            if target in range(5):
                assert answer["score"].tolist() == [target]
                assert np.array_equal(answer["output"], pixels(1, target % 9))
            else:
                assert isinstance(answer, Refused) and "\n" not in str(answer)
        await engine.close(1)

    asyncio.run(scene())


def test_a_large_request_runs_in_parts():
    async def scene() -> None:
        served = fake()
        engine = Engine(max_batch=4)
        feeds = {"image": np.arange(20, dtype=np.uint8).reshape(10, 2)}
        found = await engine.run(served, feeds, 10)
        assert np.array_equal(found["output"], feeds["image"] + 1)
        assert served.model.batches == [4, 4, 2]
        with pytest.raises(ValueError, match="at most 1024 images in a request, got 1025"):
            await engine.run(served, image(1025), 1025)
        await engine.close(1)

    asyncio.run(scene())


def test_a_model_of_one_image_gets_one_image_at_a_time(serve_models):
    async def scene() -> None:
        served = serve_models["one"]
        assert not served.joins and serve_models["told"].joins
        engine = Engine(delay=0.2)
        values = [np.array([[bool(i & 1), bool(i & 2), True, False]]) for i in range(4)]
        found = await asyncio.gather(*(engine.run(served, {"image": v}, 1) for v in values))
        for value, answer in zip(values, found, strict=True):
            assert np.array_equal(answer["output"], ~value)
        await engine.close(1)

    asyncio.run(scene())


def test_a_full_queue_says_so_and_recovers():
    async def scene() -> None:
        held = threading.Event()
        engine, served = Engine(queue=4), fake(wait=held)
        accepted = [asyncio.ensure_future(engine.run(served, image(2), 2)) for _ in range(2)]
        await asyncio.sleep(0.02)
        with pytest.raises(Busy, match="the queue is full"):
            await engine.run(served, image(), 1)
        held.set()
        await asyncio.gather(*accepted)
        await engine.run(served, image(4), 4)
        await engine.close(1)
        with pytest.raises(Busy, match="the server stops"):
            await engine.run(served, image(), 1)

    asyncio.run(scene())


def test_time_runs_out_in_the_queue_and_in_the_model():
    async def scene() -> None:
        held = threading.Event()
        engine, served = Engine(timeout=0.1, max_batch=1), fake(wait=held)
        found = await asyncio.gather(
            *(engine.run(served, image(), 1) for _ in range(3)), return_exceptions=True
        )
        assert [type(one) for one in found] == [TimeoutError] * 3
        assert len(served.model.batches) < 3 and engine.images == 0
        held.set()
        assert (await engine.run(served, image(), 1))["output"].tolist() == [[1, 1]]
        await engine.close(1)

    asyncio.run(scene())


def test_a_run_that_takes_too_long_is_broken_off(serve_models):
    async def scene() -> None:
        engine = Engine(timeout=0.05)
        feeds = {"image": np.zeros((4, 1, 256, 256), np.float32)}
        with pytest.raises(TimeoutError):
            await engine.run(serve_models["deep"], feeds, 4)
        await engine.close(1)

    asyncio.run(scene())


def test_clients_that_leave_free_their_place():
    async def scene() -> None:
        held = threading.Event()
        engine, served = Engine(max_batch=1), fake(wait=held)
        running = asyncio.ensure_future(engine.run(served, image(), 1))
        waiting = [asyncio.ensure_future(engine.run(served, image(), 1)) for _ in range(3)]
        await asyncio.sleep(0.02)
        for task in waiting:
            task.cancel()
        held.set()
        await running
        await asyncio.gather(*waiting, return_exceptions=True)
        assert engine.images == 0 and served.model.batches == [1]
        await engine.close(1)

    asyncio.run(scene())


def test_closing_waits_but_not_for_ever():
    async def scene() -> None:
        held = threading.Event()
        engine, served = Engine(), fake(wait=held)
        task = asyncio.ensure_future(engine.run(served, image(), 1))
        await asyncio.sleep(0.02)
        start = time.monotonic()
        await engine.close(0.1)
        assert 0.05 < time.monotonic() - start < 2 and not task.done()
        held.set()
        assert (await task)["output"].tolist() == [[1, 1]]

    asyncio.run(scene())


def test_a_detector_tells_its_threshold(serve_graphs):
    found = open_models({"judge": serve_graphs["judge"]})["judge"].describe()
    assert found["parameters"] == {"threshold": 2.5, "false_positive_rate": 0.01}


def test_models_are_opened_by_name(serve_graphs):
    models = open_models({"a.b-c_1": serve_graphs["told"]})
    found = models["a.b-c_1"].describe()
    assert found == {
        "name": "a.b-c_1",
        "versions": ["1"],
        "platform": "onnx_onnxv1",
        "inputs": [
            {"name": "image", "datatype": "UINT8", "shape": [-1, SIDE, SIDE, 3]},
            {"name": "ids", "datatype": "INT64", "shape": [-1]},
            {"name": "target", "datatype": "INT64", "shape": [-1]},
        ],
        "outputs": [
            {"name": "output", "datatype": "UINT8", "shape": [-1, SIDE, SIDE, 3]},
            {"name": "sum", "datatype": "INT64", "shape": [-1]},
        ],
    }
    for name in ("", "a/b", "../a", "a b", "-a", "x" * 65, "ä"):
        with pytest.raises(ValueError, match="expected a model name"):
            open_models({name: serve_graphs["told"]})
    with pytest.raises(ValueError, match="expected at least one model"):
        open_models({})
    with pytest.raises(ValueError, match="found no file"):
        open_models({"a": "nowhere.onnx"})
