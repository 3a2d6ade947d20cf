"""Writing images: encoding alone, and whole shard folders, against Pillow and webdataset's writer.

    python -m bench.pipeline.write [--threads 2] [--rounds 10]

Encoding is from an array to PNG files in memory. Peers are Pillow at compress_level 1, its fastest useful setting, and at its
default, on one thread as it is usually called and on a thread a core, and torchvision's encoder at level 1.

A folder is one shard. Ours hashes every file and waits until all is on the disk; the peers (Pillow into webdataset's TarWriter,
or into Python's tarfile with a fixed header, and numpy.save of a whole array) do neither. The process is kept on --threads CPUs.

8x8x1 and 28x28x1 are the embedded digits, the latter enlarged; 32x32x3 and 64x64x3 are pieces of the two photographs that come
with scikit-learn, shrunk to a third and a half, so that they have the detail of small natural images and no traces of jpg. The
check: every variant's images are the given ones (jpg: what Pillow's encoder gives), and every PNG is opened by Pillow.
"""

from __future__ import annotations

import io
import itertools
import os
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from bench import harness
from synthfast.data import ShardFolder, ShardSet, open_images
from synthfast.data.formats.codec import Codec
from synthfast.data.formats.png import encode_png
from synthfast.data.machine import usable_cpus

QUALITY = 95
Files = list[bytes]


def digits(count: int, side: int) -> np.ndarray:
    images = open_images("digits:test")
    pixels = images.read(np.arange(len(images)))[:, :, :, 0]
    if side != 8:
        pixels = np.stack([Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC) for image in pixels])
    return np.resize(pixels, (count, side, side))[..., None]


def photographs(count: int, side: int, shrink: int) -> np.ndarray:
    from sklearn.datasets import load_sample_images

    random, small = np.random.default_rng(0), []
    for pixels in load_sample_images().images:
        height, width, _ = pixels.shape
        image = Image.fromarray(pixels).resize((width // shrink, height // shrink), Image.Resampling.BOX)
        small.append(np.asarray(image))
    out = np.empty((count, side, side, 3), np.uint8)
    for number in range(count):
        source = small[number % len(small)]
        y, x = (random.integers(size - side + 1) for size in source.shape[:2])
        out[number] = source[y : y + side, x : x + side]
    return out


def pillow(image: np.ndarray, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).save(buffer, kind, **options)
    return buffer.getvalue()


def opened(files: Files, shape: tuple[int, ...]) -> np.ndarray:
    return np.stack([np.asarray(Image.open(io.BytesIO(file))).reshape(shape) for file in files])


def encoding(images: np.ndarray) -> harness.Case:
    """PNG files in memory."""
    codec, planar = Codec("png", images.shape[1:]), torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()

    def in_threads() -> Files:
        with ThreadPoolExecutor(usable_cpus()) as pool:
            parts = pool.map(
                lambda part: [pillow(image, "PNG", compress_level=1) for image in part],
                np.array_split(images, usable_cpus()),
            )
            return [file for part in parts for file in part]

    def torchvision() -> Files:
        from torchvision.io import encode_png as encode

        return [encode(image, 1).numpy().tobytes() for image in planar]

    variants: dict[str, Callable[[], Files]] = {
        "synthfast": lambda: codec.encode(images),
        "synthfast, one thread": lambda: encode_png(images),
        "Pillow, level 1": lambda: [pillow(image, "PNG", compress_level=1) for image in images],
        "Pillow, level 1, a thread a core": in_threads,
        "Pillow, default": lambda: [pillow(image, "PNG") for image in images],
        "torchvision, level 1": torchvision,
    }
    facts: dict[str, dict[str, float]] = {}

    def check() -> None:
        for name, run in variants.items():
            files = run()
            assert np.array_equal(opened(files, images.shape[1:]), images), f"{name}: other pixels"
            facts[name] = {"bytes_per_image": sum(map(len, files)) / len(files)}

    return harness.Case(f"png, {_words(images)}", "synthfast", variants, check, items=len(images), facts=facts)


def folder(images: np.ndarray, labels: np.ndarray, storage: Mapping[str, object], path: Path) -> None:
    """What `synthfast sample` does with images, in its batches."""
    request = {"n": len(images), "shape": list(images.shape[1:]), "classes": 10, "shard_size": len(images), **storage}
    with ShardFolder.create_or_resume(path, request) as made:
        with made.writer(0) as writer:
            for first in range(0, len(images), 1024):
                writer.append(images[first : first + 1024], labels[first : first + 1024])
            writer.commit()
        made.finish()


def with_webdataset(files: Iterator[bytes], labels: np.ndarray, extension: str, path: Path) -> None:
    from webdataset import TarWriter

    with TarWriter(str(path / "shard.tar")) as tar:
        for number, (file, label) in enumerate(zip(files, labels, strict=True)):
            tar.write({"__key__": f"{number:09d}", extension: file, "cls": str(label).encode()})


def with_tarfile(files: Iterator[bytes], labels: np.ndarray, extension: str, path: Path) -> None:
    with tarfile.open(path / "shard.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, (file, label) in enumerate(zip(files, labels, strict=True)):
            for suffix, data in ((extension, file), ("cls", str(label).encode())):
                info = tarfile.TarInfo(f"{number:09d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def with_numpy(images: np.ndarray, labels: np.ndarray, path: Path) -> None:
    np.save(path / "images.npy", images)
    np.save(path / "labels.npy", labels)


def read_back(path: Path, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of a folder that any variant wrote."""
    if (path / "manifest.json").exists():
        images = ShardSet(path)
        return images.read(np.arange(count)), images.labels
    if (path / "images.npy").exists():
        return np.load(path / "images.npy"), np.load(path / "labels.npy")
    with tarfile.open(path / "shard.tar") as tar:
        data = {member.name: tar.extractfile(member).read() for member in tar.getmembers()}
    keys = sorted({name.partition(".")[0] for name in data})
    extension = next(name.partition(".")[2] for name in data if not name.endswith(".cls"))
    pixels = [np.atleast_3d(np.asarray(Image.open(io.BytesIO(data[f"{key}.{extension}"])))) for key in keys]
    return np.stack(pixels), np.array([int(data[f"{key}.cls"]) for key in keys])


def writing(kind: str, images: np.ndarray, scratch: Path) -> harness.Case:
    """Whole folders: ``kind`` is npy, png or jpg."""
    labels, numbers = np.arange(len(images)) % 10, itertools.count()
    storage = {} if kind == "npy" else {"format": "wds", "codec": kind}
    if kind == "jpg":
        storage["quality"] = QUALITY
    levels = {"level 1": {"compress_level": 1}, "default": {}}
    settings = {f"quality {QUALITY}": {"quality": QUALITY, "subsampling": 0}} if kind == "jpg" else levels
    writers: dict[str, Callable[[Path], None]] = {"synthfast": lambda path: folder(images, labels, storage, path)}
    if kind == "npy":
        writers["numpy.save"] = lambda path: with_numpy(images, labels, path)
    else:
        for setting, options in settings.items():
            for name, write in (("webdataset", with_webdataset), ("tarfile", with_tarfile)):

                def run(path: Path, write: Callable = write, options: Mapping[str, object] = options) -> None:
                    files = (pillow(image, "JPEG" if kind == "jpg" else "PNG", **options) for image in images)
                    write(files, labels, kind, path)

                writers[f"Pillow, {setting}, {name}"] = run
    facts: dict[str, dict[str, float]] = {}

    def new_folder() -> Path:
        path = scratch / str(next(numbers))
        path.mkdir()
        return path

    def timed(write: Callable[[Path], None]) -> None:
        path = new_folder()
        write(path)
        shutil.rmtree(path)

    def check() -> None:
        expected = images
        if kind == "jpg":
            files = [pillow(image, "JPEG", quality=QUALITY, subsampling=0) for image in images]
            expected = opened(files, images.shape[1:])
        for name, write in writers.items():
            path = new_folder()
            write(path)
            pixels, read_labels = read_back(path, len(images))
            assert np.array_equal(pixels, expected) and np.array_equal(read_labels, labels), f"{name}: other images"
            size = sum(file.stat().st_size for file in path.iterdir())
            facts[name] = {"bytes_per_image": size / len(images)}
            shutil.rmtree(path)

    variants = {name: lambda write=write: timed(write) for name, write in writers.items()}
    name = f"{'npy' if kind == 'npy' else f'wds {kind}'} folder, {_words(images)}"
    return harness.Case(name, "synthfast", variants, check, items=len(images), facts=facts)


def _words(images: np.ndarray) -> str:
    return f"{len(images):,} images of {'x'.join(map(str, images.shape[1:]))}"


def cases(scratch: Path) -> Iterator[harness.Case]:
    small, coloured = digits(10_000, 8), photographs(4000, 32, 3)
    for images in (small, digits(2000, 28), coloured, photographs(1000, 64, 2)):
        yield encoding(images)
    for images in (small, coloured):
        for kind in ("npy", "png", "jpg"):
            yield writing(kind, images, scratch)


def main() -> None:
    parser = harness.arguments(__doc__.splitlines()[0])
    parser.set_defaults(rounds=10, device="cpu")
    options = parser.parse_args()
    if options.device != "cpu":
        sys.exit("--device cuda: images are encoded on the CPU; leave it out")
    harness.prepare(options)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    with tempfile.TemporaryDirectory() as scratch:
        harness.run("write", cases(Path(scratch)), options)


if __name__ == "__main__":
    main()
