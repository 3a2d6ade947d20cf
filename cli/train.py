"""``synthfast train generator`` and ``synthfast train classifier``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
from synthfast.cli.options import config_options
from synthfast.cli.progress import Bar, duration

from synthfast.config import ClassifierConfig, GeneratorConfig

if TYPE_CHECKING:
    from synthfast.training import Progress, Trained


@click.group(no_args_is_help=False)
def train() -> None:
    """Train a generator or a classifier."""


def _show(bar: Bar, progress: Progress) -> None:
    left = (progress.steps - progress.step) * _seconds_per_step(progress)
    text = f"loss {progress.loss:.4f}, "
    if progress.accuracy is not None:
        text += f"accuracy {progress.accuracy:.3f}, "
    if progress.robust_accuracy is not None:
        text += f"under attack {progress.robust_accuracy:.3f}, "
    text += f"{progress.images_per_second:,.0f} images/s, {duration(left)} left"
    bar.update(progress.step, progress.steps, text)


def _seconds_per_step(progress: Progress) -> float:
    return progress.images_per_step / progress.images_per_second


@train.command()
@config_options(GeneratorConfig)
def generator(config: GeneratorConfig) -> None:
    """Train a diffusion model or a GAN on a data set.

    Leaves a checkpoint folder for `synthfast sample --generator DIR`, with a picture of samples at each checkpoint.
    Interrupted, the same command goes on exactly from the last checkpoint; with more --steps it trains on.
    """
    from synthfast.distributed import Ranks
    from synthfast.training import train_generator

    with Ranks(config.device) as ranks, Bar("training") as bar:
        result = train_generator(config, ranks, lambda progress: _show(bar, progress))
    if ranks.is_first:
        click.echo(f"{config.out}: {_done(result)}")
        click.echo(f"{result.picture}: samples")


@train.command()
@config_options(ClassifierConfig)
def classifier(config: ClassifierConfig) -> None:
    """Train a classifier on real images, synthetic ones, or a mix of both.

    Standard training, or against an attack with --method pgd or trades. `--synthetic DIR --fraction 1` trains on synthetic images
    alone; without --synthetic all are real. Interrupted, the same command goes on exactly from the last checkpoint; a finished
    run is left alone. No test data are looked at: with --validation the best checkpoint on held-out training images is kept.
    """
    from synthfast.distributed import Ranks
    from synthfast.training import train_classifier

    with Ranks(config.device) as ranks, Bar("training") as bar:
        result = train_classifier(config, ranks, lambda progress: _show(bar, progress))
    if ranks.is_first:
        text = _done(result)
        if result.validation is not None:
            what = "accuracy" if config.method == "standard" else "robust accuracy"
            text += f"; kept step {result.best_step:,}, validation {what} {result.validation:.4f}"
        click.echo(f"{config.out}: {text}")


def _done(result: Trained) -> str:
    if result.made == 0:
        return f"all {result.steps:,} steps are done already"
    return f"{result.steps:,} steps, last loss {result.loss:.4f}, images by the {result.loader} loader"
