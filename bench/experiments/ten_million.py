"""What a set of ten million images costs besides its pixels: files, manifest, restarting, opening, one batch in random order.

    python -m bench.experiments.ten_million [--n 10000000] [--shard-size 10000] [--threads 2]

Writes a shard folder of so many images of 1x1x1 pixels and ten classes through the writer that `synthfast sample` uses, so that
nothing but the number of images and shards counts. Half of the shards are written, the folder is opened again as the same
command would do it after a kill, the rest is written and the folder finished. Then it is opened for reading, 512 images are read
in random order, and it is verified.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench import harness
from bench.experiments.long_run import private_bytes
from synthfast.data import ShardFolder, ShardSet, verify

FOLDER = Path("runs/bench/ten-million")
BATCH = 512


def write(folder: ShardFolder, spans: list[Any]) -> None:
    for span in spans:
        with folder.writer(span.index) as writer:
            labels = (np.arange(span.count) + span.first) % 10
            writer.append(np.zeros((span.count, 1, 1, 1), np.uint8), labels)
            writer.commit()


def main() -> None:
    parser = harness.arguments(__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=10_000_000)
    parser.add_argument("--shard-size", type=int, default=10_000)
    options = parser.parse_args()
    harness.prepare(options)
    shutil.rmtree(FOLDER, ignore_errors=True)
    request = {"n": options.n, "shape": [1, 1, 1], "classes": 10, "shard_size": options.shard_size}
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
        write(folder, spans[:half])
        lap("writing half of the shards")
    with ShardFolder.create_or_resume(FOLDER, request) as folder:
        spans = list(folder.pending())
        lap("restarting with half of the shards there")
        assert len(spans) == -(-options.n // options.shard_size) - half
        write(folder, spans)
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
    files = [path for path in FOLDER.iterdir() if path.is_file()]
    report = {
        **harness.heading("ten-million", options),
        "n": options.n,
        "shard_size": options.shard_size,
        "seconds": seconds,
        "files": len(files),
        "manifest_bytes": (FOLDER / "manifest.json").stat().st_size,
        "private_bytes_of_an_open_set": held,
    }
    lines = [f"### {options.n:,} images in shards of {options.shard_size:,}", "", "| what | seconds |", "| --- | --- |"]
    lines += [f"| {name} | {value:.2f} |" for name, value in seconds.items()]
    lines += [
        "",
        f"{len(files):,} files, manifest {report['manifest_bytes']:,} bytes, an open set holds {held / 1e6:.0f} MB",
    ]
    harness.write(report, "\n".join(lines), options)
    shutil.rmtree(FOLDER)


if __name__ == "__main__":
    main()
