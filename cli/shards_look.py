"""``synthfast shards ls`` and ``synthfast shards verify``."""

from __future__ import annotations

import sys

import click
from synthfast.cli.progress import Bar

_MOST_CLASSES = 100  # that a line names one by one


@click.command()
@click.argument("folder", metavar="DIR")
@click.option("--json", "as_json", is_flag=True, help="Print the facts as JSON.")
def ls(folder: str, as_json: bool) -> None:
    """What a shard folder holds: images, classes, generator, solver, seed, size on disk."""
    from synthfast.artifacts import json_bytes
    from synthfast.data import summary

    facts = summary(folder)
    if as_json:
        click.echo(json_bytes(facts).decode(), nl=False)
        return
    for name, value in _lines(facts):
        click.echo(f"{name:<18} {value}")


def _lines(facts: dict) -> list[tuple[str, str]]:
    request = facts["request"]
    state = "complete" if facts["complete"] else "incomplete; run the command that made it again to complete it"
    rows = [
        ("state", state),
        ("images", f"{facts['images']:,} of {facts['n']:,}"),
        ("image shape", "x".join(map(str, facts["shape"]))),
        ("shards", f"{facts['shards_finished']:,} of {facts['shards']:,}"),
        ("bytes", f"{facts['bytes']:,}"),
    ]
    if facts["images_per_class"] is not None:
        rows.append(("images per class", per_class(facts["images_per_class"])))
    known = {"n", "shape", "classes", "shard_size"}
    for key, value in request.items():
        if key not in known and value is not None:
            rows.append((key.replace("_", " "), _words(value)))
    return rows


def per_class(counts: list[int]) -> str:
    """Images of each class in a line; of many classes the fewest and the most."""
    if len(counts) <= _MOST_CLASSES:
        return ", ".join(f"{k}: {n:,}" for k, n in enumerate(counts))
    return f"{min(counts):,} to {max(counts):,} in each of {len(counts):,}"


def _words(value: object) -> str:
    if isinstance(value, dict):
        plain = {key: item for key, item in value.items() if item is not None and not isinstance(item, (dict, list))}
        return ", ".join(f"{key} {item}" for key, item in plain.items())
    if isinstance(value, list):
        return "; ".join(_words(item) for item in value)
    return str(value)


@click.command()
@click.argument("folder", metavar="DIR")
def verify(folder: str) -> None:
    """Read a shard folder whole and compare it with its manifest; exit status 1 if anything is wrong."""
    from synthfast.data import summary
    from synthfast.data import verify as check

    with Bar("verifying") as bar:
        problems = check(folder, lambda done, total: bar.update(done, total, "bytes"))
    if problems:
        for problem in problems:
            click.echo(problem, err=True)
        sys.exit(1)
    facts = summary(folder)
    shards = "1 shard" if facts["shards"] == 1 else f"{facts['shards']:,} shards"
    click.echo(f"{folder}: {facts['images']:,} images in {shards}, all as the manifest says")
