"""How commands hand over their results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click


def metric_line(result: dict[str, Any], metric: str, where: str) -> str:
    """A metric with its interval and the number of images, then ``where``."""
    value = result["metrics"][metric]
    low, high = value["ci"]
    return (
        f"{metric.replace('_', ' ')} {value['value']:.4f} [{low:.4f}, {high:.4f}] on {value['count']:,} images{where}"
    )


def give(result: dict[str, Any], out: str | None, as_json: bool, lines: list[str]) -> None:
    """Write the result file and print the result, as JSON or as lines."""
    from synthfast.artifacts import atomic_write_json, json_bytes, make_folder

    if out is not None:
        make_folder(Path(out).parent)
        atomic_write_json(out, result)
    if as_json:
        click.echo(json_bytes(result).decode(), nl=False)
    else:
        for line in lines:
            click.echo(line)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The rows of a table as lines, with columns of one width each."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
