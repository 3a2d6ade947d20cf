"""Pieces of work on threads: order, how far ahead, failures."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from synthfast.errors import SynthfastError
from synthfast.parallel import in_order, prefetch


@pytest.mark.parametrize("threads", [1, 3])
def test_results_come_in_order_and_few_ahead(threads):
    started, lock, done = [], threading.Lock(), 0

    def make(part: int) -> int:
        with lock:
            started.append(part)
        time.sleep(0.02 if part % 2 == 0 else 0.001)
        return part

    for number in in_order(make, range(12), threads):
        assert number == done
        done += 1
        assert len(started) <= done + threads
    assert done == 12 and sorted(started) == list(range(12))


@pytest.mark.parametrize("threads", [1, 2])
def test_a_part_that_fails_stops_the_work(threads):
    made = []

    def make(part: int) -> int:
        if part == 3:
            raise SynthfastError("number 3 failed")
        made.append(part)
        return part

    with pytest.raises(SynthfastError, match="number 3 failed"):
        list(in_order(make, range(100), threads))
    assert len(made) < 10


def test_a_part_has_one_thread_and_the_setting_comes_back():
    torch.set_num_threads(2)
    assert list(in_order(lambda _: torch.get_num_threads(), range(5), 2)) == [1] * 5
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)


def test_prefetched_items_come_in_order_and_few_ahead():
    made, lock = [], threading.Lock()

    def make(step: int) -> int:
        assert threading.current_thread() is not threading.main_thread()
        with lock:
            made.append(step)
        return step

    for taken, step in enumerate(prefetch(make, 3, 20, ahead=2), start=1):
        assert step == 2 + taken
        time.sleep(0.003)
        assert len(made) <= taken + 3
    assert made == list(range(3, 20))


def test_nothing_to_prefetch():
    assert list(prefetch(int, 5, 5)) == list(prefetch(int, 7, 5)) == []


def test_an_error_in_the_background_comes_to_the_reader():
    def make(step: int) -> int:
        if step == 2:
            raise OSError("unreadable")
        return step

    taken = []
    with pytest.raises(OSError, match="unreadable"):
        for step in prefetch(make, 0, 10):
            taken.append(step)
    assert taken == [0, 1]


def test_a_reader_that_stops_early_stops_the_reading_ahead():
    made, begun, go = [], threading.Event(), threading.Event()

    def make(step: int) -> int:
        made.append(step)
        if step == 1:
            begun.set()
            assert go.wait(10)
        return step

    items = prefetch(make, 0, 100, ahead=5)
    assert next(items) == 0 and begun.wait(10)
    threading.Timer(0.05, go.set).start()  # close() waits for the item being made
    items.close()
    assert made == [0, 1]


def test_a_reader_that_stops_early_leaves_no_thread():
    before = threading.active_count()
    for step in prefetch(lambda step: step, 0, 1_000_000):
        if step == 3:
            break
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before


def test_what_has_failed_is_not_called_again():
    """DALI's pipelines crash where they are run again."""
    asked = []

    def make(step):
        asked.append(step)
        if step == 2:
            raise ValueError("broken")
        return step

    items = prefetch(make, 0, 9)
    assert [next(items), next(items)] == [0, 1]
    time.sleep(0.2)  # the next ones have been made
    with pytest.raises(ValueError, match="broken"):
        next(items)
    assert asked == [0, 1, 2]
