"""Progress on the terminal: a bar where there is one, a line every few seconds where there is not."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

_LINE_EVERY = 10.0  # seconds, without a terminal


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, rest = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Bar:
    """``with Bar("sampling") as bar: bar.update(done, total, "1,234 images/s, 0:12 left")``; on stderr."""

    def __init__(self, title: str) -> None:
        self._title, self._last = title, time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.fields[text]}"),
            )
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task(title, total=None, text="")

    def update(self, done: int, total: int, text: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total, text=text)
        elif time.monotonic() - self._last >= _LINE_EVERY:
            self._last = time.monotonic()
            print(f"{self._title}: {done:,} of {total:,}, {text}", file=sys.stderr, flush=True)

    def __enter__(self) -> Bar:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()


@contextlib.contextmanager
def images_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """``with images_bar("exporting") as report: report(done, total)``; the first call is before the first image.

    Shows images a second and the time left, from what this run has done.
    """
    start: list[tuple[float, int]] = []
    with Bar(title) as bar:

        def report(done: int, total: int) -> None:
            now = time.monotonic()
            if not start:
                start.append((now, done))
            rate = (done - start[0][1]) / max(now - start[0][0], 1e-9)
            left = f"{duration((total - done) / rate)} left" if rate else "starting"
            bar.update(done, total, f"{rate:,.0f} images/s, {left}")

        yield report
