"""Checkpoints, states and kept results that are damaged, hostile or not numbers."""

from __future__ import annotations

import errno
import hashlib
import json
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from synthfast.assets import DIGITS
from synthfast.distributed import Ranks
from synthfast.evaluation.trial import kept
from synthfast.training.state import STATE_FILE

ASSETS = DIGITS.parent
HALF_A_GIGABYTE = 1 << 29


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.path), "w")


def plain_pickle(path: Path, bomb: Bomb) -> None:
    path.write_bytes(pickle.dumps({"w": bomb}))


def torch_file(path: Path, bomb: Bomb) -> None:
    torch.save({"w": bomb}, path)


def old_torch_file(path: Path, bomb: Bomb) -> None:
    torch.save({"w": bomb}, path, _use_new_zipfile_serialization=False)


PICKLES = {"pickle": plain_pickle, "torch": torch_file, "old torch": old_torch_file}


@pytest.fixture
def bomb(tmp_path: Path) -> Bomb:
    return Bomb(tmp_path / "exploded")


@pytest.fixture
def generator(tmp_path: Path) -> Path:
    """A copy of the embedded generator."""
    return Path(shutil.copytree(ASSETS / "digits", tmp_path / "generator"))


def resealed(folder: Path) -> None:
    """Make the digest in config.json that of the weights, as who tampers with them would."""
    config = json.loads((folder / "config.json").read_text())
    config["sha256"] = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    (folder / "config.json").write_text(json.dumps(config))


def uses(generator: Path, copy: Path) -> dict[str, tuple[Path, tuple[object, ...]]]:
    """For each command that reads weights: the folder that they are in, and its words."""
    quick = ("-n", 4, "--steps", 1, "--batch-size", 4, "--out", "out", "--device", "cpu")
    classifier, few = copy / "classifier", ("--dataset", "npz:few.npz", "--device", "cpu")
    return {
        "sample": (generator, ("sample", "--generator", generator, *quick)),
        "accuracy": (classifier, ("score", "accuracy", "--classifier", "classifier", *few)),
        "robust": (classifier, ("score", "robust", "--classifier", "classifier", "--eps", 0.1, *few)),
    }


def test_the_bombs_are_live(tmp_path):
    for number, write in enumerate((plain_pickle, torch_file, old_torch_file)):
        bomb = Bomb(tmp_path / f"exploded-{number}")
        write(tmp_path / "file", bomb)
        if number:
            torch.load(tmp_path / "file", weights_only=False)
        else:
            pickle.loads((tmp_path / "file").read_bytes())
        assert bomb.path.exists()


@pytest.mark.parametrize("kind", PICKLES)
@pytest.mark.parametrize("use", ["sample", "accuracy", "robust"])
def test_a_pickle_under_the_name_of_safe_weights_is_not_unpickled(run, generator, copy, bomb, kind, use):
    folder, words = uses(generator, copy)[use]
    PICKLES[kind](folder / "model.safetensors", bomb)
    resealed(folder)
    ran = run(copy, *words, memory=HALF_A_GIGABYTE)
    assert ran.status == 1 and "model.safetensors: not a valid safetensors file" in ran.error
    assert not bomb.path.exists() and not (copy / "out").exists()


@pytest.mark.parametrize("kind", PICKLES)
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt"])
def test_a_pickle_of_weights_runs_no_code_even_where_it_is_allowed(run, copy, bomb, kind, suffix):
    path = copy / f"weights{suffix}"
    PICKLES[kind](path, bomb)
    words = ("score", "accuracy", "--classifier", path, "--model", "small-cnn", "--dataset", "npz:few.npz")
    refused = run(copy, *words, "--device", "cpu")
    assert refused.status == 1 and "pickles, which are refused" in refused.error
    allowed = run(copy, *words, "--device", "cpu", "--allow-pickle")
    assert allowed.status == 1 and "not a file of plain tensors" in allowed.error
    assert not bomb.path.exists()


@pytest.mark.parametrize("kind", PICKLES)
def test_a_state_that_is_a_pickle_is_not_unpickled(run, commands, reference, copy, bomb, kind):
    (copy / "out").mkdir()
    for name in ("config.json", "model.safetensors"):
        (copy / "out" / name).write_bytes(reference("classifier").left[f"out/{name}"])
    PICKLES[kind](copy / "out" / STATE_FILE, bomb)
    ran = run(copy, *commands["classifier"].line)
    assert ran.status == 1 and f"{STATE_FILE}: not a readable training state" in ran.error
    assert not bomb.path.exists()


def test_a_data_set_of_objects_is_not_unpickled(run, copy, bomb):
    """An array of objects in an npz file, and a bare pickle under its name."""
    import numpy as np

    np.savez(copy / "few.npz", image=np.array([bomb], object), label=np.zeros(1, np.int64))
    words = ("score", "fid", "--real", "npz:few.npz", "--synthetic", "npz:fake.npz", "--device", "cpu")
    ran = run(copy, *words)
    assert ran.status == 1 and "few.npz" in ran.error
    with zipfile.ZipFile(copy / "few.npz", "w") as archive:
        archive.writestr("image.npy", pickle.dumps(bomb))
    ran = run(copy, *words)
    assert ran.status == 1 and "few.npz" in ran.error
    assert not bomb.path.exists()


def header_of(length: int, text: bytes = b"{}") -> Callable[[bytes], bytes]:
    return lambda data: struct.pack("<Q", length) + text + data[8:]


def with_header(change: Callable[[dict], object]) -> Callable[[bytes], bytes]:
    def apply(data: bytes) -> bytes:
        size = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + size])
        change(header)
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + size :]

    return apply


def first(header: dict) -> dict:
    """The first tensor of several numbers."""
    return next(value for name, value in header.items() if name != "__metadata__" and value["shape"])


LIES = {
    "nothing": lambda data: b"",
    "a header of 2^62 bytes": header_of(2**62),
    "a header of 1 GB": header_of(10**9),
    "a header beyond the end": lambda data: data[:20],
    "an absurd shape": with_header(lambda header: first(header).update(shape=[2**40, 2**20])),
    "an overflow": with_header(lambda header: first(header).update(shape=[2**63, 2])),
    "an overlap": with_header(lambda header: first(header).update(data_offsets=[0, 8])),
    "a hole": lambda data: with_header(lambda header: header.pop(list(header)[-1]))(data),
    "an unknown type": with_header(lambda header: first(header).update(dtype="O")),
    "text for a number": with_header(lambda header: first(header).update(shape="many")),
}


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("use", ["sample", "accuracy"])
def test_weights_whose_header_lies_are_one_line(run, generator, copy, lie, use):
    folder, words = uses(generator, copy)[use]
    path = folder / "model.safetensors"
    path.write_bytes(LIES[lie](path.read_bytes()))
    resealed(folder)
    ran = run(copy, *words, memory=HALF_A_GIGABYTE)
    assert ran.status == 1 and str(path.name) in ran.error
    assert not (copy / "out").exists()


def spoil(folder: Path, name: str, value: float = float("nan")) -> None:
    """Put a number that is none into the tensors whose names contain ``name``."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for key in [key for key in tensors if name in key]:
        tensors[key].flatten()[0] = value
    save_file(tensors, path)
    resealed(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_numbers_are_one_line(run, generator, copy, left_in, value):
    spoil(generator, "conv_out", value)
    spoil(copy / "classifier", "weight", value)
    before = left_in(copy)
    for use, (_, words) in uses(generator, copy).items():
        ran = run(copy, *words)
        assert ran.status == 1 and "NaN or infinity; check the" in ran.error, use
    words = ("score", "samples", "--synthetic", "shards", "--scores", "confidence", "--classifier", "classifier")
    ran = run(copy, *words, "--scores-folder", "mine", "--device", "cpu")
    assert ran.status in (1, 2) and list(copy.glob("mine/*")) == []
    shutil.rmtree(copy / "mine", ignore_errors=True)
    left = {name: data for name, data in left_in(copy).items() if name != "out/manifest.json"}
    assert left == before


def damaged(path: Path, place: float, bit: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[min(int(place * len(data)), len(data) - 1)] ^= bit
    path.write_bytes(data)


@pytest.mark.parametrize("place", [0.0, 0.02, 0.5, 0.999])
def test_a_flipped_bit_of_a_state_is_refused_and_without_it_the_run_starts_again(run, commands, reference, copy, place):
    for name, data in reference("classifier").left.items():
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_bytes(data)
    damaged(copy / "out" / STATE_FILE, place)
    ran = run(copy, *commands["classifier"].line)
    assert ran.status == 1 and f"{STATE_FILE}: " in ran.error and "remove it to start again" in ran.error
    (copy / "out" / STATE_FILE).unlink()
    assert run(copy, *commands["classifier"].line).status == 0
    assert reference("classifier").differing(copy) == []


def test_a_state_of_another_run_is_refused_and_kept(run, commands, reference, contents, copy):
    for name, data in reference("classifier").left.items():
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_bytes(data)
    before = contents(copy)
    for words in (("--seed", 7), ("--dataset", "npz:many.npz"), ("--lr", 0.3)):
        ran = run(copy, *commands["classifier"].line, *words)
        assert ran.status == 2 and "was made with" in ran.error
    ran = run(copy, *commands["gan"].line)
    assert ran.status == 2 and "a checkpoint of kind 'classifier', this command would overwrite it" in ran.error
    assert contents(copy) == before


@pytest.mark.parametrize(("name", "flushes"), [("arc", 11), ("robust", 9)])
def test_kept_progress_that_is_damaged_is_made_again(run, commands, reference, copy, name, flushes):
    """Interrupted, then a bit flipped in every file but the facts, a byte cut off, or a number changed to another."""
    assert run(copy, *commands[name].line, fail=["fsync", errno.EIO, flushes]).status == 1
    progress = copy / "out.json.progress"
    files = sorted(path for path in progress.iterdir() if path.name != "facts.json")
    assert len(files) >= 4
    if name == "arc":  # the numbers of the first radius are others, its tensors whole
        values = json.loads(files[0].read_text())
        files[0].write_text(json.dumps({**values, "validation_accuracy": values["validation_accuracy"] / 2}))
        files = files[2:]
    for number, path in enumerate(files):
        if number % 3 == 2:
            path.write_bytes(path.read_bytes()[:-1])
        else:
            damaged(path, (0.0, 0.6)[number % 3 == 1])
    ran = run(copy, *commands[name].line)
    assert ran.status == 0, ran.err
    assert reference(name).differing(copy) == []


def test_facts_that_are_damaged_are_one_line(run, commands, copy):
    assert run(copy, *commands["arc"].line, fail=["fsync", errno.EIO, 6]).status == 1
    facts = copy / "out.json.progress" / "facts.json"
    for text in ("", "[]", '{"settings": 1}', facts.read_text().replace("0.25", "0.26")):
        facts.write_text(text)
        ran = run(copy, *commands["arc"].line)
        assert ran.status in (1, 2) and "out.json.progress" in ran.error


def test_kept_scores_of_a_comparison_that_are_damaged_are_made_again(tmp_path):
    path, made = tmp_path / "score.json", []

    def make() -> dict[str, object]:
        made.append(1)
        return {"metrics": {"accuracy": {"value": 0.5, "ci": (0.25, 0.75), "count": 4}}}

    with Ranks("cpu") as ranks:
        scores = kept(path, {"seed": 1}, make, ranks)
        whole = path.read_bytes()
        again = kept(path, {"seed": 1}, make, ranks)
        assert json.dumps(again) == json.dumps(scores) and len(made) == 1
        for place in range(0, len(whole), 3):
            damaged(path, place / len(whole))
            found = kept(path, {"seed": 1}, make, ranks)
            assert json.dumps(found) == json.dumps(scores)
            assert path.read_bytes() == whole or whole[place : place + 1].isspace()
            path.write_bytes(whole)
        assert len(made) > len(whole) / 6
