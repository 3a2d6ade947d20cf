"""Figures are PNG files that show what they are given."""

from __future__ import annotations

import builtins

import numpy as np
import pytest
from PIL import Image

from synthfast.errors import SynthfastError
from synthfast.report import figures, inflection_figure

CURVES = {
    method: {
        "synthetic": [0, 500, 2000],
        "accuracy_gain": [None, *({"value": v, "ci": [v - 0.01, v + 0.01], "count": 5} for v in (0.0, 0.002))],
        "robust_accuracy_gain": [None, *({"value": v, "ci": [v - 0.01, v + 0.01], "count": 5} for v in (0.03, 0.09))],
    }
    for method in ("standard", "pgd")
}


def test_the_picture_is_written_and_repeats(tmp_path):
    for name in ("a.png", "b.png"):
        inflection_figure(CURVES, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    pixels = np.asarray(Image.open(tmp_path / "a.png").convert("RGB"))
    assert pixels.shape[0] > 400 and pixels.shape[1] > 1000
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["a.png", "b.png"]


def test_it_draws_the_gains_with_their_intervals(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "write_png", lambda figure, path: drawn.append(figure))
    inflection_figure(CURVES, tmp_path / "a.png")
    for axis, middle in zip(drawn[0].axes, (0.2, 9.0), strict=True):
        assert [text.get_text() for text in axis.get_xticklabels()] == ["500", "2,000"]
        lines = [line for line in axis.lines if line.get_marker() in "os" and len(line.get_xdata()) == 2]
        assert len(lines) == 2  # a line a method
        for line in lines:
            assert line.get_ydata()[1] == pytest.approx(middle)
        for container in axis.containers:
            ends = [segment[:, 1] for segment in container.lines[2][0].get_segments()]
            assert ends[1] == pytest.approx([middle - 1, middle + 1])
    assert [text.get_text() for text in drawn[0].axes[0].get_legend().get_texts()] == [
        "standard training",
        "PGD adversarial training",
    ]


def test_without_intervals(tmp_path):
    one = {"pgd": {**CURVES["pgd"]}}
    for metric in ("accuracy_gain", "robust_accuracy_gain"):
        one["pgd"][metric] = [None, *({"value": 0.01, "ci": None, "count": 1},) * 2]
    inflection_figure(one, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_without_matplotlib_it_is_one_line(tmp_path, monkeypatch):
    real = builtins.__import__

    def refuse(name, *arguments, **options):
        if name.startswith("matplotlib"):
            raise ImportError("No module named 'matplotlib'")
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(SynthfastError, match=r"figures need matplotlib .*; install it with: pip install matplotlib"):
        inflection_figure(CURVES, tmp_path / "a.png")
