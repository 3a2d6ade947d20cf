"""What a set of ten million images costs besides its pixels: files, manifest, restarting, opening, one batch in random order.

    python -m bench.experiments.ten_million [--n 10000000] [--shard-size 10000] [--threads 2]

Writes a shard folder of so many images of 1x1x1 pixels and ten classes through the writer that `synthfast sample` uses, so that
nothing but the number of images and shards counts. Half of the shards are written, the folder is opened again as the same
command would do it after a kill, the rest is written and the folder finished. Then it is opened for reading, 512 images are read
in random order, and it is verified.

What pixels add is measured on a folder of 200,000 images of 32x32x3 random bytes: seconds to write it and to verify it, from
the system's memory.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from bench import harness
from bench.experiments.long_run import private_bytes
from synthfast.data import ShardFolder, ShardSet, verify
from synthfast.data.shards.manifest import Span

FOLDER = Path("runs/bench/ten-million")
BATCH = 512


def write(folder: ShardFolder, spans: Iterable[Span], images: np.ndarray) -> None:
    """Shards of the first of ``images``, uint8 [shard size, H, W, C], again and again."""
    for span in spans:
        with folder.writer(span.index) as writer:
            writer.append(images[: span.count], (np.arange(span.count) + span.first) % 10)
            writer.commit()


def pixels(shard_size: int, count: int = 200_000) -> dict[str, float]:
    """Images a second of 32x32x3 pixels, written and verified."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    request = {"n": count, "shape": [32, 32, 3], "classes": 10, "shard_size": min(shard_size, count)}
    images = np.random.default_rng(0).integers(0, 256, (request["shard_size"], 32, 32, 3), np.uint8)
    begin = time.perf_counter()
    with ShardFolder.create_or_resume(FOLDER, request) as folder:
        write(folder, folder.pending(), images)
        folder.finish()
    written = time.perf_counter()
    problems = verify(FOLDER)
    verified = time.perf_counter()
    assert not problems, problems[0]
    shutil.rmtree(FOLDER)
    return {"written": count / (written - begin), "verified": count / (verified - written)}


def main() -> None:
    parser = harness.arguments(__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=10_000_000)
    parser.add_argument("--shard-size", type=int, default=10_000)
    options = parser.parse_args()
    harness.prepare(options)
    shutil.rmtree(FOLDER, ignore_errors=True)
    request = {"n": options.n, "shape": [1, 1, 1], "classes": 10, "shard_size": options.shard_size}
    blank = np.zeros((options.shard_size, 1, 1, 1), np.uint8)
    seconds: dict[str, float] = {}
    begin = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal begin
        now = time.perf_counter()
        seconds[name] = now - begin
        begin = now

    with ShardFolder.create_or_resume(FOLDER, request) as folder:
        spans = list(folder.pending())
        lap("starting")
        half = len(spans) // 2
        write(folder, spans[:half], blank)
        lap("writing half of the shards")
    with ShardFolder.create_or_resume(FOLDER, request) as folder:
        spans = list(folder.pending())
        lap("restarting with half of the shards there")
        assert len(spans) == -(-options.n // options.shard_size) - half
        write(folder, spans, blank)
        lap("writing the rest")
        folder.finish()
        lap("finishing: one manifest from all sidecars")
    before = private_bytes()
    images = ShardSet(FOLDER)
    lap("opening")
    held = private_bytes() - before
    items = np.random.default_rng(0).permutation(len(images))
    lap("a random order of all images")
    found = images.read(items[:BATCH])
    lap(f"reading {BATCH} images in random order, for the first time")
    assert found.shape == (BATCH, 1, 1, 1) and (images.labels[items[:BATCH]] == items[:BATCH] % 10).all()
    problems = verify(FOLDER)
    lap("verifying")
    assert not problems, problems[0]
    files = [path.stat().st_size for path in FOLDER.iterdir() if path.is_file()]
    manifest_bytes = (FOLDER / "manifest.json").stat().st_size
    shutil.rmtree(FOLDER)
    rates = pixels(options.shard_size)
    report = {
        **harness.heading("ten-million", options),
        "n": options.n,
        "shard_size": options.shard_size,
        "seconds": seconds,
        "files": len(files),
        "bytes": sum(files),
        "manifest_bytes": manifest_bytes,
        "private_bytes_of_an_open_set": held,
        "images_per_second_32x32x3": rates,
    }
    lines = [f"### {options.n:,} images in shards of {options.shard_size:,}", "", "| what | seconds |", "| --- | --- |"]
    lines += [f"| {name} | {value:.2f} |" for name, value in seconds.items()]
    lines += [
        "",
        f"{len(files):,} files, manifest {report['manifest_bytes']:,} bytes, an open set holds {held / 1e6:.0f} MB",
        "",
        f"Images of 32x32x3: {rates['written']:,.0f} a second are written, {rates['verified']:,.0f} verified",
    ]
    harness.write(report, "\n".join(lines), options)


if __name__ == "__main__":
    main()
