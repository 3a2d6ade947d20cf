"""The picture of a success curve shows what it is given."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from PIL import Image

from synthfast.report import figures
from synthfast.report.figures import arc_figure

CURVE = {
    "eps": [0.0, 0.1, 0.2, 2.0],
    "norm": "l2",
    "accuracy": [0.9, 0.7, 0.45, 0.5],
    "ci": [[0.88, 0.93], [0.66, 0.74], [0.41, 0.49], [0.5, 0.5]],
    "isotonic": [0.9, 0.7, 0.475, 0.475],
    "trained": [True, True, True, False],
}
METRICS = {"arc": {"value": 0.04, "ci": [0.03, 0.05]}}


@pytest.fixture
def drawn(monkeypatch):
    """Figures in the place of files."""
    found = []
    monkeypatch.setattr(figures, "write_png", lambda figure, path: found.append(figure))
    return found


def test_the_picture_is_written_and_repeats(tmp_path):
    for name in ("a.png", "b.png"):
        arc_figure(CURVE, METRICS, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    pixels = np.asarray(Image.open(tmp_path / "a.png").convert("RGB"))
    assert pixels.shape[0] > 400 and pixels.shape[1] > 700


def test_points_intervals_fit_and_area(drawn, tmp_path):
    arc_figure(CURVE, METRICS, tmp_path / "a.png")
    (axis,) = drawn[0].axes
    lines = {line.get_label(): line for line in axis.lines}
    assert lines["monotone fit"].get_ydata() == pytest.approx([0.9, 0.7, 0.5, 0.5])  # 1/2 in the place of less
    assert set(lines["chance"].get_ydata()) == {0.5}
    (bars,) = axis.containers
    assert bars.lines[0].get_xydata().tolist() == [
        [0.0, 0.9],
        [0.1, 0.7],
        [0.2, 0.45],
    ]  # raw, and only what was measured
    ends = [segment[:, 1].tolist() for segment in bars.lines[2][0].get_segments()]
    assert np.allclose(ends, CURVE["ci"][:3])
    labels = [text.get_text() for text in axis.get_legend().get_texts()]
    assert "ARC 0.04 [0.03, 0.05]" in labels and "held-out success" in labels
    assert axis.get_xlabel() == "eps, l2 on pixels in [0, 1]"
    assert axis.get_xlim()[1] < 0.3  # past chance there is nothing to see


def test_l_infinity_and_a_curve_above_chance_to_its_end(drawn, tmp_path):
    curve = {**copy.deepcopy(CURVE), "norm": "linf", "accuracy": [0.9, 0.8, 0.7, 0.5]}
    arc_figure(curve, METRICS, tmp_path / "a.png")
    assert drawn[0].axes[0].get_xlabel() == "eps, l-infinity, in units of 1/255"
    assert drawn[0].axes[0].get_xlim()[1] > 2


def test_a_curve_without_an_area(drawn, tmp_path):
    curve = {**CURVE, "eps": [0.0], "accuracy": [0.52], "trained": [True], "ci": None, "isotonic": None}
    arc_figure(curve, {"arc": {"value": None, "ci": None}}, tmp_path / "a.png")
    assert [text.get_text() for text in drawn[0].axes[0].get_legend().get_texts()] == ["chance", "held-out success"]
