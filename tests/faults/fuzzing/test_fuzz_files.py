"""Every binary or text file that we parse ourselves, damaged at random: it is read, or refused in one line."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import shutil
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from synthfast.artifacts import load_kept, load_tensors, save_tensors
from synthfast.config import ImportConfig
from synthfast.data import ImageSet, open_images, verify
from synthfast.data.formats.codec import Codec
from synthfast.data.formats.npy import map_npy, npy_header, read_npz
from synthfast.data.selection import read_selection
from synthfast.data.shards.shard_set import ShardSet
from synthfast.data.transfer.importing import import_images
from synthfast.data.transfer.npz_stream import NpzStream
from synthfast.errors import SynthfastError
from synthfast.scoring.groups import read_groups
from synthfast.scoring.moments import read_statistics
from synthfast.training.state import load_notes

EXAMPLES = 60 * int(os.environ.get("SYNTHFAST_SOAK", "1"))
FUZZED = settings(
    max_examples=EXAMPLES,
    deadline=10_000,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
# What reads a file, and the file as it should be.
Prepare = Callable[[Path], tuple[Path, bytes, Callable[[], object]]]


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def all_of(images: ImageSet) -> None:
    images.read(np.arange(min(len(images), 64)))
    images.fingerprint()


def npy(folder: Path) -> tuple[Path, bytes, Callable[[], object]]:
    path = folder / "a.npy"
    return (
        path,
        npy_header("|u1", (3, 4, 5, 1)) + noise(3, 4, 5, 1).tobytes(),
        lambda: map_npy(path, "|u1", (3, 4, 5, 1)),
    )


def npz(compressed: bool) -> Prepare:
    def prepare(folder: Path) -> tuple[Path, bytes, Callable[[], object]]:
        path, file = folder / "a.npz", io.BytesIO()
        save = np.savez_compressed if compressed else np.savez
        save(file, image=noise(6, 4, 4, 3), label=np.arange(6))

        def read() -> None:
            for array in read_npz(path, ("image",), ("label",)).values():
                array.sum()
            all_of(open_images(f"npz:{path}"))

        def stream() -> None:
            images = NpzStream(path, "a")
            images.read(np.arange(len(images)))

        return path, file.getvalue(), lambda: [attempt(read), attempt(stream)]

    return prepare


def attempt(function: Callable[[], object]) -> None:
    try:
        function()
    except SynthfastError as error:
        assert str(error) and "\n" not in str(error)


def idx(zipped: bool) -> Prepare:
    def prepare(folder: Path) -> tuple[Path, bytes, Callable[[], object]]:
        labels = struct.pack(">HBBI", 0, 8, 1, 20) + bytes(i % 10 for i in range(20))
        (folder / "train-labels-idx1-ubyte").write_bytes(labels)
        data = struct.pack(">HBB3I", 0, 8, 3, 20, 28, 28) + noise(20, 28, 28).tobytes()
        path = folder / ("train-images-idx3-ubyte" + (".gz" if zipped else ""))
        data = gzip.compress(data, 1, mtime=0) if zipped else data
        return path, data, lambda: all_of(open_images("mnist", data_dir=folder))

    return prepare


def idx_labels(folder: Path) -> tuple[Path, bytes, Callable[[], object]]:
    path, data, _ = idx(False)(folder)
    path.write_bytes(data)
    labels = folder / "train-labels-idx1-ubyte"
    return labels, labels.read_bytes(), lambda: all_of(open_images("mnist", data_dir=folder))


def cifar(folder: Path) -> tuple[Path, bytes, Callable[[], object]]:
    batches = folder / "cifar-10-batches-bin"
    batches.mkdir()
    records = b"".join(bytes([i]) + noise(3072).tobytes() for i in range(10))

    def read() -> None:
        attempt(lambda: all_of(open_images("cifar10:test", data_dir=folder)))
        attempt(lambda: all_of(open_images(f"cifar-binary:{batches / 'test_batch.bin'}")))

    return batches / "test_batch.bin", records, read


def cifar_names(folder: Path) -> tuple[Path, bytes, Callable[[], object]]:
    path, records, read = cifar(folder)
    path.write_bytes(records)
    names = "airplane\nautomobile\nbird\ncat\ndeer\ndog\nfrog\nhorse\nship\ntruck\n\n"
    return path.with_name("batches.meta.txt"), names.encode(), read


def partition(folder: Path) -> tuple[Path, bytes, Callable[[], object]]:
    (folder / "img_align_celeba").mkdir()
    for i in range(3):
        Image.new("RGB", (178, 218)).save(folder / "img_align_celeba" / f"{i + 1:06d}.jpg")
    lines = b"000001.jpg 0\n000002.jpg 1\n000003.jpg 2\n"
    return folder / "list_eval_partition.txt", lines, lambda: all_of(open_images("celeba", data_dir=folder))


def groups(suffix: str) -> Prepare:
    def prepare(folder: Path) -> tuple[Path, bytes, Callable[[], object]]:
        path, file = folder / f"groups.{suffix}", io.BytesIO()
        np.save(file, np.arange(6))
        data = file.getvalue() if suffix == "npy" else b'group\na\nb\n"c, d"\na\nb\nc\n'
        return path, data, lambda: read_groups(path, 6)

    return prepare


def tensors(folder: Path) -> tuple[Path, bytes, Callable[[], object]]:
    import torch

    path = folder / "training-state.safetensors"
    values = {"model.w": torch.arange(6.0).reshape(2, 3), "n": torch.tensor(3)}
    save_tensors(path, values, {"step": "3", "config": "{}", "notes": "{}"})

    def read() -> None:
        for look in (load_tensors, load_kept):
            attempt(lambda look=look: look(path))
        attempt(lambda: load_notes(folder))

    return path, path.read_bytes(), read


def tar(zipped: bool) -> Prepare:
    """A WebDataset tar from elsewhere."""

    def prepare(folder: Path) -> tuple[Path, bytes, Callable[[], object]]:
        path, file = folder / ("a.tar.gz" if zipped else "a.tar"), io.BytesIO()
        with tarfile.open(fileobj=file, mode="w:gz" if zipped else "w", format=tarfile.PAX_FORMAT) as archive:
            for number, image in enumerate(encoded(3)):
                for ending, data in (("png", image), ("cls", b"1"), ("json", b'{"label": 1}')):
                    info = tarfile.TarInfo(f"{'long' * 30}/{number}.{ending}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
        return path, file.getvalue(), lambda: all_of(open_images(f"wds:{path}"))

    return prepare


def encoded(count: int) -> list[bytes]:
    return Codec("png", (6, 5, 3)).encode(noise(count, 6, 5, 3))


def png(folder: Path) -> tuple[Path, bytes, Callable[[], object]]:
    """By our own decoder, and by Pillow as a folder's image."""
    path = folder / "a.png"

    def read() -> None:
        attempt(lambda: Codec("png", (6, 5, 3)).decode([path.read_bytes()], str))
        attempt(lambda: all_of(open_images(f"folder:{folder}")))

    return path, encoded(1)[0], read


def own_tar(folder: Path) -> tuple[Path, bytes, Callable[[], object]]:
    """A shard of ours: the bytes that are there are read, or named, by ``verify`` too."""
    return of_shards(folder, "shard-000000.tar")


def index(folder: Path) -> tuple[Path, bytes, Callable[[], object]]:
    return of_shards(folder, "shard-000000.idx")


def of_shards(folder: Path, name: str) -> tuple[Path, bytes, Callable[[], object]]:
    """The manifest follows the size and the SHA-256 of the file, as who forges it would make it do."""
    np.savez(folder / "a.npz", image=noise(6, 6, 5, 3), label=np.arange(6))
    source, shards = f"npz:{folder / 'a.npz'}", folder / "shards"
    import_images(ImportConfig(source=(source,), out=str(shards), format="wds", shard_size=6))
    manifest = shards / "manifest.json"
    values = json.loads(manifest.read_text())
    role = {".tar": "tar", ".idx": "tar_index"}[Path(name).suffix]

    def read() -> None:
        data = (shards / name).read_bytes()
        values["shards"][0][role] |= {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        manifest.write_text(json.dumps(values))
        attempt(lambda: all_of(ShardSet(shards)))
        attempt(lambda: ShardSet(shards).index_paths)
        assert all("\n" not in problem for problem in verify(shards))

    return shards / name, (shards / name).read_bytes(), read


def statistics(folder: Path) -> tuple[Path, bytes, Callable[[], object]]:
    path, file = folder / "a.npz", io.BytesIO()
    features = SimpleNamespace(dim=3, name="pixels", fingerprint="ab", device="cpu")
    np.savez(file, mu=np.zeros(3), sigma=np.eye(3), count=np.int64(9), features=np.array("ab"))
    return path, file.getvalue(), lambda: read_statistics(path, features)


PARSERS: dict[str, Prepare] = {
    "npy": npy,
    "npz": npz(False),
    "deflated npz": npz(True),
    "idx": idx(False),
    "idx.gz": idx(True),
    "idx labels": idx_labels,
    "cifar": cifar,
    "cifar names": cifar_names,
    "celeba partition": partition,
    "groups.csv": groups("csv"),
    "groups.npy": groups("npy"),
    "safetensors": tensors,
    "tar": tar(False),
    "tar.gz": tar(True),
    "png": png,
    "own tar": own_tar,
    "index": index,
    "statistics": statistics,
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Each parser's file, made once."""
    made: dict[str, tuple[Path, bytes, Callable[[], object]]] = {}

    def get(name: str) -> tuple[Path, bytes, Callable[[], object]]:
        if name not in made:
            made[name] = PARSERS[name](tmp_path_factory.mktemp("parsed"))
        return made[name]

    return get


@pytest.mark.parametrize("name", PARSERS)
@given(data=st.data())
@FUZZED
def test_damaged_bytes(fuzz, harmless, prepared, name, data):
    path, whole, read = prepared(name)
    path.write_bytes(data.draw(fuzz.altered_bytes(whole)))
    harmless(read)


@pytest.mark.parametrize("name", PARSERS)
def test_whole_and_cut_after_every_byte_of_the_start(harmless, prepared, name):
    path, whole, read = prepared(name)
    path.write_bytes(whole)
    read()
    for end in (*range(0, min(300, len(whole)), 7), len(whole) - 1):
        path.write_bytes(whole[:end])
        harmless(read)


HUGE = 2**40
HEADERS = (
    f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({HUGE}, {HUGE}), }}",
    f"{{'descr': '|u1', 'fortran_order': True, 'shape': ({HUGE},), }}",
    "{'descr': '|u1', 'fortran_order': False, 'shape': (-1,), }",
    "{'descr': '|O', 'fortran_order': False, 'shape': (3,), }",
    "{'descr': '|V1000000000', 'fortran_order': False, 'shape': (3,), }",
    "{'descr': [('a', '|u1'), ('b', '|O')], 'fortran_order': False, 'shape': (3,), }",
    "{'descr': '<M8[ns]', 'fortran_order': False, 'shape': (3,), }",
    "{'descr': '|u1', 'fortran_order': False, 'shape': (3,), 'more': 1}",
    "{'descr': '|u1', 'fortran_order': 0, 'shape': [3]}",
    "__import__('os').system('true')",
    "(" * 5000,
    "9" * 9000,
)


@pytest.mark.parametrize("header", HEADERS)
def test_hostile_headers_of_npy_in_every_place(fuzz, harmless, copy, header):
    """In a shard, in an npz file, stored and deflated, in a selection and in groups."""
    text = header.encode() + b"\n"
    hostile = b"\x93NUMPY\x02\0" + struct.pack("<I", len(text)) + text + b"123"
    shard = copy / "shards" / "shard-000000.images.npy"
    shard.write_bytes((hostile + bytes(3000))[: shard.stat().st_size])
    harmless(ShardSet, copy / "shards")
    import zipfile

    for kind in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        with zipfile.ZipFile(copy / "a.npz", "w", kind) as archive:
            archive.writestr("image.npy", hostile)
        harmless(lambda: all_of(open_images(f"npz:{copy / 'a.npz'}")))
        harmless(lambda: NpzStream(copy / "a.npz", "a").read(np.arange(1)))
    (copy / "groups.npy").write_bytes(hostile)
    harmless(read_groups, copy / "groups.npy", 6)


def test_a_zip_whose_sizes_lie(harmless, tmp_path):
    """The directory of the archive says that a member has 2 GB, or as much as its header does."""
    for compressed in (False, True):
        path, whole, read = npz(compressed)(tmp_path)
        places = [k for k in range(len(whole)) if whole[k : k + 4] == b"PK\1\2"]
        for place in places:
            for at in (20, 24):  # compressed and plain size in the central directory
                for size in (0, 1, 2**31 - 1, 2**32 - 2, 2**32 - 1):
                    damaged = bytearray(whole)
                    damaged[place + at : place + at + 4] = struct.pack("<I", size)
                    path.write_bytes(damaged)
                    harmless(read)


def test_a_selection_of_damaged_bytes(fuzz, harmless, reference, copy):
    for name, content in reference("select").left.items():
        (copy / name).write_bytes(content)
    images, whole = ShardSet(copy / "shards"), (copy / "out.npy").read_bytes()
    for place in range(0, len(whole), 5):
        damaged = bytearray(whole)
        damaged[place] ^= 0x55
        (copy / "out.npy").write_bytes(damaged)
        with pytest.raises(SynthfastError) as caught:
            read_selection(copy / "out.npy", images)
        assert "\n" not in str(caught.value)
    shutil.copyfile(copy / "out.weights.npy", copy / "out.npy")
    harmless(read_selection, copy / "out.npy", images)
