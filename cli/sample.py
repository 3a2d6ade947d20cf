"""``synthfast sample``."""

from __future__ import annotations

import click
from synthfast.cli.options import config_options
from synthfast.cli.progress import Bar, duration

from synthfast.config import SampleConfig


@click.command()
@config_options(SampleConfig)
def sample(config: SampleConfig) -> None:
    """Sample images from a generator into a shard folder.

    Offline and without options it samples handwritten digits. Interrupted at any moment, the same command goes on where it
    stopped. Several GPUs or machines share the work under torchrun: torchrun --nproc-per-node 8 -m synthfast sample -n ...
    """
    from synthfast.distributed import Ranks
    from synthfast.sampling.generate import Progress, generate

    with Ranks(config.device) as ranks, Bar("sampling") as bar:

        def show(progress: Progress) -> None:
            text = f"{progress.images_per_second:,.0f} images/s, {duration(progress.seconds_left)} left"
            bar.update(progress.done, progress.total, text)

        result = generate(config, ranks, show)
    if not ranks.is_first:
        return
    if result.made:
        rate = f" in {result.seconds:,.1f} s, {result.made / result.seconds:,.0f} images/s"
        kept = f" ({result.kept:,} were there already)" if result.kept else ""
        click.echo(f"{result.path}: {result.made:,} images{kept}{rate}")
    else:
        click.echo(f"{result.path}: all {result.kept:,} images are there already")
    click.echo(f"{result.preview}: the first of them")
