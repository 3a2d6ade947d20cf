"""``synthfast train generator`` and ``synthfast train classifier``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
from synthfast.cli.options import config_options
from synthfast.cli.progress import Bar, duration

from synthfast.config import ClassifierConfig, GeneratorConfig

if TYPE_CHECKING:
    from synthfast.training.generator import Progress


@click.group(no_args_is_help=False)
def train() -> None:
    """Train a generator or a classifier."""


def _show(bar: Bar, progress: Progress) -> None:
    left = (progress.steps - progress.step) * _seconds_per_step(progress)
    text = f"loss {progress.loss:.4f}, {progress.images_per_second:,.0f} images/s, {duration(left)} left"
    bar.update(progress.step, progress.steps, text)


def _seconds_per_step(progress: Progress) -> float:
    return progress.images_per_step / progress.images_per_second


@train.command()
@config_options(GeneratorConfig)
def generator(config: GeneratorConfig) -> None:
    """Train a diffusion model on a data set.

    Leaves a checkpoint folder for `synthfast sample --generator DIR`, with a picture of samples at each checkpoint.
    Interrupted, the same command goes on exactly from the last checkpoint; with more --steps it trains on.
    """
    from synthfast.distributed import Ranks
    from synthfast.training.generator import train_generator

    with Ranks(config.device) as ranks, Bar("training") as bar:
        result = train_generator(config, ranks, lambda progress: _show(bar, progress))
    if ranks.is_first:
        if result.made == 0:
            click.echo(f"{config.out}: all {result.steps:,} steps are done already")
        else:
            click.echo(f"{config.out}: {result.steps:,} steps, last loss {result.loss:.4f}")
        click.echo(f"{result.picture}: samples")


@train.command()
@config_options(ClassifierConfig)
def classifier(config: ClassifierConfig) -> None:
    """Train a classifier on real images, synthetic ones, or a mix of both.

    `--synthetic DIR --fraction 1` trains on synthetic images alone; without --synthetic all are real.
    """
    from synthfast.training.classifier import train_classifier

    with Bar("training") as bar:
        result = train_classifier(config, lambda progress: _show(bar, progress))
    click.echo(f"{config.out}: {result.steps:,} steps, last loss {result.loss:.4f}")
