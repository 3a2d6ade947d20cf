"""What the machine allows a process: threads and open files."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")
_OTHER_FILES = 512  # that a process may have open beside those of image sets
_PARTS = 4  # of the work of each thread, so that one that is slow holds nobody up for long
_reserved = 0  # files that image sets of this process have asked for


def usable_cpus() -> int:
    """CPUs this process may run on, which in a container is often fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_slices(work: Callable[[slice], Result], count: int, least: int = 1) -> list[Result]:
    """``work(part)`` for consecutive slices of ``range(count)`` by a thread a CPU, in their order.

    Only for work that spends its time outside of Python's lock. No slice but the last is shorter than ``least``, so
    small amounts of work stay on the caller's thread. The threads end with the call: nothing is left to a process
    that is forked afterwards.
    """
    threads = min(usable_cpus(), count // max(1, least))
    if threads <= 1:
        return [work(slice(0, count))] if count else []
    length = max(least, -(-count // (threads * _PARTS)))
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, (slice(first, min(first + length, count)) for first in range(0, count, length))))


def allow_open_files(count: int) -> None:
    """Raise the limit on open files by ``count``, as far as the system lets a process do so for itself.

    Each mapped file keeps a descriptor, and the usual limit of 1,024 is less than the shards of ten million images. Calls add
    up: sets that are open at the same time need their files together.
    """
    global _reserved
    _reserved += count
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OTHER_FILES + _reserved
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    with contextlib.suppress(ValueError, OSError):  # opening a file then says what is wrong
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
