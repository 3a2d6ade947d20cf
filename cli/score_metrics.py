"""``synthfast score fid`` and ``synthfast score prdc``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
from synthfast.cli.options import config_options
from synthfast.cli.progress import Bar
from synthfast.cli.results import aligned, give

from synthfast.config import FidConfig, PrdcConfig

if TYPE_CHECKING:
    from synthfast.scoring.metrics import Progress


@click.command()
@config_options(FidConfig)
def fid(config: FidConfig) -> None:
    """FID and KID: how far the features of synthetic images are from those of real ones, with 95% intervals.

    fid is larger for fewer images: compare it at equal numbers. fid infinity is its limit for ever more images, and kid does not
    depend on their number. Several GPUs share the images under torchrun, with the same result.
    """
    from synthfast.distributed import Ranks
    from synthfast.scoring.metrics import fid_result

    with Ranks(config.device) as ranks, Bar("features") as bar:
        result = fid_result(config, ranks, lambda progress: _show(bar, progress))
    if ranks.is_first:
        give(result, config.out, config.json, _lines(result, config, {"fid": 4, "fid_infinity": 4, "kid": 6}))
        if config.save_stats is not None and not config.json:
            click.echo(f"{config.save_stats}: statistics of {config.real}, for --real stats:{config.save_stats}")


@click.command()
@config_options(PrdcConfig)
def prdc(config: PrdcConfig) -> None:
    """Precision, recall, density and coverage of synthetic images, with 95% intervals.

    Precision and density: do they look real? Recall and coverage: do they show all that real images do? Several GPUs share the
    features under torchrun, with the same result.
    """
    from synthfast.distributed import Ranks
    from synthfast.scoring.metrics import prdc_result

    with Ranks(config.device) as ranks, Bar("features") as bar:
        result = prdc_result(config, ranks, lambda progress: _show(bar, progress))
    if ranks.is_first:
        digits = dict.fromkeys(("precision", "recall", "density", "coverage"), 4)
        give(result, config.out, config.json, _lines(result, config, digits))


def _show(bar: Bar, progress: Progress) -> None:
    bar.update(progress.done, progress.total, "images")


def _lines(result: dict[str, Any], config: FidConfig | PrdcConfig, digits: dict[str, int]) -> list[str]:
    metrics = result["metrics"]
    lines = [
        f"{name.replace('_', ' ')} {_text(metrics[name], places)}"
        for name, places in {**digits, "kid_subsets": 6}.items()
        if name in metrics
    ]
    synthetic, real = (result["inputs"][kind] for kind in ("synthetic", "real"))
    lines[0] += f" of {_set(synthetic, config.n)} against {_set(real, config.n)}, features {result['features']['name']}"
    if "groups" in result:
        rows = [["class", *(name.replace("_", " ") for name in digits)]]
        rows += [
            [name, *(_text(group[metric], places) for metric, places in digits.items())]
            for name, group in result["groups"]["class"].items()
        ]
        lines += ["", *aligned(rows)]
    return lines + [f"warning: {line}" for line in result["warnings"]]


def _set(entry: dict[str, Any], n: int | None) -> str:
    if entry["count"] is None:
        return entry["path"]
    return f"{min(entry['count'], n or entry['count']):,} images of {entry['path']}"


def _text(entry: dict[str, Any], places: int) -> str:
    if entry["value"] is None:
        return "-"
    text = f"{entry['value']:.{places}f}"
    if entry["ci"] is not None:
        low, high = entry["ci"]
        text += f" [{low:.{places}f}, {high:.{places}f}]"
    return text
