"""Files that stages leave: whole or not at all, checked when read, refused in one line."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import pickle
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from synthfast import artifacts
from synthfast.artifacts import (
    atomic_write_bytes,
    atomic_write_json,
    json_bytes,
    load_checkpoint,
    load_tensors,
    make_checkpoint_folder,
    make_folder,
    os_error,
    read_checkpoint_config,
    read_json,
    save_checkpoint,
    save_tensors,
    sha256_file,
)
from synthfast.errors import SynthfastError, UsageError


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    save_checkpoint(folder, "toy", {"name": "a toy"}, {"w": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(7)})
    return folder


def edit(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def one_line(action, *arguments, **options) -> str:
    with pytest.raises(SynthfastError) as caught:
        action(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_writing_replaces_the_file_and_leaves_no_other(tmp_path):
    path = tmp_path / "file"
    atomic_write_bytes(path, b"old")
    atomic_write_bytes(path, b"new")
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["file"]


class FullDisk:
    """A file that takes its first bytes and no more."""

    def __init__(self, path, mode):
        self._file = io.FileIO(path, mode)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()

    def write(self, data):
        self._file.write(data[:1])
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("stage", ["open", "write", "fsync", "replace"])
def test_a_write_that_fails_keeps_the_old_file(tmp_path, monkeypatch, stage):
    path = tmp_path / "file"
    atomic_write_bytes(path, b"old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    if stage in ("open", "write"):
        monkeypatch.setattr(artifacts, "open", FullDisk if stage == "write" else full, raising=False)
    else:
        monkeypatch.setattr(os, stage, full)
    assert one_line(atomic_write_bytes, path, b"new") == f"{path}: the disk is full; free some space"
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_a_write_beyond_the_file_size_limit_is_one_line(tmp_path):
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))\n"
        "from synthfast.artifacts import atomic_write_bytes\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "try: atomic_write_bytes(sys.argv[1], b'x' * 100)\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    path = tmp_path / "file"
    path.write_bytes(b"old")
    result = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=False)
    assert result.stdout == f"SynthfastError {path}: the file size limit is reached\n", result.stderr
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("path", "reason"),
    [("file/below", "a part of the path is not a folder"), ("none/below", "no such file or folder")],
)
def test_a_path_that_cannot_be_written_is_named(tmp_path, path, reason):
    (tmp_path / "file").touch()
    assert one_line(atomic_write_bytes, tmp_path / path, b"x") == f"{tmp_path / path}: {reason}"


@pytest.mark.parametrize("name", ["folder", ".", "..", "/"])
def test_a_folder_in_the_place_of_the_file_is_named(tmp_path, monkeypatch, name):
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    assert one_line(atomic_write_bytes, name, b"x") == f"{name}: a file was expected, a folder was found"
    assert os.listdir(tmp_path) == ["folder"] and os.listdir(tmp_path / "folder") == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    assert (
        one_line(make_folder, tmp_path / "file") == f"{tmp_path / 'file'}: a file is in the way; choose another --out"
    )
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()


def test_os_error_falls_back_to_the_systems_words():
    assert str(os_error("x", OSError(errno.EIO, "Input/output error"))) == "x: Input/output error"
    assert str(os_error("x", OSError("odd"), "do this")) == "x: odd; do this"


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "the disk quota is used up"),
        (errno.EFBIG, "the file size limit is reached"),
        (errno.EACCES, "permission denied"),
        (errno.EROFS, "the file system is read-only"),
        (errno.EISDIR, "a file was expected, a folder was found"),
        (errno.ENAMETOOLONG, "the name is too long"),
        (errno.EMFILE, "this process has too many files open, raise the limit with ulimit -n"),
        (errno.ENFILE, "the system has too many files open, close other programs"),
        (errno.ENODEV, "the device is gone, or its file system cannot map files into memory"),
    ],
)
def test_os_error_has_words_of_its_own(number, reason):
    assert str(os_error("some/path", OSError(number, "system words"), "do this")) == f"some/path: {reason}; do this"


@pytest.mark.parametrize("name", ["ENOSPC", "EDQUOT", "EROFS", "ENAMETOOLONG", "ENODEV", "EMFILE", "ENFILE"])
def test_os_error_says_what_to_do_where_nobody_else_does(name):
    message = str(os_error("some/path", OSError(getattr(errno, name), "system words")))
    assert re.search(r"[;,] (free|choose|copy|raise|close) ", message) and "system words" not in message


def test_json_is_canonical_and_strict(tmp_path):
    assert json_bytes({"b": 1, "a": ["é"]}) == '{\n  "b": 1,\n  "a": [\n    "é"\n  ]\n}\n'.encode()
    with pytest.raises(ValueError, match="JSON"):
        json_bytes({"a": float("nan")})
    with pytest.raises(ValueError, match="JSON"):
        atomic_write_json(tmp_path / "x.json", {"a": float("inf")})
    assert not (tmp_path / "x.json").exists()
    value = {"path": os.fsdecode(b"a\xffb"), "number": 1e-300}  # a name that is not UTF-8, as Python hands it over
    atomic_write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json", "thing") == value


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no thing here; check the path"),
        (b"", "the thing is not valid JSON"),
        (b"{", "the thing is not valid JSON"),
        (b"[" * 100_000, "the thing is not valid JSON"),
        (b'{"a": ' * 100_000, "the thing is not valid JSON"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "the thing is not valid JSON"),
        (b'\xef\xbb\xbf{"a": 1}', "the thing is not valid JSON"),
        (b'{"a": 1} 2', "the thing is not valid JSON"),
        (b"\xff\xfe", "the thing is not UTF-8 text"),
        (b"[1]", "the thing must be a JSON object, found list"),
    ],
)
def test_json_that_cannot_be_read_is_one_line(tmp_path, content, message):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content)
    assert one_line(read_json, path, "thing").startswith(f"{path}: {message}")


def test_infinities_are_read_as_diffusers_writes_them(tmp_path):
    (tmp_path / "x.json").write_text('{"low": -Infinity, "high": Infinity}')
    assert read_json(tmp_path / "x.json", "thing") == {"low": float("-inf"), "high": float("inf")}


def test_a_folder_is_no_json_file(tmp_path):
    assert one_line(read_json, tmp_path, "thing") == f"{tmp_path}: a file was expected, a folder was found"


def test_sha256_is_that_of_the_content(tmp_path):
    data = os.urandom(3 * 2**20 + 17)
    (tmp_path / "x").write_bytes(data)
    assert sha256_file(tmp_path / "x") == hashlib.sha256(data).hexdigest()
    assert one_line(sha256_file, tmp_path / "none").startswith(f"{tmp_path / 'none'}: no such file")


def test_tensors_come_back_as_they_were(tmp_path):
    tensors = {
        "scalar": torch.tensor(3),
        "half": torch.randn(3, 2).half(),
        "bfloat16": torch.randn(3, 2).bfloat16(),
        "with gradient": torch.randn(2, requires_grad=True),
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "strided": torch.arange(10.0)[::3],
        "empty": torch.empty(0, 3),
    }
    save_tensors(tmp_path / "x.safetensors", tensors, {"note": "here"})
    loaded = load_tensors(tmp_path / "x.safetensors")
    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor), name


@pytest.mark.parametrize("keep", [0, 5, 60, 200])
def test_a_truncated_weights_file_is_refused(tmp_path, keep):
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"w": torch.randn(64)})
    path.write_bytes(path.read_bytes()[:keep])
    assert one_line(load_tensors, path).startswith(f"{path}: not a valid safetensors file (")


def safetensors_file(path: Path, header: object, data: bytes = b"\0" * 64, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


@pytest.mark.parametrize(
    ("header", "options"),
    [
        ({"w": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}}, {"length": 2**62}),
        ({"w": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}}, {"length": 5}),
        ({"w": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}}, {"data": b"\0" * 63}),
        ({"w": {"dtype": "F32", "shape": [17], "data_offsets": [0, 64]}}, {}),
        ({"w": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 64]}}, {}),
        ({"w": {"dtype": "F32", "shape": [-16], "data_offsets": [0, 64]}}, {}),
        ({"w": {"dtype": "F32", "shape": [16], "data_offsets": [64, 128]}}, {}),
        ({"w": {"dtype": "F32", "shape": [16], "data_offsets": [64, 0]}}, {}),
        ({"w": {"dtype": "F99", "shape": [16], "data_offsets": [0, 64]}}, {}),
        ({"w": {"shape": [16], "data_offsets": [0, 64]}}, {}),
        ({k: {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]} for k in "ab"}, {}),
        ([1, 2], {}),
        (b"{", {}),
        (b"\xff\xfe", {}),
        (b'{"a":' * 5_000, {}),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path, header, options):
    path = safetensors_file(tmp_path / "x.safetensors", header, **options)
    assert one_line(load_tensors, path).startswith(f"{path}: not a valid safetensors file (")


def test_missing_weights_are_named(tmp_path):
    assert one_line(load_tensors, tmp_path / "x.safetensors").startswith(
        f"{tmp_path / 'x.safetensors'}: no weights here"
    )
    assert one_line(load_tensors, tmp_path).startswith(f"{tmp_path}: no weights here")


def test_a_pickle_is_refused_unless_allowed(tmp_path):
    path = tmp_path / "x.bin"
    torch.save({"w": torch.ones(2)}, path)
    assert "pass --allow-pickle" in one_line(load_tensors, path)
    assert torch.equal(load_tensors(path, allow_pickle=True)["w"], torch.ones(2))


class Evil:
    def __reduce__(self):
        return os.mkdir, (self.folder,)

    def __init__(self, folder: str) -> None:
        self.folder = folder


def test_an_allowed_pickle_runs_no_code(tmp_path):
    path, folder = tmp_path / "x.bin", tmp_path / "made by the pickle"
    torch.save({"w": Evil(str(folder))}, path)
    assert one_line(load_tensors, path, allow_pickle=True).startswith(f"{path}: not a file of plain tensors")
    path.write_bytes(pickle.dumps(Evil(str(folder)), protocol=2))
    assert one_line(load_tensors, path, allow_pickle=True).startswith(f"{path}: not a file of plain tensors")
    assert not folder.exists()


@pytest.mark.parametrize("value", [[torch.ones(1)], {"w": 3}, {3: torch.ones(1)}, torch.ones(1)])
def test_a_pickle_of_something_else_is_refused(tmp_path, value):
    torch.save(value, tmp_path / "x.pt")
    assert "expected a dictionary of tensors" in one_line(load_tensors, tmp_path / "x.pt", allow_pickle=True)


WEIGHTS = {"w": torch.ones(2), "b": torch.zeros(1)}


@pytest.mark.parametrize(
    "value",
    [
        {"state_dict": WEIGHTS, "epoch": 3},
        {"model_state_dict": WEIGHTS, "unaveraged_model_state_dict": {"w": torch.zeros(2)}},
        {"last": WEIGHTS, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}, "step": torch.ones(1)},
    ],
)
def test_weights_one_level_down_in_a_pickle_are_found(tmp_path, value):
    torch.save(value, tmp_path / "x.pt")
    loaded = load_tensors(tmp_path / "x.pt", allow_pickle=True)
    assert list(loaded) == ["w", "b"] and torch.equal(loaded["w"], WEIGHTS["w"])


def test_weights_that_could_be_either_are_refused(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"last": WEIGHTS, "best": WEIGHTS}, path)
    message = one_line(load_tensors, path, allow_pickle=True)
    assert (
        message == f"{path}: expected a dictionary of tensors, found several ('last', 'best'); save the weights alone"
    )
    torch.save({"outer": {"state_dict": WEIGHTS}}, path)
    assert "expected a dictionary of tensors, found dict" in one_line(load_tensors, path, allow_pickle=True)
    torch.save({"state_dict": {}}, path)
    assert "expected a dictionary of tensors, found dict" in one_line(load_tensors, path, allow_pickle=True)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut short", b"garbage"])
def test_a_broken_pickle_is_one_line(tmp_path, content):
    (tmp_path / "x.pth").write_bytes(content)
    message = one_line(load_tensors, tmp_path / "x.pth", allow_pickle=True)
    assert message.startswith(f"{tmp_path / 'x.pth'}: not a file of plain tensors")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_damaged_pickles_end_in_one_line_or_in_tensors(tmp_path, zipped):
    """Some byte changed: torch then raises nearly anything, from UnicodeDecodeError to AssertionError."""
    path = tmp_path / "x.pt"
    torch.save({"w": torch.randn(3, 4), "b": torch.arange(5)}, path, _use_new_zipfile_serialization=zipped)
    whole, random, refused = path.read_bytes(), np.random.default_rng(0), 0
    for _ in range(300):
        data = bytearray(whole)
        data[random.integers(min(len(whole), 400))] = random.integers(256)
        path.write_bytes(data)
        try:
            assert all(isinstance(tensor, torch.Tensor) for tensor in load_tensors(path, allow_pickle=True).values())
        except SynthfastError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
            refused += 1
    assert refused > 50


def test_a_checkpoint_comes_back(checkpoint):
    config, tensors = load_checkpoint(checkpoint, "toy")
    assert config["name"] == "a toy" and config["format"] == 1
    assert config["sha256"] == sha256_file(checkpoint / "model.safetensors")
    assert torch.equal(tensors["w"], torch.arange(6.0).reshape(2, 3)) and tensors["b"] == 7


def test_saving_again_replaces_the_checkpoint(checkpoint):
    save_checkpoint(checkpoint, "toy", {"name": "newer"}, {"w": torch.zeros(1)})
    config, tensors = load_checkpoint(checkpoint, "toy")
    assert config["name"] == "newer" and list(tensors) == ["w"]
    assert sorted(os.listdir(checkpoint)) == ["config.json", "model.safetensors"]


def test_one_flipped_bit_in_the_weights_is_found(checkpoint):
    path = checkpoint / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)
    message = one_line(load_checkpoint, checkpoint, "toy")
    assert message.startswith(f"{path}: expected SHA-256") and sha256_file(path) in message


def test_missing_parts_of_a_checkpoint_are_named(checkpoint, tmp_path):
    assert (
        one_line(load_checkpoint, tmp_path, "toy") == f"{tmp_path / 'config.json'}: no checkpoint here; check the path"
    )
    (checkpoint / "model.safetensors").unlink()
    assert one_line(load_checkpoint, checkpoint, "toy").startswith(
        f"{checkpoint / 'model.safetensors'}: no weights here"
    )


def test_a_checkpoint_without_its_hash_is_refused(checkpoint):
    edit(checkpoint, sha256=None)
    assert "expected SHA-256 None, found " in one_line(load_checkpoint, checkpoint, "toy")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"format": 2}, "format 2 is newer than this synthfast reads (1); upgrade synthfast"),
        ({"format": 0}, "not a synthfast checkpoint, 'format' must be 1, found 0"),
        ({"format": True}, "not a synthfast checkpoint, 'format' must be 1, found True"),
        ({"format": None}, "not a synthfast checkpoint, 'format' must be 1, found None"),
        ({"kind": "other"}, "expected a checkpoint of kind 'toy', found 'other'; check the path"),
        ({"kind": None}, "expected a checkpoint of kind 'toy', found None; check the path"),
    ],
)
def test_a_checkpoint_of_another_format_or_kind_is_refused(checkpoint, values, message):
    edit(checkpoint, **values)
    assert one_line(read_checkpoint_config, checkpoint, "toy") == f"{checkpoint / 'config.json'}: {message}"


def test_a_checkpoint_folder_is_not_made_over_something_else(checkpoint, tmp_path):
    make_checkpoint_folder(checkpoint, "toy")
    make_checkpoint_folder(tmp_path / "new" / "one", "toy")
    with pytest.raises(UsageError, match="a checkpoint of kind 'toy', this command would overwrite it"):
        make_checkpoint_folder(checkpoint, "other")
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(UsageError, match="no checkpoint of synthfast, this command would overwrite it"):
        make_checkpoint_folder(tmp_path, "toy")


def test_weights_are_on_disk_before_the_config_that_names_them(tmp_path, monkeypatch):
    steps, replace, fsync = [], os.replace, os.fsync
    monkeypatch.setattr(os, "replace", lambda old, new: (steps.append(Path(new).name), replace(old, new)))
    monkeypatch.setattr(os, "fsync", lambda descriptor: (steps.append("fsync"), fsync(descriptor)))
    save_checkpoint(tmp_path, "toy", {}, {"w": torch.ones(1)})
    # Each file, then the folder after each rename.
    assert steps == ["fsync", "fsync", "model.safetensors", "fsync", "config.json", "fsync"]


def test_files_that_belong_together_are_all_kept_when_one_cannot_be_written(tmp_path, monkeypatch):
    files, fsync, calls = {tmp_path / name: name.encode() for name in "abc"}, os.fsync, []
    artifacts.atomic_write_files(files)

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    message = one_line(artifacts.atomic_write_files, dict.fromkeys(files, b"new"))
    assert message == f"{tmp_path / 'c'}: the disk is full; free some space"
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files
