"""``synthfast score samples``."""

from __future__ import annotations

import click
from synthfast.cli.options import config_options
from synthfast.cli.progress import Bar
from synthfast.cli.results import aligned, give

from synthfast.config import SamplesConfig

_MOST_ROWS = 200


@click.command()
@config_options(SamplesConfig)
def samples(config: SamplesConfig) -> None:
    """Score each image of a shard folder: how real it looks, how dense real images are there, whether it is a copy.

    discriminator: margin by which a robust discriminator takes it for real, in the worst case around it. density: distance to the
    k-th nearest real image. confidence: a classifier's probability of its label. memorization: distance to the nearest training
    image, with a calibrated threshold. The scores lie beside the shards, for `synthfast select`; here are tables of them.
    Interrupted, the same command keeps the scores that are finished.
    """
    from synthfast.distributed import Ranks
    from synthfast.scoring.samples import Progress, samples_result, table

    with Ranks(config.device) as ranks, Bar("scoring") as bar:

        def show(progress: Progress) -> None:
            bar.update(progress.done, progress.total, f"{progress.score}, {progress.doing}")

        result = samples_result(config, ranks, show)
    if not ranks.is_first:
        return
    rows = table(result)
    lines = aligned(rows[:_MOST_ROWS])
    if len(rows) > _MOST_ROWS:
        lines.append(f"... and {len(rows) - _MOST_ROWS:,} groups more; --out FILE gives all")
    lines += [f"warning: {warning}" for warning in result["warnings"]]
    lines.append(f"{result['folder']}: the scores of each image")
    give(result, config.out, config.json, lines)
