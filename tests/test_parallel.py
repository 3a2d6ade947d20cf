"""Pieces of work on threads: order, how far ahead, failures."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from synthfast.errors import SynthfastError
from synthfast.parallel import in_order


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
