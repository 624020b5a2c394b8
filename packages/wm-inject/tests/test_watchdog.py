from __future__ import annotations

import threading
import time

from wm_inject.runtime import watchdog
from wm_inject.runtime.watchdog import after


def test_it_calls_when_the_time_is_over_and_only_then():
    called = threading.Event()
    with after(60, called.set):
        assert not called.wait(0.05)
    with after(0.02, called.set):
        assert called.wait(10)


def test_what_was_left_in_time_is_never_called():
    late = []
    for number in range(50):
        with after(0.05, lambda n=number: late.append(n)):
            pass
    time.sleep(0.15)
    assert late == []


def test_deadlines_are_kept_in_any_order_by_one_thread():
    order: list[str] = []
    done = threading.Event()

    def last() -> None:
        order.append("late")
        done.set()

    with after(0.15, last), after(0.02, lambda: order.append("soon")), after(60, done.set):
        assert done.wait(10)
    assert order == ["soon", "late"]
    assert sum(thread.name == "wm-watchdog" for thread in threading.enumerate()) == 1
    assert watchdog._WATCHDOG._heap == [] and watchdog._WATCHDOG._calls == {}


def test_many_threads_share_it():
    counts = [0] * 8

    def work(place: int) -> None:
        for _ in range(200):
            with after(30, lambda: None):
                counts[place] += 1

    threads = [threading.Thread(target=work, args=(place,)) for place in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert counts == [200] * 8 and not watchdog._WATCHDOG._calls
