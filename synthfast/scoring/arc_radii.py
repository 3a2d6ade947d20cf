"""Training and measuring the discriminators of a few radii at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from synthfast.scoring.arc_measure import MeasureSettings, measure
from synthfast.scoring.arc_sets import ArcSets
from synthfast.scoring.arc_store import Measured
from synthfast.scoring.discriminator import Discriminator, DiscriminatorSettings, DiscriminatorTraining

_REPORT_EVERY = 25  # steps


Report = Callable[[float, str], None]
"""Called with a radius on pixels in [0, 1] and what is being done there, from any thread."""


class _Stopped(Exception):
    """Raised in a thread whose work nobody waits for any more."""


def measure_radii(
    sets: ArcSets,
    radii: Sequence[float],
    known: Mapping[float, Measured],
    training: DiscriminatorSettings,
    measuring: MeasureSettings,
    finished: Callable[[Measured], None],
    report: Report | None = None,
) -> list[Measured]:
    """Train and measure a discriminator for each radius, started from that of the nearest smaller radius known.

    On a CPU each has a thread of its own, which makes the result independent of the number of threads; on a GPU they are trained
    as one bank.

    Args:
        known: measured radii, from which the others start; radius 0 starts from random weights.
        finished: called with each as soon as it is measured, in any order and from any thread.
    """
    starts = [_start(eps, known) for eps in radii]
    stop = threading.Event()

    def work(job: tuple[list[float], DiscriminatorTraining]) -> list[Measured]:
        mine, training_run = job
        begin = time.perf_counter()

        def trained(step: int) -> None:
            if stop.is_set():
                raise _Stopped
            if report is not None and step % _REPORT_EVERY == 0:
                for eps in mine:
                    report(eps, f"step {step:,}")

        found = training_run.run(trained)
        shared = (time.perf_counter() - begin) / len(mine)
        return [_measured(sets, one, shared, training, measuring, finished, stop, report) for one in found]

    if sets.real.device.type == "cuda":
        return work((list(radii), DiscriminatorTraining(sets.training, radii, training, starts)))
    # Made here, one after the other: no thread may run a network while another one is traced.
    jobs = [([e], DiscriminatorTraining(sets.training, [e], training, [s])) for e, s in zip(radii, starts, strict=True)]
    threads = torch.get_num_threads()
    if threads == 1:
        return [measured for job in jobs for measured in work(job)]
    with ThreadPoolExecutor(min(threads, len(jobs)), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        futures = [pool.submit(work, job) for job in jobs]
        try:
            return [measured for future in futures for measured in future.result()]
        finally:  # before the pool waits for its threads
            stop.set()
            for future in futures:
                future.cancel()
            torch.set_num_threads(threads)  # the workers' setting is also the default of threads started later


def _start(eps: float, known: Mapping[float, Measured]) -> Mapping[str, torch.Tensor] | None:
    smaller = [radius for radius in known if radius < eps]
    return known[max(smaller)].state if smaller else None


def _measured(
    sets: ArcSets,
    found: Discriminator,
    seconds: float,
    training: DiscriminatorSettings,
    measuring: MeasureSettings,
    finished: Callable[[Measured], None],
    stop: threading.Event,
    report: Report | None,
) -> Measured:
    begin = time.perf_counter()

    def between() -> None:
        if stop.is_set():
            raise _Stopped
        if report is not None:
            report(found.eps, "measuring")

    outcomes = measure(found.attacked, sets.real, sets.synthetic, found.eps, training.norm, measuring, between)
    measured = Measured(
        found.eps,
        outcomes,
        validation_accuracy=found.validation_accuracy,
        validation_images=2 * len(sets.training.real_validation),
        training_accuracy=found.training_accuracy,
        steps=found.steps,
        best_step=found.best_step,
        state={name: tensor.cpu() for name, tensor in found.network.state_dict().items()},
        seconds=seconds + time.perf_counter() - begin,
    )
    finished(measured)
    return measured
