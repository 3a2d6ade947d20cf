"""The lock of a folder at a URL."""

from __future__ import annotations

import itertools
import json
import os
import random
import socket
import subprocess
import sys
import threading

import pytest

from synthfast.data.storage import lock as remote_lock
from synthfast.data.storage.lock import RemoteLock
from synthfast.errors import SynthfastError

URL = "memory://bucket/set"


def test_the_lock_says_who_holds_it_and_how_to_be_rid_of_it(memory, there):
    lock = RemoteLock(URL)
    message = (
        rf"memory://bucket/set: another process is writing this folder \(process {os.getpid()} on {socket.gethostname()} since "
        r"\d{4}-.*Z\); wait for it to end, or if it is dead remove memory://bucket/set/"
    )
    with pytest.raises(SynthfastError, match=message) as error:
        RemoteLock(URL)
    assert [str(error.value).rpartition("/")[2]] == list(there(memory))
    lock.close()
    lock.close()
    RemoteLock(URL).close()
    assert there(memory) == {}


CLAIM = "/bucket/set/.synthfast-lock-0123456789abcdef.json"


@pytest.mark.parametrize("key", ["host", "boot", "namespace"])
def test_a_lock_of_another_host_is_not_taken_over(memory, key, there):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    lock = {**remote_lock._process(), "pid": dead.pid, "time": "2026-01-01T00:00:00Z"}
    memory.pipe_file(CLAIM, json.dumps({**lock, key: "elsewhere"}).encode())
    with pytest.raises(SynthfastError, match=f"process {dead.pid} on .* since 2026-01-01T00:00:00Z"):
        RemoteLock(URL)
    memory.pipe_file(CLAIM, json.dumps(lock).encode())
    RemoteLock(URL).close()
    assert there(memory) == {}


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"pid": "1"}', b'{"pid": -1}', b'{"pid": 1e400}'])
def test_a_lock_that_says_nothing_is_respected(memory, content):
    here = json.dumps(remote_lock._process())[:-1] + ", "
    if content.startswith(b'{"pid"'):
        content = here.encode() + content[1:]
    memory.pipe_file(CLAIM, content)
    with pytest.raises(SynthfastError, match="another process is writing this folder"):
        RemoteLock(URL)


def steps_of_two(memory, order: list[int]) -> list[bool]:
    """Two processes that want the lock at once, each stopped before every step at the storage; ``order`` says whose turn it is,
    until one is through. Who has got it?"""
    turn, got = [threading.Semaphore(0) for _ in range(2)], [False, False]
    arrived, mine = [threading.Event(), threading.Event()], threading.local()
    real = {name: getattr(type(memory), name) for name in ("ls", "pipe_file", "rm_file", "cat_file")}

    def stop() -> None:
        arrived[mine.number].set()
        turn[mine.number].acquire()

    def stopping(name: str):
        def step(self, *arguments, **options):
            stop()
            return real[name](self, *arguments, **options)

        return step

    def want(number: int) -> None:
        mine.number = number
        try:
            RemoteLock(URL)
            got[number] = True
        except SynthfastError:
            pass
        finally:
            arrived[number].set()

    with pytest.MonkeyPatch.context() as patch:
        for name in real:
            patch.setattr(type(memory), name, stopping(name))
        threads = [threading.Thread(target=want, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for number in order:
            arrived[number].wait(10)
            if threads[number].is_alive():
                arrived[number].clear()
                turn[number].release()
        for number in range(2):  # then each to its end
            for _ in range(100):
                turn[number].release()
            threads[number].join(10)
            assert not threads[number].is_alive()
    return got


@pytest.mark.parametrize("dead", [False, True])
def test_of_two_at_once_at_most_one_gets_it_in_whatever_order_they_go(memory, dead):
    """Every order of the first six steps of each; with a claim that a killed process left, or without."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    left = json.dumps({**remote_lock._process(), "pid": gone.pid}).encode()
    orders = [[int(k in first) for k in range(12)] for first in itertools.combinations(range(12), 6)]
    results = []
    for order in random.Random(0).sample(orders, 150):
        memory.store.clear()
        if dead:
            memory.pipe_file(CLAIM, left)
        results.append(sum(steps_of_two(memory, order)))
    assert max(results) == 1 and results.count(0) < 15
