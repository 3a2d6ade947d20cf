"""Independent pieces of work on the threads of one process."""

from __future__ import annotations

import collections
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Part = TypeVar("Part")
Done = TypeVar("Done")


def in_order(make: Callable[[Part], Done], parts: Iterable[Part], threads: int) -> Iterator[Done]:
    """``make(part)`` for each part, in order, by ``threads`` threads that do not share the work of one part.

    The bits of matrix products and convolutions depend on the number of threads that share one: a thread a part makes
    results independent of it, and is faster for small networks than all threads on one part. With one thread it is the
    caller's, a part ahead: on a GPU that part is computed while the last one is used.
    """
    waiting: collections.deque[Done | Future[Done]] = collections.deque()
    if threads == 1:
        for part in parts:
            waiting.append(make(part))
            if len(waiting) > 1:
                yield waiting.popleft()
        yield from waiting
        return
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            for part in parts:
                waiting.append(pool.submit(make, part))
                if len(waiting) > threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
            torch.set_num_threads(threads)  # the workers' setting is also the default of threads started later


def prefetch(make: Callable[[int], Done], first: int, last: int, ahead: int = 2) -> Generator[Done, None, None]:
    """``make(first)`` to ``make(last - 1)`` in order, computed by one background thread up to ``ahead`` items early.

    Once it has failed ``make`` is not called again: what it uses may be broken.
    """
    failed = False

    def made(step: int) -> Done:
        nonlocal failed
        if failed:
            raise CancelledError
        try:
            return make(step)
        except BaseException:
            failed = True
            raise

    with ThreadPoolExecutor(1) as pool:
        waiting: collections.deque[Future[Done]] = collections.deque()
        step = first
        try:
            while waiting or step < last:
                while step < last and len(waiting) <= ahead:
                    waiting.append(pool.submit(made, step))
                    step += 1
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
