"""``synthfast score arc``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from synthfast.cli.options import config_options
from synthfast.cli.progress import Bar
from synthfast.cli.results import give

from synthfast.config import ArcConfig


@click.command()
@config_options(ArcConfig)
def arc(config: ArcConfig) -> None:
    """How far synthetic images are from real ones: the area under a robust discriminator's success curve (ARC).

    0 where the two cannot be told apart. In l2 ARC is in units of pixels in [0, 1], in linf in units of 1/255. Interrupted, the
    same command with --out goes on where it stopped.
    """
    from synthfast.distributed import Ranks
    from synthfast.evaluation.progress import remove_progress
    from synthfast.scoring.arc import Progress, arc_result, progress_folder

    with Ranks(config.device) as ranks, Bar("arc") as bar:

        def show(progress: Progress) -> None:
            bar.update(progress.done, progress.total, progress.doing)

        result = arc_result(config, ranks, show)
    # The result first, so that no picture can lose it.
    give(result, config.out, config.json, _lines(result))
    for line in _picture(config, result):
        click.echo(line, err=config.json)
    if (folder := progress_folder(config)) is not None:
        remove_progress(folder)


def _lines(result: dict[str, Any]) -> list[str]:
    metrics, curve = result["metrics"], result["curves"]["arc"]
    unit = "l2, pixels in [0, 1]" if curve["norm"] == "l2" else "l-infinity, units of 1/255"
    lines = []
    if metrics["arc"]["value"] is None:
        lines.append("arc: none")
    else:
        count = f"on {metrics['arc']['count']:,} held-out images, {unit}"
        lines.append(f"arc {_value(metrics['arc'])} {count}")
        lines.append(f"arc normalized {_value(metrics['arc_normalized'])} up to eps {curve['last']:.4g}")
    for k, eps in enumerate(curve["eps"]):
        line = f"  eps {eps:<8.4g} success {curve['accuracy'][k]:.4f}"
        if not curve["trained"][k]:
            lines.append(f"{line}, not trained")
            continue
        if curve["ci"] is not None:
            low, high = curve["ci"][k]
            line += f" [{low:.4f}, {high:.4f}], fit {curve['isotonic'][k]:.4f}"
        steps, seconds = curve["steps"][k], curve["seconds"][k]
        lines.append(f"{line}, validation {curve['validation_accuracy'][k]:.4f}, {steps:,} steps, {seconds:.1f} s")
    for label, group in result.get("groups", {}).get("class", {}).items():
        lines.append(f"  class {label}: arc {_value(group['arc'])}")
    return lines + [f"warning: {line}" for line in result["warnings"]]


def _value(entry: dict[str, Any]) -> str:
    low, high = entry["ci"]
    return f"{entry['value']:.4f} [{low:.4f}, {high:.4f}]"


def _picture(config: ArcConfig, result: dict[str, Any]) -> list[str]:
    """Draw the curve where it is wanted, and say where it is."""
    from synthfast.errors import SynthfastError
    from synthfast.report.figures import arc_figure

    if config.figure is None and config.out is None:
        return []
    out = Path(config.out or "")
    path = config.figure or str(out.with_suffix(".png") if out.suffix == ".json" else f"{out}.png")
    try:
        arc_figure(result["curves"]["arc"], result["metrics"], path)
    except SynthfastError as error:
        if config.figure is not None:
            raise
        return [f"no picture: {error}"]
    return [f"{path}: the curve"]
