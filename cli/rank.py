"""``synthfast rank``."""

from __future__ import annotations

from pathlib import Path

import click
from synthfast.cli.options import config_options
from synthfast.cli.progress import Bar
from synthfast.cli.results import aligned

from synthfast.config import RankConfig


@click.command()
@config_options(RankConfig)
def rank(config: RankConfig) -> None:
    """Which generator makes the best training data, and which score tells so?

    For each generator: ARC, FID, KID, precision, recall, density and coverage of its images, and the accuracy, clean and under
    attack, of classifiers trained on them alone. Then the rank correlation of every score with that robust accuracy, with
    intervals. Interrupted, the same command goes on.
    """
    from synthfast.artifacts import atomic_write_json, json_bytes
    from synthfast.distributed import Ranks
    from synthfast.errors import SynthfastError
    from synthfast.report.figures import rank_figure
    from synthfast.scoring.rank import Progress, rank_result, table, verdict

    with Ranks(config.device) as ranks, Bar("rank") as bar:

        def show(progress: Progress) -> None:
            bar.update(progress.number, progress.total, f"{progress.name}, {progress.doing}")

        result = rank_result(config, ranks, show)
    if not ranks.is_first:
        return
    out = Path(config.out)
    atomic_write_json(out / "result.json", result)
    try:
        rank_figure(result["generators"], result["correlations"], out / "rank.png")
        picture = f"{out / 'rank.png'}: scores against robust accuracy"
    except SynthfastError as error:
        picture = f"no picture: {error}"
    if config.json:
        click.echo(json_bytes(result).decode(), nl=False)
        return
    for line in aligned(table(result)):
        click.echo(line)
    click.echo()
    for line in verdict(result):
        click.echo(line)
    click.echo(f"{out / 'result.json'}: the result")
    click.echo(picture)
