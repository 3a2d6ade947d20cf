"""Commands in processes of their own that can be killed, limited and watched; references made once."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from synthfast.artifacts import TEMPORARY_PREFIX, load_tensors
from synthfast.data import verify
from synthfast.training.state import STATE_FILE, load_notes

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
    """``start(cwd, "sample", "--n", 3)`` starts a command; options: see :mod:`zygote`."""
    numbers, said = itertools.count(), tmp_path_factory.mktemp("said")

    def begin(cwd: Path, *words: object, **further: object) -> Running:
        folder = said / str(next(numbers))
        folder.mkdir()
        request = {"env": {}, "limit": None, "fail": None, "audit": None, "memory": None, **further}
        request |= {name: str(folder / name) for name in ("out", "err")}
        pid = zygote.ask(run=[str(word) for word in words], cwd=str(cwd), **request)
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


FEW = ("--dataset", "npz:few.npz", "--checkpoint-every", 2)
RANDOM = ("--real", "npz:real.npz", "--synthetic", "npz:fake.npz")


@dataclass(frozen=True)
class Command:
    """A command as small as it can be, to be run in a copy of the world: what it writes, and the first thing it does to it.

    words: of the command line, ``--out`` and ``--device`` included.
    out: what it leaves.
    locked: the folder or file that it keeps others out of; None where a single file is written at once.
    sign: a file that shows that it is at work.
    """

    words: tuple[object, ...]
    out: str
    locked: str | None = None
    sign: str = ""

    @property
    def line(self) -> tuple[object, ...]:
        device = () if self.words[0] in ("select", "report", "shards") else ("--device", "cpu")
        return (*self.words, *device, "--out", self.out)


SAMPLE = ("sample", "-n", 300, "--shard-size", 20, "--batch-size", 10, "--steps", 2, "--labels", "uniform")
COMMANDS = {
    "sample": Command(SAMPLE, "out", "out", "out/shard-000000.json"),
    "sample-wds": Command((*SAMPLE, "--format", "wds"), "out", "out", "out/shard-000000.json"),
    "diffusion": Command(
        ("train", "generator", *FEW, "--steps", 6, "--batch-size", 4), "out", "out", "out/samples-000002.png"
    ),
    "gan": Command(
        ("train", "generator", "--arch", "gan", *FEW, "--steps", 6, "--batch-size", 4),
        *("out", "out", "out/samples-000002.png"),
    ),
    "classifier": Command(
        ("train", "classifier", *FEW, "--steps", 6, "--batch-size", 8, "--ema", 0.9, "--validation", 20),
        *("out", "out", "out/config.json"),
    ),
    "arc": Command(
        (
            *("score", "arc", *RANDOM, "--discriminator", "linear", "--eps", "0:0.4:5", "--steps", 25),
            *("--batch-size", 32, "--bootstrap", 100, "--measure-steps", 10, "--restarts", 1),
        ),
        *("out.json", "out.json.progress", "out.json.progress/facts.json"),
    ),
    "robust": Command(
        (
            *("score", "robust", "--classifier", "classifier", "--dataset", "npz:few.npz", "--attack", "pgd"),
            *("--attack-steps", 40, "--eps", 0.1, "--batch-size", 4),
        ),
        *("out.json", "out.json.progress", "out.json.progress/00-00000000"),
    ),
    "accuracy": Command(("score", "accuracy", "--classifier", "classifier", "--dataset", "npz:few.npz"), "out.json"),
    "fid": Command(("score", "fid", *RANDOM), "out.json"),
    "prdc": Command(("score", "prdc", *RANDOM), "out.json"),
    "samples": Command(
        ("score", "samples", "--synthetic", "shards", "--scores", "density,memorization", "--scores-folder", "mine"),
        *("out.json", "mine", "mine/.tmp-density_distance.npy"),
    ),
    "select": Command(("select", "shards", "--by", "density", "--low-density", 1), "out.npy", "out.npy"),
    "rank": Command(
        (
            *("rank", "shards", "two=digits", "--samples", 60, "--steps", 3, "--seeds", 1, "--eps", 0.1),
            *("--attack-steps", 2, "--batch-size", 16, "-n", 40, "--arc", "arc.toml"),
        ),
        *("out", "out", "out/shards/arc-result.json.progress/facts.json"),
    ),
    "inflection": Command(
        (
            *("inflection", "--synthetic", "shards", "--counts", 40, "--seeds", 1, "--methods", "standard"),
            *("--steps", 4, "--batch-size", 32, "--attack-steps", 2, "--eps", 0.1, "-n", 20),
        ),
        *("out", "out", "out/standard-real-seed-0/config.json"),
    ),
    "report": Command(("report", "arc.json"), "out.html"),
    "export-npy": Command(
        ("shards", "export", "many", "--to", "npy", "--shard-size", 30), "out", "out", "out/shard-000000.json"
    ),
    "export-wds": Command(
        ("shards", "export", "many", "--to", "wds", "--shard-size", 30), "out", "out", "out/shard-000000.json"
    ),
    "export-npz": Command(
        ("shards", "export", "many", "--to", "npz", "--compress"), "out.npz", "out.npz", ".tmp-out.npz"
    ),
    "export-folder": Command(("shards", "export", "many", "--to", "folder"), "out", "out", "out/0"),
    "merge": Command(("shards", "merge", "many", "many", "--shard-size", 50), "out", "out", "out/shard-000000.json"),
    "import": Command(("shards", "import", "npz:many.npz", "--shard-size", 30), "out", "out", "out/shard-000000.json"),
}


@pytest.fixture(scope="session")
def commands() -> dict[str, Command]:
    return COMMANDS


@pytest.fixture(scope="session")
def world(run: Start, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that the commands read: images, a scored shard folder, a classifier, a result."""
    folder, draw = tmp_path_factory.mktemp("world"), np.random.default_rng(0)
    sets = (("few", 60, 0, 256), ("real", 200, 50, 256), ("fake", 200, 0, 200), ("many", 1500, 0, 256))
    for name, count, low, high in sets:
        images = draw.integers(low, high, (count, 8, 8), np.uint8)
        np.savez(folder / f"{name}.npz", image=images, label=np.arange(count) % 2)
    (folder / "arc.toml").write_text("radii = 2\nsteps = 25\nmeasure_steps = 3\nrestarts = 1\nbootstrap = 100\n")
    training = COMMANDS["classifier"].words
    for words in (
        ("sample", "-n", 60, "--shard-size", 40, "--steps", 1, "--device", "cpu", "--out", "shards"),
        ("score", "samples", "--synthetic", "shards", "--scores", "density", "--device", "cpu"),
        ("shards", "import", "npz:many.npz", "--shard-size", 1000, "--out", "many"),
        (*training, "--device", "cpu", "--out", "classifier"),
        (*COMMANDS["arc"].words, "--device", "cpu", "--out", "arc.json"),
    ):
        ran = run(folder, *words)
        assert ran.status == 0, ran.err
    (folder / "arc.png").unlink()
    return folder


@pytest.fixture
def copy(world: Path, tmp_path: Path) -> Path:
    """A copy of the world of a test's own."""
    return Path(shutil.copytree(world, tmp_path / "copy"))


@dataclass(frozen=True)
class Reference:
    """What an undisturbed run leaves in a copy of the world, and how long it takes."""

    left: dict[str, bytes]
    seconds: float
    world: Path

    def differing(self, folder: Path) -> list[str]:
        """The names of the files that another copy of the world, or an empty folder, does not hold alike."""
        return differences(beyond(folder, self.world), self.left)


def comparable(files: dict[str, bytes]) -> dict[str, object]:
    """Every file byte for byte, but that results are without seconds and what was made by which run, and that the metadata of a
    state, which come in any order, are parsed."""
    found: dict[str, object] = {}
    for name, data in files.items():
        if Path(name).name.startswith(TEMPORARY_PREFIX):  # half of a file, maybe
            found[name] = data
        elif name.endswith(".json") and "seconds" in (result := json.loads(data)):
            del result["seconds"]
            result.get("curves", {}).get("arc", {}).pop("seconds", None)
            for score in result.get("scores", {}).values():  # of score samples
                del score["made"]
            found[name] = result
        elif name.endswith(STATE_FILE):
            found[name] = sorted_state(data)
        else:
            found[name] = data
    return found


def sorted_state(data: bytes) -> tuple[object, ...]:
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    return header.pop("__metadata__"), header, data[8 + size :]


def differences(files: dict[str, bytes], others: dict[str, bytes]) -> list[str]:
    found, expected = comparable(files), comparable(others)
    return sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))


@pytest.fixture(scope="session")
def reference(run: Start, world: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Reference]:
    """``reference("sample")``: each command once, undisturbed."""
    made: dict[str, Reference] = {}

    def get(name: str) -> Reference:
        if name not in made:
            folder = Path(shutil.copytree(world, tmp_path_factory.mktemp(name) / "copy"))
            begin = time.monotonic()
            ran = run(folder, *COMMANDS[name].line)
            assert ran.status == 0, ran.err
            seconds = time.monotonic() - begin
            made[name] = Reference(beyond(folder, world), seconds, world)
        return made[name]

    return get


def beyond(folder: Path, world: Path) -> dict[str, bytes]:
    """What a copy of the world holds beyond it."""
    given = tree(world).keys()
    return {name: data for name, data in tree(folder).items() if name not in given}


@pytest.fixture(scope="session")
def left_in(world: Path) -> Callable[[Path], dict[str, bytes]]:
    return lambda folder: beyond(folder, world)


def check_files(folder: Path) -> None:
    """Files under their own names are whole, and shards that count as finished are as recorded."""
    out = folder / "out"
    if (out / "manifest.json").exists():
        assert [line for line in verify(out) if "incomplete" not in line] == []
    if out.exists():
        load_notes(out)
    for path in folder.rglob("*.safetensors"):
        if not path.name.startswith(".tmp-"):
            load_tensors(path)
    for path in folder.rglob("*.json"):
        if not path.name.startswith(".tmp-"):
            json.loads(path.read_text())


@pytest.fixture(scope="session")
def nothing_half_done() -> Callable[[Path], None]:
    return check_files
