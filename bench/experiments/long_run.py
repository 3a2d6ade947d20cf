"""One long run of `synthfast sample`: is memory flat, is the time left right, do the shards verify?

    python -m bench.experiments.long_run [--n 200000] [--steps 5] [--threads 2] [--format npy]

Runs what the command runs, in a process of its own, and writes down ten times a second what the command shows (images done,
seconds left) and the memory of the process that belongs to it alone (RssAnon of /proc/PID/status: mapped files are not in it).
Then the folder is verified. Reported: how far the predicted end of the run was off, from a tenth of the images on, as a share of
the whole run; memory at a tenth, at the half and at the end; images a second; bytes, files and the manifest's size.
"""

from __future__ import annotations

import shutil
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

from bench import harness
from synthfast.config import SampleConfig
from synthfast.data import verify
from synthfast.distributed import Ranks
from synthfast.sampling import generate

FOLDER = Path("runs/bench/long-run")


def private_bytes() -> int:
    """Memory of this process that no file backs."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("/proc/self/status has no RssAnon; this experiment needs Linux")


class Watch:
    """What is seen of a run: (seconds, images done, seconds left, private bytes), ten times a second at most."""

    def __init__(self) -> None:
        self.begin = time.perf_counter()
        self.rows: list[tuple[float, int, float, int]] = []
        self._lock = threading.Lock()

    def __call__(self, progress: Any) -> None:
        now = time.perf_counter() - self.begin
        with self._lock:
            if not self.rows or now - self.rows[-1][0] >= 0.1:
                self.rows.append((now, progress.done, progress.seconds_left, private_bytes()))


def at(rows: list[tuple[float, int, float, int]], images: float) -> tuple[float, int, float, int]:
    return next(row for row in rows if row[1] >= images)


def main() -> None:
    parser = harness.arguments(__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=200_000)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--format", choices=("npy", "wds"), default="npy")
    options = parser.parse_args()
    harness.prepare(options)
    shutil.rmtree(FOLDER, ignore_errors=True)
    config = SampleConfig(
        n=options.n, steps=options.steps, out=str(FOLDER), device=options.device, format=options.format
    )
    watch = Watch()
    with Ranks(options.device) as ranks:
        sampled = generate(config, ranks, watch)
    seconds = time.perf_counter() - watch.begin
    begin = time.perf_counter()
    problems = verify(FOLDER)
    verifying = time.perf_counter() - begin
    files = [path for path in FOLDER.iterdir() if path.is_file()]
    later = [row for row in watch.rows if row[1] >= options.n / 10]
    # A batch may be on its way to the disk when the last report is made: the end is that of the last report.
    end = watch.rows[-1][0]
    errors = [(row[0] + row[2] - end) / end for row in later]
    memory = {part: at(watch.rows, share * options.n)[3] for part, share in (("a tenth", 0.1), ("half", 0.5))}
    memory["the end"] = watch.rows[-1][3]
    report = {
        **harness.heading("long-run", options),
        "n": options.n,
        "steps": options.steps,
        "format": options.format,
        "seconds": seconds,
        "images_per_second": sampled.made / seconds,
        "predicted_end_off_by": {
            "largest": max(errors, key=abs),
            "median": statistics.median(errors),
            "at_a_tenth": errors[0],
        },
        "private_bytes": memory,
        "private_bytes_largest_after_a_tenth": max(row[3] for row in later),
        "verify_seconds": verifying,
        "problems": problems,
        "files": len(files),
        "bytes": sum(path.stat().st_size for path in files),
        "manifest_bytes": (FOLDER / "manifest.json").stat().st_size,
        "rows": watch.rows[:: max(1, len(watch.rows) // 200)],
    }
    harness.write(report, table(report), options)
    if problems:
        sys.exit(problems[0])


def table(report: dict[str, Any]) -> str:
    off, memory = report["predicted_end_off_by"], report["private_bytes"]
    megabytes = ", ".join(f"{part} {size / 1e6:.0f} MB" for part, size in memory.items())
    title = (
        f"{report['n']:,} images in one run, {report['steps']} steps, {report['device']}, {report['threads']} threads"
    )
    outcome = report["problems"][0] if report["problems"] else "all as the manifest says"
    return "\n".join(
        [
            f"### {title}",
            "",
            f"- {report['seconds']:.0f} s, {report['images_per_second']:,.0f} images/s",
            f"- verified in {report['verify_seconds']:.1f} s: {outcome}",
            f"- predicted end, from a tenth on: off by at most {abs(off['largest']):.1%} of the run, at a tenth by "
            f"{off['at_a_tenth']:+.1%}",
            f"- private memory: {megabytes}",
            f"- {report['files']} files, {report['bytes']:,} bytes, manifest {report['manifest_bytes']:,} bytes",
        ]
    )


if __name__ == "__main__":
    main()
