"""The bar on a terminal, and lines where there is none."""

from __future__ import annotations

import io
import sys

import pytest
from synthfast.cli import progress
from synthfast.cli.progress import Bar, duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1, "0:00"), (0.4, "0:00"), (59.6, "1:00"), (61, "1:01"), (3599.7, "1:00:00"), (100_000, "27:46:40")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_without_a_terminal_a_line_now_and_then(capsys, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with Bar("sampling") as bar:
        for k in range(25):
            bar.update(1000 * k, 25_000, f"text {k}")
            clock[0] += 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "sampling: 10,000 of 25,000, text 10\nsampling: 20,000 of 25,000, text 20\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("fails", [False, True])
def test_on_a_terminal_a_bar_that_ends_with_the_work(monkeypatch, fails):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    try:
        with Bar("sampling") as bar:
            bar.update(50, 200, "1,234 images/s, 0:12 left")
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    shown = terminal.getvalue()
    assert "sampling" in shown and "25%" in shown and "1,234 images/s, 0:12 left" in shown
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1  # the cursor is hidden, and shown again
