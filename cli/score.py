"""``synthfast score accuracy``."""

from __future__ import annotations

import time
from pathlib import Path

import click


@click.group(no_args_is_help=False)
def score() -> None:
    """Score a classifier or a set of images."""


@score.command()
@click.option("--classifier", required=True, metavar="DIR", help="Checkpoint folder of synthfast train classifier.")
@click.option("--dataset", default="digits:test", show_default=True, help="Labelled images, such as digits:test.")
@click.option("--data-dir", default="data", show_default=True, metavar="DIR", help="Where data sets lie.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--out", metavar="FILE", help="Write the result JSON here.")
@click.option("--json", "as_json", is_flag=True, help="Print the result JSON instead of a line.")
def accuracy(classifier: str, dataset: str, data_dir: str, device: str, out: str | None, as_json: bool) -> None:
    """Accuracy on labelled images, with its 95% interval, overall and per class."""
    from synthfast.artifacts import atomic_write_json, json_bytes
    from synthfast.data import open_images
    from synthfast.distributed import pick_device
    from synthfast.evaluation.accuracy import accuracy as measure
    from synthfast.evaluation.result import result_json

    start = time.perf_counter()
    images = open_images(dataset, data_dir=Path(data_dir))
    scores = measure(classifier, images, pick_device(device))
    result = result_json(
        "score accuracy",
        {"classifier": classifier, "dataset": dataset},
        {"classifier": Path(classifier) / "model.safetensors", "dataset": images},
        scores,
        time.perf_counter() - start,
    )
    if out is not None:
        atomic_write_json(out, result)
    if as_json:
        click.echo(json_bytes(result).decode(), nl=False)
    else:
        overall = scores["metrics"]["accuracy"]
        low, high = overall["ci"]
        click.echo(
            f"accuracy {overall['value']:.4f} [{low:.4f}, {high:.4f}] on {overall['count']:,} images of {dataset}"
        )
