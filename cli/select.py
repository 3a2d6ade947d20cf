"""``synthfast select``."""

from __future__ import annotations

from typing import Any

import click
from synthfast.cli.options import config_options

from synthfast.config import SelectConfig


@click.command()
@config_options(SelectConfig)
def select(config: SelectConfig) -> None:
    """Choose images of a shard folder by the scores that `synthfast score samples` left.

    Writes a list of their numbers and, with --low-density, weights to draw them by; no image is copied. `synthfast train
    classifier --synthetic DIR --selection FILE` trains on them.
    """
    from synthfast.artifacts import json_bytes
    from synthfast.selection.choose import select as choose

    manifest = choose(config)
    if config.json:
        click.echo(json_bytes(manifest).decode(), nl=False)
        return
    for line in _lines(config.out, manifest):
        click.echo(line)


def _lines(out: str, manifest: dict[str, Any]) -> list[str]:
    criteria, count, total = manifest["criteria"], manifest["count"], manifest["source"]["count"]
    of_each = ""
    if criteria["balanced"]:
        of_each = f", {max(manifest['images_per_class']):,} of each class"
    lines = [f"{out}: {count:,} of {total:,} images{of_each}, by {' and '.join(criteria['by'])}"]
    if count < criteria["wanted"]:
        lines.append(
            f"fewer than the {criteria['wanted']:,} wanted: {criteria['left']:,} images were left to choose from"
        )
    if manifest["weights"] is not None:
        lines.append(f"{manifest['weights']['file']}: weights to draw them by, larger where real images are sparse")
    return lines
