"""Every format of images: bytes an image, and images/s written, read in order, and read in shuffled batches.

    python -m bench.pipeline.formats [--threads 2] [--rounds 4] [--count 20000]

Written are images in memory, by the functions of `synthfast shards import` and `export`, until all is on the disk. Read in order
is what these commands do with a source, from opening it to its last image; `memory://` stands for a URL whose files are not in
the cache: they are fetched and hashed first. Shuffled are batches of 512 as training takes them, from the loader that `--loader
auto` picks: float32, cropped and mirrored, as in bench.pipeline.read. What is read is in the system's memory, as a set is that
was just written: a slower disk sets its own limit, by the bytes an image.

32x32x3 are the pieces of photographs of bench.pipeline.write, each made darker by a factor of its own, because deflate would
otherwise find the same bytes in several of them; 8x8x1 are digits. The check: every format gives the given pixels and labels, by
reader and by loader (jpg those that Pillow's encoder and decoder give, whose PSNR is reported).
"""

from __future__ import annotations

import itertools
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import harness
from bench.pipeline.read import Reader, ours, reading_case
from bench.pipeline.write import QUALITY, digits, opened, photographs, pillow
from synthfast.data import ArrayImages, ImageSet, open_images
from synthfast.data.loaders import open_loader
from synthfast.data.storage.cache import cache_root
from synthfast.data.storage.places import is_url, place, remove, sizes
from synthfast.data.transfer.copying import Layout, chunks, copy_to_shards, shard_request
from synthfast.data.transfer.export_folder import write_cifar, write_folder
from synthfast.data.transfer.importing import open_in_order
from synthfast.data.transfer.npz_stream import write_npz

SHARD = 10_000
BASELINE = "npy"
RECORD = {"made by": "bench.pipeline.formats"}


@dataclass(frozen=True)
class Format:
    """How images are written and found again.

    Attributes:
        name: what tables call it.
        kind: of the source, as `synthfast.data.open_images` has it ("" for shards).
        path: where it is written.
        write: from images and the path.
        by_class: whether reading gives the images of one class after the other.
        lossy: whether pixels change.
    """

    name: str
    kind: str
    path: str
    write: Callable[[ImageSet, str], object]
    by_class: bool = False
    lossy: bool = False

    @property
    def source(self) -> str:
        return f"{self.kind}:{self.path}" if self.kind else self.path

    def remove(self) -> None:
        """Whatever an earlier call wrote, and what the cache has of it."""
        if is_url(self.path):
            for name in sizes(place(self.path)):
                remove(place(self.path), name)
            shutil.rmtree(cache_root(), ignore_errors=True)
        elif os.path.isdir(self.path):
            shutil.rmtree(self.path)
        else:
            Path(self.path).unlink(missing_ok=True)

    def bytes(self) -> dict[str, int]:
        """Of all its files: in all, and as far as that is known of the blocks of the disk that they take."""
        if is_url(self.path):
            return {"bytes": sum(sizes(place(self.path)).values())}
        files = [file for file in Path(self.path).rglob("*") if file.is_file()] or [Path(self.path)]
        status = [file.stat() for file in files]
        return {"bytes": sum(s.st_size for s in status), "disk_bytes": sum(s.st_blocks * 512 for s in status)}


def formats_of(shape: tuple[int, int, int], folder: Path) -> list[Format]:
    jpg = partial(shards, format="wds", codec="jpg", quality=QUALITY)
    found = [
        Format(BASELINE, "", f"{folder}/npy", shards),
        Format("npy at a URL (memory://)", "", f"memory://{folder.name}", shards),
        Format("wds, png", "", f"{folder}/png", partial(shards, format="wds", codec="png")),
        Format(f"wds, jpg {QUALITY}", "", f"{folder}/jpg", jpg, lossy=True),
        Format("npz", "npz", f"{folder}/stored.npz", partial(with_record, write_npz, compress=False)),
        Format("npz, deflated", "npz", f"{folder}/deflated.npz", partial(with_record, write_npz, compress=True)),
        Format("folder of png", "folder", f"{folder}/folder", partial(with_record, write_folder), by_class=True),
    ]
    if shape == (32, 32, 3):
        found.append(Format("CIFAR binary", "cifar-binary", f"{folder}/cifar", partial(with_record, write_cifar)))
    return found


def shards(images: ImageSet, path: str, **storage: Any) -> None:
    copy_to_shards(images, path, shard_request(images, Layout(SHARD, **storage), {}), options={})


def with_record(write: Callable[..., object], images: ImageSet, path: str, **options: Any) -> None:
    write(images, Path(path), RECORD, {}, lambda done, total: None, **options)


def in_order(form: Format) -> Iterator[np.ndarray]:
    """The pixels of a source that is opened now, uint8 [k, H, W, C] at a time."""
    if is_url(form.path):
        shutil.rmtree(cache_root(), ignore_errors=True)
    images = open_in_order(form.source, "data")
    return map(images.read, chunks(images))


@dataclass(frozen=True)
class Expected:
    """What every format has to give back: pixels uint8 [n, H, W, C] as they are and through jpg, and labels int64 [n]."""

    pixels: np.ndarray
    from_jpg: np.ndarray
    labels: np.ndarray

    def of(self, form: Format) -> tuple[np.ndarray, np.ndarray]:
        """Pixels and labels in the order in which a format has them."""
        rows = np.argsort(self.labels, kind="stable") if form.by_class else slice(None)
        return (self.from_jpg if form.lossy else self.pixels)[rows], self.labels[rows]

    def psnr(self) -> float:
        """Of jpg, in dB."""
        error = np.square(self.pixels.astype(np.float32) - self.from_jpg).mean(dtype=np.float64)
        return float(10 * np.log10(255**2 / error))


def expect(pixels: np.ndarray) -> Expected:
    files = [pillow(image, "JPEG", quality=QUALITY, subsampling=0) for image in pixels]
    return Expected(pixels, opened(files, pixels.shape[1:]), np.arange(len(pixels)) % 10)


def check_in_order(form: Format, expected: Expected) -> None:
    pixels, labels = expected.of(form)
    assert np.array_equal(np.concatenate(list(in_order(form))), pixels), f"{form.name}: other pixels"
    assert np.array_equal(open_in_order(form.source, "data").labels, labels), f"{form.name}: other labels"


def check_batches(name: str, batches: Reader, pixels: np.ndarray, labels: np.ndarray) -> None:
    done = 0
    for images, found in batches:
        part = slice(done, done + len(images))
        wanted = torch.from_numpy(pixels[part]).permute(0, 3, 1, 2).float() / 255
        assert torch.equal(images, wanted) and found.tolist() == labels[part].tolist(), f"{name}: images {part}"
        done += len(images)
    assert done == len(pixels), f"{name}: {done} of {len(pixels)} images"


def writing(forms: list[Format], expected: Expected, words: str) -> harness.Case:
    images = ArrayImages("images", [expected.pixels], expected.labels, 10)
    facts: dict[str, dict[str, float]] = {}
    by_name = {form.name: form for form in forms}

    def before(name: str) -> None:
        by_name[name].remove()
        os.sync()

    def check() -> None:
        for form in forms:
            form.write(images, form.path)
            os.sync()
            check_in_order(form, expected)
            facts[form.name] = {f"{key}_per_image": size / len(images) for key, size in form.bytes().items()}
            if form.lossy:
                facts[form.name]["psnr_db"] = expected.psnr()

    variants = {form.name: partial(form.write, images, form.path) for form in forms}
    name = f"write {words}"
    return harness.Case(name, BASELINE, variants, check, items=len(images), warm=True, facts=facts, before=before)


def reading(forms: list[Format], expected: Expected, words: str) -> harness.Case:
    def check() -> None:
        for form in forms:
            check_in_order(form, expected)

    def drain(form: Format) -> None:
        for _ in in_order(form):
            pass

    variants = {form.name: partial(drain, form) for form in forms}
    return harness.Case(f"read {words} in order", BASELINE, variants, check, items=len(expected.pixels))


def shuffled(forms: list[Format], expected: Expected, words: str) -> harness.Case:
    forms = [form for form in forms if not is_url(form.path)]  # which are files of the cache by then
    readers = {
        form.name: lambda augmented, form=form: ours(open_images(form.source), "auto", None, augmented)
        for form in forms
    }

    def check() -> None:
        for form in forms:
            check_batches(form.name, readers[form.name](False), *expected.of(form))

    return reading_case(f"shuffled batches of {words}", BASELINE, readers, check)


def cases(options: Any, scratch: Path, loaders: dict[str, dict[str, str]]) -> Iterator[harness.Case]:
    """Three cases for each kind of images; ``loaders`` is filled with what auto picks, by words and format."""
    random = np.random.default_rng(0)
    gains = random.uniform(0.8, 1, (options.count, 1, 1, 1)).astype(np.float32)
    coloured = (photographs(options.count, 32, 3) * gains).astype(np.uint8)
    for pixels in (coloured, digits(options.count, 8)):
        folder = scratch / "x".join(map(str, pixels.shape[1:]))
        folder.mkdir()
        forms, expected = formats_of(pixels.shape[1:], folder), expect(pixels)
        words = f"{len(pixels):,} images of {folder.name}"
        for case in (writing, reading, shuffled):
            yield case(forms, expected, words)
        loaders[words] = {
            form.name: open_loader("auto", [open_images(form.source)], torch.device("cpu")).kind for form in forms
        }


def rows(report: Mapping[str, Any], loaders: Mapping[str, Mapping[str, str]]) -> list[dict[str, Any]]:
    """One for each format and kind of images, with what the three cases found."""
    found = []
    variants = iter([case["variants"] for case in report["cases"]])
    for words, kinds in loaders.items():
        written, read, batches = itertools.islice(variants, 3)
        for name, kind in kinds.items():
            facts = {key: value for key, value in written[name].items() if key.endswith(("_per_image", "psnr_db"))}
            facts |= {"written_per_second": written[name]["images_per_second"]}
            facts |= {"read_per_second": read[name]["images_per_second"]}
            if name in batches:
                facts |= {"batches_per_second": batches[name]["images_per_second"], "loader": kind}
            found.append({"images": words, "format": name, **facts})
    return found


def table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for words, group in itertools.groupby(rows, lambda row: row["images"]):
        lines += ["", f"{words}; images/s", ""]
        lines += ["| format | bytes an image | on the disk | written | read in order | shuffled batches, loader |"]
        lines += ["| --- | --- | --- | --- | --- | --- |"]
        for row in group:
            psnr = f" ({row['psnr_db']:.1f} dB)" if "psnr_db" in row else ""
            disk = f"{row['disk_bytes_per_image']:,.0f}" if "disk_bytes_per_image" in row else ""
            batches = f"{row['batches_per_second']:,.0f}, {row['loader']}" if "loader" in row else ""
            lines.append(
                f"| {row['format']}{psnr} | {row['bytes_per_image']:,.0f} | {disk} | {row['written_per_second']:,.0f} "
                f"| {row['read_per_second']:,.0f} | {batches} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = harness.arguments(__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=20_000, help="images of each kind")
    parser.set_defaults(rounds=4, device="cpu")
    options = parser.parse_args()
    if options.device != "cpu":
        sys.exit("--device cuda: images are coded on the CPU; leave it out")
    harness.prepare(options)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    loaders: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["SYNTHFAST_CACHE"] = f"{scratch}/cache"
        report = harness.run("formats", cases(options, Path(scratch), loaders), options)
    found = rows(report, loaders)
    harness.write({**report, "formats": found}, table(found), options)


if __name__ == "__main__":
    main()
