"""``synthfast shards export``, ``import``, ``merge`` and ``split``."""

from __future__ import annotations

from typing import Any

import click
from synthfast.cli.options import config_options
from synthfast.cli.progress import images_bar

from synthfast.config import ExportConfig, ImportConfig, MergeConfig, SplitConfig


@click.command()
@config_options(ExportConfig)
def export(config: ExportConfig) -> None:
    """Write the images of a shard folder, or of another source, in another format.

    Pixels and labels stay as they are, but with --codec jpg. Interrupted, the same command goes on where it stopped; an npz file
    starts over.
    """
    from synthfast.data.transfer.exporting import export_images

    with images_bar("exporting") as report:
        copied = export_images(config, report)
    click.echo(_line(copied))
    if copied.warning is not None:
        click.echo(f"warning: {copied.warning}")


@click.command("import")
@config_options(ImportConfig)
def import_(config: ImportConfig) -> None:
    """Write images from elsewhere into a shard folder.

    Pixels and labels stay as they are, but with --codec jpg or --image-size. Interrupted, the same command goes on where it
    stopped.
    """
    from synthfast.data.transfer.importing import import_images

    with images_bar("importing") as report:
        copied = import_images(config, report)
    click.echo(_line(copied))


@click.command()
@config_options(MergeConfig)
def merge(config: MergeConfig) -> None:
    """Write the images of several shard folders of one shape and the same classes into one, in the order given."""
    from synthfast.data.transfer.merging import merge as join

    with images_bar("merging") as report:
        copied = join(config, report)
    click.echo(_line(copied))


@click.command()
@config_options(SplitConfig)
def split(config: SplitConfig) -> None:
    """Write a shard folder as several, every image into one of them: the first ones, the next ones and so on."""
    from synthfast.data.transfer.splitting import split as cut

    with images_bar("splitting") as report:
        parts = cut(config, report)
    for copied in parts:
        click.echo(_line(copied))


def _line(copied: Any) -> str:
    if not copied.made:
        return f"{copied.path}: all {copied.kept:,} images are there already"
    kept = f" ({copied.kept:,} were there already)" if copied.kept else ""
    return f"{copied.path}: {copied.made:,} images{kept}"
