"""Figures as PNG files, drawn by matplotlib (the extra "report")."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from synthfast.artifacts import atomic_write_bytes
from synthfast.errors import SynthfastError
from synthfast.scoring.names import METRICS, SCORES, TARGET

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Of Okabe and Ito's palette, which the colour-blind tell apart; a marker each for print.
_STYLES = {"standard": ("#0072B2", "o"), "pgd": ("#D55E00", "s"), "trades": ("#009E73", "^")}
_MARKERS = "osD^vP*X"
_LABELS = {"standard": "standard training", "pgd": "PGD adversarial training", "trades": "TRADES"}


def new_figure(width: float, height: float, columns: int = 1, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """An empty figure (inches) and its axes, row by row; one-line error where matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SynthfastError(f"figures need matplotlib ({error}); install it with: pip install matplotlib") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#DDDDDD", linewidth=0.8)
        axis.set_axisbelow(True)
    return figure, list(axes)


def write_png(figure: Figure, path: str | Path | io.BytesIO) -> None:
    """Write the figure, to a file atomically, without the version and date that would change its bytes."""
    buffer = path if isinstance(path, io.BytesIO) else io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    if not isinstance(path, io.BytesIO):
        atomic_write_bytes(path, buffer.getvalue())


def inflection_figure(curves: Mapping[str, Any], path: str | Path | io.BytesIO) -> None:
    """Gains over training on real images alone, in points, against the number of synthetic images.

    Args:
        curves: of the result of ``synthfast inflection`` (see :func:`synthfast.evaluation.inflection.compare`).
        path: PNG file, or where its content goes.
    """
    figure, axes = new_figure(9.5, 4, columns=2)
    titles = {"accuracy_gain": "Gain in accuracy", "robust_accuracy_gain": "Gain in robust accuracy"}
    counts = sorted({count for curve in curves.values() for count in curve["synthetic"] if count})
    for axis, (metric, title) in zip(axes, titles.items(), strict=True):
        for k, (method, curve) in enumerate(curves.items()):
            colour, marker = _STYLES[method]
            points = [(n, gain) for n, gain in zip(curve["synthetic"], curve[metric], strict=True) if gain is not None]
            # Methods side by side, so that their bars do not cover each other.
            x = [counts.index(n) + 0.06 * (k - (len(curves) - 1) / 2) for n, _ in points]
            y = [100 * gain["value"] for _, gain in points]
            bars = [
                [0.0, 0.0] if gain["ci"] is None else [100 * abs(b - gain["value"]) for b in gain["ci"]]
                for _, gain in points
            ]
            axis.errorbar(
                x, y, list(zip(*bars, strict=True)), color=colour, marker=marker, capsize=4, label=_LABELS[method]
            )
        axis.axhline(0, color="black", linewidth=1)
        axis.set_xticks(range(len(counts)), [f"{count:,}" for count in counts])
        axis.set_xlim(-0.5, len(counts) - 0.5)
        axis.set_xlabel("synthetic images")
        axis.set_ylabel("points")
        axis.set_title(title)
    axes[0].legend(frameon=False)
    write_png(figure, path)


def rank_figure(generators: Mapping[str, Any], correlations: Mapping[str, Any], path: str | Path | io.BytesIO) -> None:
    """Each score against the robust accuracy, a point a generator, with 95% intervals.

    Args:
        generators, correlations: of the result of ``synthfast rank`` (see :func:`synthfast.scoring.rank.rank_result`).
        path: PNG file, or where its content goes.
    """
    scores = [name for name in SCORES if name in correlations]
    columns = min(4, len(scores))
    rows = -(-len(scores) // columns)
    figure, axes = new_figure(3.4 * columns, 3.2 * rows, columns, rows)
    for axis, score in zip(axes, scores, strict=False):
        for number, (name, row) in enumerate(generators.items()):
            x, y = row[score], row[TARGET]
            axis.errorbar(
                x["value"],
                100 * y["value"],
                yerr=_bar(y, 100),
                xerr=_bar(x, 1),
                color=f"C{number % 10}",
                marker=_MARKERS[number % len(_MARKERS)],
                linestyle="none",
                label=name,
                elinewidth=0.8,
            )
        axis.set_title(f"{METRICS[score][0]}: rho {correlations[score]['value']:+.2f}", fontsize=11)
        axis.set_ylabel("robust accuracy %")
        if score in ("arc", "fid") and all(row[score]["value"] > 0 for row in generators.values()):
            axis.set_xscale("log")
    for axis in axes[len(scores) :]:
        axis.set_visible(False)
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(6, len(names)), frameon=False, fontsize=9)
    write_png(figure, path)


def _bar(entry: Mapping[str, Any], scale: float) -> list[list[float]] | None:
    """The distances of an interval's ends from the value, as errorbar wants them."""
    if entry["ci"] is None:
        return None
    return [
        [scale * max(0.0, side * (bound - entry["value"]))] for side, bound in zip((-1, 1), entry["ci"], strict=True)
    ]


def arc_figure(curve: Mapping[str, Any], metrics: Mapping[str, Any], path: str | Path | io.BytesIO) -> None:
    """Success of robust discriminators against the radius: raw values with intervals, the monotone fit, and ARC as an area.

    Args:
        curve: "arc" of the ``curves`` of a result of ``synthfast score arc``.
        metrics: of the same result.
        path: PNG file, or where its content goes.
    """
    figure, (axis,) = new_figure(6.5, 4)
    eps, raw = curve["eps"], curve["accuracy"]
    trained = [k for k, is_trained in enumerate(curve["trained"]) if is_trained]
    axis.axhline(0.5, color="black", linewidth=1, linestyle=(0, (4, 3)), label="chance")
    value = metrics["arc"]["value"]
    if value is not None:
        fitted = [max(height, 0.5) for height in curve["isotonic"]]
        low, high = metrics["arc"]["ci"]
        axis.fill_between(
            eps, fitted, 0.5, color="#0072B2", alpha=0.2, linewidth=0, label=f"ARC {value:.4g} [{low:.4g}, {high:.4g}]"
        )
        axis.plot(eps, fitted, color="#0072B2", label="monotone fit")
    x, y = [eps[k] for k in trained], [raw[k] for k in trained]
    bars = None
    if curve["ci"] is not None:
        bars = [[abs(raw[k] - curve["ci"][k][side]) for k in trained] for side in (0, 1)]
    axis.errorbar(x, y, bars, color="#D55E00", marker="o", linestyle="none", capsize=4, label="held-out success")
    # Where all balls meet may be far away, with nothing on the way.
    shown = trained[-1] + 1 if trained[-1] + 1 < len(eps) and raw[trained[-1]] > 0.5 else trained[-1]
    axis.set_xlim(left=-0.02 * (eps[shown] or 1), right=1.02 * (eps[shown] or 1))
    axis.set_ylim(top=1.02)
    axis.set_xlabel("eps, l2 on pixels in [0, 1]" if curve["norm"] == "l2" else "eps, l-infinity, in units of 1/255")
    axis.set_ylabel("success of the discriminator")
    axis.legend(frameon=False)
    write_png(figure, path)
