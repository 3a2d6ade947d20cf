"""``synthfast score``: accuracy, robust, arc, fid, prdc, samples."""

from __future__ import annotations

import click
from synthfast.cli.lazy import LazyGroup

_LAZY = {
    "accuracy": ("synthfast.cli.score_classifier", "accuracy", "Accuracy of a classifier on labelled images."),
    "robust": ("synthfast.cli.score_classifier", "robust", "Accuracy of a classifier under attack."),
    "arc": ("synthfast.cli.score_arc", "arc", "Area under a robust discriminator's success curve."),
    "fid": (
        "synthfast.cli.score_metrics",
        "fid",
        "Distance of the features of synthetic and real images: FID and KID.",
    ),
    "prdc": ("synthfast.cli.score_metrics", "prdc", "Precision, recall, density and coverage of synthetic images."),
    "samples": ("synthfast.cli.score_samples", "samples", "A score for each image of a shard folder, kept beside it."),
}


@click.group(cls=LazyGroup, lazy=_LAZY, no_args_is_help=False)
def score() -> None:
    """Score a classifier or a set of images."""
