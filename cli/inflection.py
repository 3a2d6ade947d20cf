"""``synthfast inflection``."""

from __future__ import annotations

from pathlib import Path

import click
from synthfast.cli.options import config_options
from synthfast.cli.progress import Bar
from synthfast.cli.results import aligned

from synthfast.config import InflectionConfig


@click.command()
@config_options(InflectionConfig)
def inflection(config: InflectionConfig) -> None:
    """Do a generator's images help? Classifiers trained with and without them, over seeds, standard and robust.

    Trains on real images alone and on real plus synthetic ones with equal steps, measures both on test images, clean and under
    attack, and gives the gains with 95% intervals, as a table, a picture and a result file. Interrupted, the same command
    goes on.
    """
    from synthfast.artifacts import atomic_write_json, json_bytes
    from synthfast.distributed import Ranks
    from synthfast.errors import SynthfastError
    from synthfast.evaluation.inflection import Progress, inflection_result, table, verdict
    from synthfast.report.figures import inflection_figure

    with Ranks(config.device) as ranks, Bar("inflection") as bar:

        def show(progress: Progress) -> None:
            bar.update(progress.number, progress.total, f"{progress.run.name}, {progress.doing}")

        result = inflection_result(config, ranks, show)
    if not ranks.is_first:
        return
    out = Path(config.out)
    atomic_write_json(out / "result.json", result)
    try:
        inflection_figure(result["curves"], out / "gains.png")
        picture = f"{out / 'gains.png'}: the gains"
    except SynthfastError as error:
        picture = f"no picture: {error}"
    if config.json:
        click.echo(json_bytes(result).decode(), nl=False)
        return
    for line in aligned(table(result["curves"])):
        click.echo(line)
    click.echo()
    for line in verdict(result["curves"]):
        click.echo(line)
    click.echo(f"{out / 'result.json'}: the result")
    click.echo(picture)
