"""``synthfast score accuracy`` and ``synthfast score robust``."""

from __future__ import annotations

import click
from synthfast.cli.options import config_options
from synthfast.cli.progress import Bar
from synthfast.cli.results import give, metric_line

from synthfast.config import AccuracyConfig, RobustConfig


@click.command()
@config_options(AccuracyConfig)
def accuracy(config: AccuracyConfig) -> None:
    """Accuracy on labelled images, with its 95% interval, overall and per class."""
    from synthfast.distributed import Ranks
    from synthfast.evaluation.score import score_accuracy

    with Ranks(config.device) as ranks:
        result = score_accuracy(config, ranks)
        if ranks.is_first:
            give(result, config.out, config.json, [metric_line(result, "accuracy", f" of {config.dataset}")])


@click.command()
@config_options(RobustConfig)
def robust(config: RobustConfig) -> None:
    """Accuracy under attack: images that are right and that no attack changes, with 95% intervals.

    --attack autoattack is the standard version of AutoAttack (Croce and Hein 2020). Interrupted, the same command with --out
    goes on where it stopped. Several GPUs share the images under torchrun, with the same result.
    """
    from synthfast.distributed import Ranks
    from synthfast.evaluation.progress import remove_progress
    from synthfast.evaluation.robust import Progress
    from synthfast.evaluation.score import progress_folder, score_robust

    with Ranks(config.device) as ranks, Bar("attacking") as bar:

        def show(progress: Progress) -> None:
            text = f"{progress.attack}, {progress.standing:,} stand"
            bar.update(progress.done, progress.total, text)

        result = score_robust(config, ranks, show)
    if ranks.is_first:
        under = f" of {config.dataset} under {config.attack}, {config.norm} eps {result['config']['eps']:.4g}"
        lines = [metric_line(result, "accuracy", ""), metric_line(result, "robust_accuracy", under)]
        if len(result["attacks"]) > 1:
            lines += [
                f"  after {name}: {entry['robust_accuracy']['value']:.4f} ({entry['broken']:,} broken)"
                for name, entry in result["attacks"].items()
            ]
        lines += [f"warning: {line}" for line in result["warnings"]]
        give(result, config.out, config.json, lines)
        if (folder := progress_folder(config)) is not None:
            remove_progress(folder)
