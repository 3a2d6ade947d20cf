"""Precision, recall, density and coverage of 10,000 against 10,000 images by 512 features, time and memory.

    python -m bench.pipeline.prdc [--threads 2] [--images 10000] [--dim 512] [--jobs 1,2,8]

The peer is the package `prdc`, which computes all distances in float64 by scikit-learn with n_jobs=8; it also runs with the other
numbers of --jobs, and the fastest is what counts. With `--jobs none` ours runs alone, for sizes that the peer has no memory for
(50,000 images by 2,048 features), and the result has the size in its name.

Each variant runs in a process of its own, in random order, round by round: the time is that of the call, the memory
what the process then holds at most beyond what it held just before (libraries and features), and also its peak in all. The
features are those of a random network with a mean far from 0, of few intrinsic dimensions. The check: every variant gives the
same four counts in every round.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import statistics
import subprocess
import sys
import time
from typing import Any

import torch

from bench import harness
from synthfast.scoring.prdc import prdc

OURS = "synthfast"
METRICS = ("precision", "recall", "density", "coverage")
K = 5


def features(images: int, dim: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    inner = torch.randn(2 * images, 32, generator=generator) @ torch.randn(32, dim, generator=generator)
    x = (0.15 * inner + 0.3 * torch.randn(2 * images, dim, generator=generator) + 0.5).relu()
    return [x[:images].contiguous(), 1.02 * x[images:]]


def kilobytes(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field))


def child(variant: str, images: int, dim: int, threads: int) -> None:
    """One measurement, in this process: prints JSON."""
    torch.set_num_threads(threads)
    sides = features(images, dim)
    if variant == OURS:

        def run(real: torch.Tensor, synthetic: torch.Tensor) -> dict[str, float]:
            found = prdc(real, synthetic, K)
            return {name: getattr(found, name) for name in METRICS}
    else:
        import prdc as package
        import sklearn.metrics

        jobs, distances = int(variant.rpartition("=")[2]), sklearn.metrics.pairwise_distances
        sklearn.metrics.pairwise_distances = lambda *args, **options: distances(*args, **{**options, "n_jobs": jobs})

        def run(real: torch.Tensor, synthetic: torch.Tensor) -> dict[str, float]:
            with contextlib.redirect_stdout(io.StringIO()):
                return package.compute_prdc(real.numpy(), synthetic.numpy(), K)

    run(*(side[:200] for side in sides))  # libraries and threads
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts anew
    before, start = kilobytes("VmRSS"), time.perf_counter()
    found = run(*sides)
    seconds = time.perf_counter() - start
    peak = kilobytes("VmHWM")
    values = {name: float(found[name]) for name in METRICS}
    print(json.dumps({"seconds": seconds, "peak": peak * 1024, "new": (peak - before) * 1024, "values": values}))


def measure(variant: str, options: argparse.Namespace) -> dict[str, Any]:
    threads = str(options.threads)
    sizes = ["--images", str(options.images), "--dim", str(options.dim), "--threads", threads]
    run = subprocess.run(
        [sys.executable, "-m", "bench.pipeline.prdc", "--child", variant, *sizes],
        env={**os.environ, "OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode:
        sys.exit(f"{variant}: {run.stderr.strip().splitlines()[-1]}")
    return json.loads(run.stdout.splitlines()[-1])


def summarized(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    ours = [run["seconds"] for run in runs[OURS]]
    variants = {}
    for name, entries in runs.items():
        times = [entry["seconds"] for entry in entries]
        low, middle, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else 3 * times
        variants[name] = {
            "median_ms": middle * 1e3,
            "quartiles_ms": [low * 1e3, high * 1e3],
            "peak_bytes": max(entry["peak"] for entry in entries),
            "peak_new_bytes": max(entry["new"] for entry in entries),
        }
        if name != OURS:
            variants[name]["times_ours"] = middle / statistics.median(ours)
            variants[name]["times_ours_by_round"] = statistics.median(a / b for a, b in zip(times, ours, strict=True))
            variants[name]["new_memory_of_ours"] = variants[name]["peak_new_bytes"] / variants[OURS]["peak_new_bytes"]
    return variants


def main() -> None:
    parser = harness.arguments(__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--jobs", default="1,2,8", help="n_jobs of the peer, or none")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.set_defaults(rounds=5)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.images, options.dim, options.threads)
        return
    if options.device != "cpu":
        sys.exit("--device cuda: the peer runs on the CPU alone; leave it out")
    harness.prepare(options)
    alone = options.jobs == "none"
    variants = [OURS] if alone else [OURS, *(f"prdc, n_jobs={jobs}" for jobs in options.jobs.split(","))]
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in variants}
    order, expected = random.Random(0), None
    for _ in range(options.rounds):
        order.shuffle(variants)
        for name in variants:
            runs[name].append(measure(name, options))
            expected = expected or runs[name][0]["values"]
            found = runs[name][-1]["values"]
            differing = [metric for metric in METRICS if abs(found[metric] - expected[metric]) > 1e-12]
            assert not differing, f"{name}: {differing} differ: {found}, expected {expected}"
    name = f"{options.images:,} x {options.images:,} images, {options.dim} features, k = {K}"
    case = {"case": name, "ours": OURS, "values": expected, "variants": summarized(runs)}
    benchmark = f"prdc-{options.images}x{options.dim}" if alone else "prdc"
    report = {**harness.heading(benchmark, options), "rounds": options.rounds, "cases": [case]}
    lines = [
        harness.table(report),
        "",
        "| variant | new memory, MB | of ours | peak in all, MB |",
        "| --- | --- | --- | --- |",
    ]
    for name, entry in case["variants"].items():
        times = f"{entry.get('new_memory_of_ours', 1):.1f}"
        lines.append(f"| {name} | {entry['peak_new_bytes'] / 1e6:.0f} | {times} | {entry['peak_bytes'] / 1e6:.0f} |")
    harness.write(report, "\n".join(lines), options)


if __name__ == "__main__":
    main()
