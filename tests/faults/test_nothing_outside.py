"""Nothing outside the output is ever written: not where a command is started, not at home, not beside what it reads."""

from __future__ import annotations

import getpass
import json
import os
import re
import shutil
from pathlib import Path

import pytest

# torch's folder for compiled code, which stays empty. (matplotlib keeps a list of fonts at home; here it is loaded already.)
OTHERS = f"torchinductor_{getpass.getuser()}"
# More than --out.
LEAVES = {
    "arc": ("out.json", "out.png"),
    "select": ("out.json", "out.npy", "out.weights.npy"),
}
NAMES = (
    *("sample", "diffusion", "classifier", "arc", "robust", "accuracy", "fid", "prdc", "samples", "select"),
    *(
        "rank",
        "report",
        "sample-wds",
        "export-npy",
        "export-wds",
        "export-npz",
        "export-folder",
        "merge",
        "import",
        "gan",
    ),
)


def state(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Every file and folder with its size, time of change and number."""
    found = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        status = path.lstat()
        if name != OTHERS:
            found[name] = (status.st_size, status.st_mtime_ns, status.st_ino)
    return found


def changed(audit: Path) -> list[Path]:
    """The paths that Python touched, without those of other packages."""
    paths = [path for path in json.loads(audit.read_text()) if path != os.devnull]
    return [Path(path) for path in paths if Path(path).name != OTHERS]


@pytest.mark.parametrize("name", NAMES)
def test_only_the_output_appears(run, commands, world, tmp_path, name):
    """By listings of every place, and by what Python opened, made, renamed and removed."""
    command = commands[name]
    places = {place: tmp_path / place for place in ("home", "here", "temporary", "out")}
    for place in places.values():
        place.mkdir()
    read = Path(shutil.copytree(world, tmp_path / "read"))

    def placed(word: object) -> object:
        """Names of files become paths of what is read; what is written goes to the folder out."""
        kind, sign, file = re.fullmatch("(.*?)([:=]?)([^:=]*)", str(word)).groups()
        if word in (command.out, command.locked):
            return places["out"] / word
        return f"{kind}{sign}{read / file}" if (read / file).exists() else word

    before = {place: state(path) for place, path in {**places, "read": read}.items()}
    variables = {"HOME": "home", "TMPDIR": "temporary", "XDG_CACHE_HOME": "home", "XDG_CONFIG_HOME": "home"}
    ran = run(
        places["here"],
        *command.line[:2] if command.line[0] in ("train", "score") else command.line[:1],
        *map(placed, command.line[2:] if command.line[0] in ("train", "score") else command.line[1:]),
        audit=str(tmp_path / "audit.json"),
        env={variable: str(places[place]) for variable, place in variables.items()},
    )
    assert ran.status == 0, ran.err
    for place in ("home", "here", "temporary", "read"):
        assert state(tmp_path / place) == before[place]
    lock = command.locked if command.locked and not Path(command.locked).suffix else None
    expected = {*LEAVES.get(name, (command.out,)), *({lock} if lock else ())}
    assert {path.name for path in places["out"].iterdir()} == expected
    touched = changed(tmp_path / "audit.json")
    allowed = (places["out"], places["temporary"])  # the latter is empty again, as the listing says
    assert touched and [path for path in touched if not any(map(path.is_relative_to, allowed))] == []


def test_the_shards_that_are_scored_hold_their_scores_and_nothing_else(run, world, tmp_path):
    shards = Path(shutil.copytree(world / "shards", tmp_path / "shards"))
    shutil.rmtree(shards / "scores")
    before = state(shards)
    words = ("score", "samples", "--synthetic", shards, "--scores", "confidence", "--device", "cpu")
    audit = tmp_path / "audit.json"
    assert run(tmp_path, *words, audit=str(audit)).status == 0
    assert {name: kept for name, kept in state(shards).items() if not name.startswith("scores")} == before
    assert all(path.is_relative_to(shards / "scores") for path in changed(audit))


def test_a_command_that_only_looks_writes_nothing(run, world, tmp_path):
    before = state(world)
    for number, words in enumerate((("shards", "ls", "shards"), ("shards", "verify", "shards"), ("info",))):
        audit = tmp_path / f"{number}.json"
        assert run(world, *words, audit=str(audit)).status == 0
        assert changed(audit) == []
    assert state(world) == before
