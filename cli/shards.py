"""``synthfast shards``: the group."""

from __future__ import annotations

import click
from synthfast.cli.lazy import LazyGroup


@click.group(
    cls=LazyGroup,
    lazy={
        "ls": ("synthfast.cli.shards_look", "ls", "What a shard folder holds."),
        "verify": ("synthfast.cli.shards_look", "verify", "Compare a shard folder with its manifest."),
        "stats": ("synthfast.cli.shards_stats", "stats", "What the images of a shard folder are like."),
        "export": ("synthfast.cli.shards_transfer", "export", "Images into another format."),
        "import": ("synthfast.cli.shards_transfer", "import_", "Images from elsewhere into shards."),
        "merge": ("synthfast.cli.shards_transfer", "merge", "Several shard folders into one."),
        "split": ("synthfast.cli.shards_transfer", "split", "A shard folder into several."),
    },
    no_args_is_help=False,
)
def shards() -> None:
    """Look into shard folders, verify them, and move images between formats."""
