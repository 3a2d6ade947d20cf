"""Measures a function of ours against its peers: outputs compared first, then timed in one interleaved run.

A benchmark is a list of cases; a case is a dictionary of variants that do the same work, ours and the peers'. Each case is
checked by its own function before anything is timed. Then every variant is warmed up and all are timed in random order, round
by round, so that a slow moment of the machine hits all alike. Reported are medians and quartiles of the rounds, and the ratio of
a peer's median to ours, as well as the median of the ratios round by round, which noise moves less. Where the memory traffic of
an operation is known, a plain copy with the same traffic is timed beside it: the fraction of the memory's speed that is reached.

Results go to JSON with hardware, versions and commit; a table goes to standard output.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from synthfast import ops
from synthfast.environment import environment

RESULTS = Path(__file__).parent / "results"
COPY = "copy_ of as many bytes"
TRAFFIC = "addcmul_ (same traffic)"  # three tensors read, one of them written: a yardstick like the copy, not a peer


@dataclasses.dataclass
class Case:
    """One comparison.

    Attributes:
        name: what is done and on what, such as "ddpm row, [512, 3, 32, 32] float32".
        ours: the key of our variant.
        variants: name to function without arguments.
        check: raises AssertionError unless the variants agree; called once before timing.
        bytes_moved: memory traffic of the fused operation, for the bandwidth column; None where it means nothing.
        items, unit: work done by one call, such as 256 images; None to report milliseconds only.
        warm: the check calls every variant, and a call takes seconds: there is no further warm-up.
        facts: more to report of a variant, by its name; filled by the check. What ends in "_per_image" is in the table.
        before: called with the name of a variant before each of its measurements, which does not count.
    """

    name: str
    ours: str
    variants: Mapping[str, Callable[[], object]]
    check: Callable[[], None]
    bytes_moved: int | None = None
    items: int | None = None
    unit: str = "images"
    warm: bool = False
    facts: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
    before: Callable[[str], None] | None = None


def arguments(description: str) -> argparse.ArgumentParser:
    """The options that every benchmark has: --device, --threads, --rounds, --out."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=40, help="at least 2")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for NAME-DEVICE.json")
    return parser


def describe(
    shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], layout: torch.memory_format = torch.contiguous_format
) -> str:
    """Shape, types and layout for the name of a case, such as "[512, 3, 32, 32] float32/bfloat16 channels_last"."""
    types = "/".join(dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in dtypes))
    return f"{list(shape)} {types}" + (" channels_last" if layout == torch.channels_last else "")


def run(name: str, cases: Iterable[Case], options: argparse.Namespace) -> dict[str, Any]:
    """Check and time every case, write the JSON file, print the table, return what was written."""
    results = [_measure(case, options) for case in cases]
    report = {
        **heading(name, options),
        "rounds": options.rounds,
        "peak_memory_bytes": _peak_memory(options.device),
        "cases": results,
    }
    write(report, table(report), options)
    return report


def heading(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """What every report begins with: the benchmark, the machine, the versions, the commit."""
    return {
        "benchmark": name,
        "device": options.device,
        "environment": {**environment(), "cpu_capability": ops.cpu_capability(), "build": ops.build_facts()},
        "commit": commit(),
        "threads": torch.get_num_threads(),
    }


def write(report: Mapping[str, Any], text: str, options: argparse.Namespace) -> None:
    """Write a report to NAME-DEVICE.json and print it as ``text``."""
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{report['benchmark']}-{options.device}.json"
    path.write_text(json.dumps(report, indent=2) + "\n")
    print(text)
    print(f"\nwritten to {path}")


def _measure(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    torch.compiler.reset()  # cases share code; entries of other cases would count against torch.compile's limit
    case.check()
    timed = dict(case.variants)
    if case.bytes_moved is not None:
        source = torch.zeros(case.bytes_moved // 2, dtype=torch.uint8, device=options.device)
        target = torch.empty_like(source)
        timed[COPY] = lambda: target.copy_(source)
    timer = _cuda_timer if options.device == "cuda" else _cpu_timer
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    repeats, new_memory = {}, {}
    for name, function in timed.items():
        if options.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        if case.warm:
            repeats[name] = 1
            continue
        if case.before is not None:
            case.before(name)
        warm_up: list[float] = []  # the first may still load something, so it does not count alone
        while len(warm_up) < 2 or (len(warm_up) < 4 and sum(warm_up) < 1):
            warm_up.append(timer(function, 1))
        if options.device == "cuda":
            new_memory[name] = torch.cuda.max_memory_allocated() - before
        repeats[name] = max(1, min(1000, round(2e-3 / max(min(warm_up), 1e-7))))  # about 2 ms a measurement
    order = random.Random(0)
    for _ in range(options.rounds):
        names = list(timed)
        order.shuffle(names)
        for name in names:
            if case.before is not None:
                case.before(name)
            seconds[name].append(timer(timed[name], repeats[name]))
    ours = seconds[case.ours]
    variants = {}
    for name, times in seconds.items():
        low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
        entry: dict[str, Any] = {"median_ms": middle * 1e3, "quartiles_ms": [low * 1e3, high * 1e3]}
        if name in new_memory:
            entry["peak_new_memory_bytes"] = new_memory[name]
        if name != case.ours:
            entry["times_ours"] = middle / statistics.median(ours)
            entry["times_ours_by_round"] = statistics.median(a / b for a, b in zip(times, ours, strict=True))
        if case.items is not None:
            entry[f"{case.unit}_per_second"] = case.items / middle
        if case.bytes_moved is not None and name == case.ours:
            entry["gigabytes_per_second"] = case.bytes_moved / middle / 1e9
        entry.update(case.facts.get(name, {}))
        variants[name] = entry
    return {"case": case.name, "ours": case.ours, "variants": variants}


def summary(reports: Iterable[Mapping[str, Any]]) -> str:
    """One line a case: ours, and how many times as long eager PyTorch and the best setting of torch.compile (or the fastest
    other peer) take. Each side counts with its fastest form, in place or not."""
    lines = [
        "| benchmark | case | ours ms | eager / ours | best other peer / ours | of copy speed |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for report in reports:
        for case in report["cases"]:
            times = {name: entry["median_ms"] for name, entry in case["variants"].items()}
            ours = case["ours"]
            mine = min(time for name, time in times.items() if name.startswith(ours))
            others = {n: t for n, t in times.items() if not n.startswith((ours, "eager")) and n not in (COPY, TRAFFIC)}
            best = min(others, key=others.__getitem__, default=None)
            against_best = "" if best is None else f"{others[best] / mine:.2f} ({best})"
            eager = [time for name, time in times.items() if name.startswith("eager")]
            against_eager = f"{min(eager) / mine:.2f}" if eager else ""
            of_copy = f"{times[COPY] / times[ours]:.0%}" if COPY in times else ""
            lines.append(
                f"| {report['benchmark']} | {case['case']} | {mine:.3f} | {against_eager} "
                f"| {against_best} | {of_copy} |"
            )
    return "\n".join(lines)


def _cpu_timer(function: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    return (time.perf_counter() - start) / repeats


def _cuda_timer(function: Callable[[], object], repeats: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / repeats / 1e3


def table(report: Mapping[str, Any]) -> str:
    """The results as a Markdown table."""
    where = ", ".join(report["environment"]["gpus"]) if report["device"] == "cuda" else report["environment"]["cpu"]
    lines = [
        f"### {report['benchmark']} on {report['device']} ({where}, {report['threads']} threads)",
        "",
        "| case | variant | median ms (quartiles) | time / ours (by round) | rate |",
        "| --- | --- | --- | --- | --- |",
    ]
    for case in report["cases"]:
        for name, entry in case["variants"].items():
            low, high = entry["quartiles_ms"]
            ratio = "1" if name == case["ours"] else f"{entry['times_ours']:.2f} ({entry['times_ours_by_round']:.2f})"
            rates = [
                f"{value:,.0f} {key.replace('_per_', '/')}"
                for key, value in entry.items()
                if key.endswith(("_second", "_per_image"))
            ]
            marked = f"**{name}**" if name == case["ours"] else name
            lines.append(
                f"| {case['case']} | {marked} | {entry['median_ms']:.3f} ({low:.3f} to {high:.3f}) | {ratio} "
                f"| {', '.join(rates)} |"
            )
    return "\n".join(lines)


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float, what: str) -> None:
    """AssertionError unless two tensors agree within ``tolerance``."""
    assert a.shape == b.shape, f"{what}: shapes {list(a.shape)} and {list(b.shape)}"
    difference = (a.float() - b.float()).abs().max().item()
    assert difference <= tolerance, f"{what}: outputs differ by {difference}, more than {tolerance}"


def _peak_memory(device: str) -> dict[str, int]:
    peak = {"resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if device == "cuda":
        peak["cuda"] = torch.cuda.max_memory_allocated()
    return peak


def commit() -> str:
    """The commit of the working tree, with "-dirty" if files other than results were changed; "unknown" without git."""
    here = Path(__file__).parent.parent
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True).stdout
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--", ".", ":!bench/results"],
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.strip() + ("-dirty" if changed.strip() else "")


def prepare(options: argparse.Namespace) -> torch.device:
    """Set the number of threads and return the device; stops with one line where options or machine do not fit."""
    if options.rounds < 2:
        sys.exit(f"--rounds {options.rounds}: expected at least 2, for medians and quartiles")
    torch.set_num_threads(options.threads)
    if options.device == "cuda" and (not torch.cuda.is_available() or ops.cuda_problem is not None):
        sys.exit(f"no CUDA device or kernels: {ops.cuda_problem or 'torch sees no GPU'}")
    return torch.device(options.device)
