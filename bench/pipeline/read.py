"""Reading images for training: batches of 512 of 32x32x3, float channels_last, with a random crop (4) and flips.

    python -m bench.pipeline.read [--threads 2] [--images 50000] [--workers 0,1,2] [--memory 100000,2000000]

The same images lie in three forms: npy shards, WebDataset tars of png, and the files of CIFAR-10 for Python. Our loaders read
the first two. The peers are torchvision's CIFAR10 with RandomCrop, RandomHorizontalFlip and ToTensor through DataLoader, and the
package webdataset, which decodes by PIL, with the same transforms, in shuffled order; both with each number of worker processes,
of which the fastest counts. The check, with crops and flips off: every reader gives every image with its label. What is
measured is 40 batches from a reader that goes on for ever; its start does not count, nor the batches that it has ready by then
(up to 4 with 2 workers, 3 of ours), and nothing else is open meanwhile.

Memory: by how much a process's anonymous memory (RssAnon; pages of files do not count, the system takes them back) grows at most
while it reads npy shards of so many images in shuffled order, in a process of its own. What grows with the set are 12 bytes an
image, its label and its place in the pass, and copies of labels that the allocator has not given back.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import itertools
import json
import pickle
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Generator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, default_collate
from torchvision import transforms
from torchvision.datasets import CIFAR10

from bench import harness
from synthfast.data import ImageSet, ShardFolder, ShardSet
from synthfast.data.loaders import Augment, Wanted, open_loader
from synthfast.training.batches import EpochOrder

BATCH, SHAPE, CLASSES, CROP = 512, (32, 32, 3), 10, 4
SHARD = 10_000
BATCHES = 40  # of a measurement
CPU = torch.device("cpu")
AUGMENT = transforms.Compose([
    transforms.RandomCrop(32, CROP), transforms.RandomHorizontalFlip(), transforms.ToTensor(),
])  # fmt: skip

Reader = Generator[tuple[Tensor, Tensor], None, None]


def make_images(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Images that compress about as well as photographs of this size, uint8 [count, 32, 32, 3], and labels."""
    random = np.random.default_rng(0)
    few = random.integers(0, 256, (1000, 8, 8, 3), np.uint8)
    smooth = np.stack([np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC)) for image in few])
    noise = random.integers(-4, 5, (1000, *SHAPE), np.int16)
    chosen = random.integers(0, 1000, (2, count))
    images = np.empty((count, *SHAPE), np.uint8)
    for first in range(0, count, SHARD):
        part = slice(first, first + SHARD)
        images[part] = np.clip(smooth[chosen[0, part]] + noise[chosen[1, part]], 0, 255)
    return images, random.integers(0, CLASSES, count)


def write_shards(path: Path, images: np.ndarray, labels: np.ndarray, repeats: int = 1, **more: object) -> None:
    """A shard folder of the images, ``repeats`` times one after the other."""
    request = {"n": len(images) * repeats, "shape": list(SHAPE), "classes": CLASSES, "shard_size": SHARD, **more}
    with ShardFolder.create_or_resume(path, request) as folder:
        for span in folder.pending():
            items = np.arange(span.first, span.first + span.count) % len(images)
            with folder.writer(span.index) as writer:
                writer.append(images[items], labels[items])
                writer.commit()
        folder.finish()


def write_cifar(path: Path, images: np.ndarray, labels: np.ndarray) -> None:
    """The files that torchvision's CIFAR10 reads, made of other images."""
    path = path / Cifar.base_folder
    path.mkdir(parents=True)
    flat = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    for (name, _), part in zip(
        Cifar.train_list, np.array_split(np.arange(len(images)), len(Cifar.train_list)), strict=True
    ):
        (path / name).write_bytes(pickle.dumps({"data": flat[part], "labels": labels[part].tolist()}))
    (path / Cifar.meta["filename"]).write_bytes(pickle.dumps({"label_names": [str(label) for label in range(CLASSES)]}))


class Cifar(CIFAR10):
    """torchvision's, without its knowledge of what the files should hold."""

    train_list = [(name, None) for name, _ in CIFAR10.train_list]  # noqa: RUF012
    test_list: list = []  # noqa: RUF012
    meta = {**CIFAR10.meta, "md5": None}  # noqa: RUF012


def ours(images: ImageSet, kind: str, workers: int | None, augmented: bool = True) -> Reader:
    """Batches in shuffled passes; with ``augmented`` off once through in order."""
    loader = open_loader(kind, [images], CPU, Augment(0, CROP, True) if augmented else Augment(), workers=workers)
    order = EpochOrder(len(images), 0)

    def plan(step: int) -> Wanted:
        index = np.arange(step * BATCH, (step + 1) * BATCH)
        return (
            Wanted((order[step * BATCH : (step + 1) * BATCH],), index)
            if augmented
            else Wanted((index[index < len(images)],))
        )

    last = sys.maxsize if augmented else -(-len(images) // BATCH)
    return loader.batches(plan, 0, last)


def channels_last(batches: Iterator[Any]) -> Reader:
    for images, labels in batches:
        yield images.contiguous(memory_format=torch.channels_last), labels


def torchvision_reader(folder: Path, workers: int, augmented: bool = True) -> Reader:
    data = Cifar(folder, train=True, transform=AUGMENT if augmented else transforms.ToTensor())
    loader = DataLoader(
        data, BATCH, shuffle=augmented, num_workers=workers, drop_last=augmented, persistent_workers=workers > 0
    )
    passes = itertools.chain.from_iterable(loader for _ in itertools.count()) if augmented else iter(loader)
    return channels_last(passes)


def webdataset_reader(folder: Path, workers: int, augmented: bool = True) -> Reader:
    import webdataset

    tars = sorted(map(str, folder.glob("*.tar")))
    shuffled = {"shardshuffle": 100 if augmented else False, "empty_check": False}
    data = webdataset.WebDataset(tars, **shuffled)
    if augmented:
        data = data.repeat().shuffle(1000)
    transform = AUGMENT if augmented else transforms.ToTensor()
    data = data.decode("pil").to_tuple("png", "cls").map_tuple(transform, int)
    data = data.batched(BATCH, collation_fn=default_collate, partial=not augmented)
    return channels_last(iter(webdataset.WebLoader(data, batch_size=None, num_workers=workers)))


def check(readers: dict[str, Callable[[bool], Reader]], images: np.ndarray, labels: np.ndarray) -> None:
    """Without crops and flips every reader gives every image with its label, in order; only several workers of webdataset mix
    their tars."""
    expected = digests(images, labels)
    for name, open_reader in readers.items():
        found: list[bytes] = []
        for pixels, some in open_reader(False):
            whole = (pixels * 255).round().to(torch.uint8)
            assert torch.equal(pixels, whole.float() / 255), f"{name}: values"  # PyTorch divides by 255 too
            found += digests(whole.permute(0, 2, 3, 1).contiguous().numpy(), some.numpy())
        mixed = name.startswith("webdataset") and found != expected
        assert (sorted(found) == sorted(expected)) if mixed else found == expected, f"{name}: images or labels differ"
        reader = open_reader(True)
        batch = next(reader)[0]
        reader.close()
        assert batch.shape == (BATCH, 3, 32, 32) and batch.dtype == torch.float32, name
        assert batch.is_contiguous(memory_format=torch.channels_last), name


def digests(images: np.ndarray, labels: np.ndarray) -> list[bytes]:
    """One for each image with its label."""
    pairs = zip(images, labels.tolist(), strict=True)
    return [hashlib.blake2b(image.tobytes() + bytes([label]), digest_size=16).digest() for image, label in pairs]


def reading_case(
    name: str, best: str, readers: dict[str, Callable[[bool], Reader]], check: Callable[[], None]
) -> harness.Case:
    opened: dict[str, Reader] = {}

    def before(key: str) -> None:
        """Only the reader that is measured is open, and has begun."""
        for reader in opened.values():
            reader.close()
        opened.clear()
        gc.collect()  # ends the workers of peers
        opened[key] = readers[key](True)
        for _ in range(4):
            next(opened[key])

    def variant(key: str) -> Callable[[], None]:
        def run() -> None:
            for _ in range(BATCHES):
                next(opened[key])

        return run

    variants = {key: variant(key) for key in readers}
    items = BATCH * BATCHES
    return harness.Case(name, best, variants, check, items=items, before=before)


def cases(folder: Path, options: argparse.Namespace) -> Iterator[harness.Case]:
    images, labels = make_images(options.images)
    write_shards(folder / "npy", images, labels)
    write_shards(folder / "wds", images, labels, format="wds", codec="png")
    write_cifar(folder / "cifar", images, labels)
    npy, wds = ShardSet(folder / "npy"), ShardSet(folder / "wds")
    workers = [int(number) for number in options.workers.split(",")]
    torchvision = {
        f"torchvision CIFAR10, {n} workers": lambda augmented, n=n: torchvision_reader(folder / "cifar", n, augmented)
        for n in workers
    }
    webdataset = {
        f"webdataset + PIL, {n} workers": lambda augmented, n=n: webdataset_reader(folder / "wds", n, augmented)
        for n in workers
    }
    of_npy = {
        "npy, device": lambda augmented: ours(npy, "device", None, augmented),
        "npy, dali": lambda augmented: ours(npy, "dali", options.threads, augmented),
        **{f"npy, torch, {n} workers": lambda augmented, n=n: ours(npy, "torch", n, augmented) for n in workers},
    }
    of_wds = {
        "wds, auto": lambda augmented: ours(wds, "auto", None, augmented),
        "wds, dali": lambda augmented: ours(wds, "dali", options.threads, augmented),
        **{f"wds, torch, {n} workers": lambda augmented, n=n: ours(wds, "torch", n, augmented) for n in workers if n},
    }
    what = f"{options.images:,} images"
    for name, best, readers in (
        (f"npy shards, {what}", "npy, device", {**of_npy, **torchvision, **webdataset}),
        (f"tars of png, {what}", "wds, auto", {**of_wds, **webdataset}),
    ):
        yield reading_case(name, best, readers, partial(check, readers, images, labels))


def anonymous_bytes() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))


def child(path: Path, batches: int = 400) -> None:
    """Read a folder in this process and print by how much its memory grew, as JSON."""
    warm = ours(ShardSet(path), "device", None)  # libraries and threads
    next(warm)
    warm.close()
    before = most = anonymous_bytes()
    for batch in itertools.islice(ours(ShardSet(path), "device", None), batches):
        most = max(most, anonymous_bytes())
        del batch
    print(json.dumps({"before": before, "grown": most - before}))


def measure_memory(folder: Path, counts: list[int]) -> list[dict[str, int]]:
    found: list[dict[str, int]] = []
    if not counts:
        return found
    images, labels = make_images(min(counts))
    for count in counts:
        path = folder / f"memory-{count}"
        if count % len(images):
            sys.exit(f"--memory: {count} is no multiple of {len(images)}, the least of the numbers")
        write_shards(path, images, labels, repeats=count // len(images))
        command = [sys.executable, "-m", "bench.pipeline.read", "--child", str(path)]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode:
            sys.exit(f"{count} images: {run.stderr.strip().splitlines()[-1]}")
        found.append({"images": count, **json.loads(run.stdout.splitlines()[-1])})
        shutil.rmtree(path)
    return found


def main() -> None:
    parser = harness.arguments(__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--workers", default="0,1,2", help="worker processes of DataLoader")
    parser.add_argument("--memory", default="100000,2000000", help="images to show memory with; empty for none")
    parser.add_argument(
        "--folder", type=Path, help="where the images are written, 6 GB for two million; a temporary folder"
    )
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.set_defaults(rounds=5)
    options = parser.parse_args()
    if options.child:
        child(options.child)
        return
    if options.device != "cpu":
        sys.exit("--device cuda: the peers read on the CPU alone; leave it out")
    harness.prepare(options)
    warnings.filterwarnings("ignore", module="webdataset")
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=options.folder)))
        memory = measure_memory(folder, [int(count) for count in options.memory.split(",") if count])
        report = harness.run("read", cases(folder, options), options)
    lines = ["", "| images | anonymous memory grows by, MB | from, MB |", "| --- | --- | --- |"]
    lines += [f"| {row['images']:,} | {row['grown'] / 1e6:.1f} | {row['before'] / 1e6:.0f} |" for row in memory]
    harness.write({**report, "memory": memory}, "\n".join(lines), options)


if __name__ == "__main__":
    main()
