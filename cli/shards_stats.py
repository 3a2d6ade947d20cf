"""``synthfast shards stats``."""

from __future__ import annotations

from typing import Any

import click
from synthfast.cli.options import config_options
from synthfast.cli.progress import images_bar
from synthfast.cli.shards_look import per_class

from synthfast.config import StatsConfig


@click.command()
@config_options(StatsConfig)
def stats(config: StatsConfig) -> None:
    """What the images of a shard folder are like: per class, mean, spread, duplicates, bytes."""
    from synthfast.artifacts import json_bytes
    from synthfast.data.transfer.statistics import statistics

    with images_bar("reading") as report:
        facts = statistics(config, report)
    if config.json:
        click.echo(json_bytes(facts).decode(), nl=False)
        return
    for name, value in _lines(facts):
        click.echo(f"{name:<18} {value}")


def _lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    n = facts["n"]
    rows = [("images", f"{n:,}"), ("image shape", "x".join(map(str, facts["shape"])))]
    if facts["images_per_class"] is not None:
        rows.append(("images per class", per_class(facts["images_per_class"])))
    return [
        *rows,
        ("bytes an image", f"{facts['bytes_per_image']:,.1f}"),
        ("mean", _numbers(facts["mean"])),
        ("std", _numbers(facts["std"])),
        ("min, max", f"{', '.join(map(str, facts['min']))}; {', '.join(map(str, facts['max']))}"),
        ("duplicates", f"{facts['duplicate_images']:,} ({facts['duplicates']:.2%})"),
        ("constant images", f"{facts['constant_images']:,}"),
    ]


def _numbers(values: list[float]) -> str:
    return ", ".join(f"{value:.4f}" for value in values)
