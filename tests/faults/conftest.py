"""Commands in processes of their own that can be killed, limited and watched; references made once."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

PATIENCE = 240  # seconds until a process that does nothing is taken for hung


class Zygote:
    """The server of :mod:`zygote`."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("zygote.py"))],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        assert self._process.stdout.readline() == "0\n"

    def ask(self, **request: object) -> int:
        self._process.stdin.write(json.dumps(request) + "\n")
        return int(self._process.stdout.readline())

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(10)


@dataclass
class Running:
    """A command that was started: its process, and what it has said so far."""

    pid: int
    zygote: Zygote
    folder: Path
    status: int | None = None
    started: float = field(default_factory=time.monotonic)

    @property
    def out(self) -> str:
        return (self.folder / "out").read_text()

    @property
    def err(self) -> str:
        return (self.folder / "err").read_text()

    @property
    def ended(self) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        return True

    def wait(self) -> Running:
        deadline = time.monotonic() + PATIENCE
        while self.status is None and not self.ended:
            if time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"hung: {self.out} {self.err}")
            time.sleep(0.002)
        if self.status is None:
            self.status = self.zygote.ask(wait=self.pid)
        return self

    def kill(self) -> Running:
        """The whole process group, as ``kill -9`` does it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):  # one so young that it has no group of its own yet
            os.kill(self.pid, signal.SIGKILL)
        self.status = self.zygote.ask(wait=self.pid)
        return self

    @property
    def error(self) -> str:
        """The one line of a command that failed, without the program's name."""
        assert self.status in (1, 2), (self.status, self.out, self.err)
        assert self.err.startswith("synthfast: ") and self.err.count("\n") == 1, self.err
        assert self.err.endswith("\n")
        return self.err[len("synthfast: ") : -1]


Start = Callable[..., Running]


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    server = Zygote()
    yield server
    server.close()


@pytest.fixture(scope="session")
def start(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Start:
    """``start(cwd, "sample", "--n", 3)`` starts a command; ``limit``: of the size of its files in bytes."""
    numbers, said = itertools.count(), tmp_path_factory.mktemp("said")

    def begin(cwd: Path, *words: object, limit: int | None = None, env: dict[str, str] | None = None) -> Running:
        folder = said / str(next(numbers))
        folder.mkdir()
        names = {name: str(folder / name) for name in ("out", "err")}
        pid = zygote.ask(run=[str(word) for word in words], cwd=str(cwd), env=env or {}, limit=limit, **names)
        return Running(pid, zygote, folder)

    return begin


@pytest.fixture(scope="session")
def run(start: Start) -> Start:
    """``start`` and wait for the end."""
    return lambda *words, **options: start(*words, **options).wait()


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder by its relative name; a folder without files as name and slash."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file():
            found[name] = path.read_bytes()
        elif not any(path.iterdir()):
            found[name + "/"] = b""
    return found


@pytest.fixture(scope="session")
def contents() -> Callable[[Path], dict[str, bytes]]:
    return tree
