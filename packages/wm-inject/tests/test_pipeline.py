from __future__ import annotations

import threading
import time

import pytest

from wm_inject.runtime.pipeline import AHEAD, WORKERS, pipeline


def test_everything_comes_out_in_order_and_is_written_by_then():
    written = []

    def read(item):
        time.sleep(0.002 * (item % 3))
        return 10 * item

    def write(item, done):
        time.sleep(0.002 * (item % 2))
        written.append((item, done))

    seen = []
    for item, done in pipeline(range(20), read, lambda item, got: got + item, write):
        assert (item, done) in written
        seen.append((item, done))
    assert seen == [(n, 11 * n) for n in range(20)] and sorted(written) == seen


def test_nothing_to_do_and_nothing_to_write():
    assert list(pipeline([], abs, lambda item, got: got)) == []
    assert list(pipeline([-2, 3], abs, lambda item, got: got)) == [(-2, 2), (3, 3)]


def test_reading_goes_on_while_one_is_worked_on():
    """Each read waits for the one before to be worked on, less one: in a row it would never end."""
    begun = [threading.Event() for _ in range(6)]

    def read(item):
        begun[item].set()
        return item

    def work(item, got):
        assert item == 5 or begun[item + 1].wait(10)
        return got

    assert len(list(pipeline(range(6), read, work))) == 6


def test_only_a_few_batches_are_held():
    taken, done = [], []

    def items():
        for number in range(50):
            taken.append(number)
            yield number

    def work(item, got):
        assert len(taken) - len(done) <= 2 * (AHEAD + 1)
        return got

    for item, _ in pipeline(items(), abs, work, lambda item, got: None):
        done.append(item)
    assert len(done) == 50 and WORKERS >= 1


@pytest.mark.parametrize("place", ["read", "work", "write"])
def test_the_first_error_ends_it_and_finished_work_is_written(place):
    written = []

    def failing(name):
        def step(item, *got):
            if name == place and item == 7:
                raise OSError(f"cannot {name} 7")
            if name == "write":
                written.append(item)
            return item

        return step

    with pytest.raises(OSError, match=f"cannot {place} 7"):
        list(pipeline(range(1000), failing("read"), failing("work"), failing("write")))
    assert set(range(7)) <= set(written) and max(written) < 7 + 2 * (AHEAD + 2)
    assert not [t for t in threading.enumerate() if t.name.startswith("wm-pipeline")]


def test_a_reader_who_stops_early_leaves_no_thread_behind():
    for item, _ in pipeline(range(1000), abs, lambda item, got: got):
        if item == 3:
            break
    assert not [t for t in threading.enumerate() if t.name.startswith("wm-pipeline")]
