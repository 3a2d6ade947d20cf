"""Entry point: finds the command, turns errors into one line and an exit status.

Exit status: 0 done, 1 failed at run time, 2 wrong usage, 130 interrupted. Commands are imported when they are called, so
that ``--help`` needs no torch.
"""

from __future__ import annotations

import os
import sys

import click
from synthfast.cli.lazy import LazyGroup

from synthfast import __version__
from synthfast.errors import SynthfastError

# What torch's RuntimeErrors say when an allocation fails.
_OUT_OF_MEMORY = {"can't allocate memory": "memory", "out of memory": "GPU memory"}


@click.group(
    cls=LazyGroup,
    lazy={
        "sample": ("synthfast.cli.sample", "sample", "Sample images from a generator into a shard folder."),
        "train": ("synthfast.cli.train", "train", "Train a generator or a classifier."),
        "score": ("synthfast.cli.score", "score", "Score a classifier or a set of images."),
        "inflection": (
            "synthfast.cli.inflection",
            "inflection",
            "Train with and without synthetic images and compare.",
        ),
        "select": ("synthfast.cli.select", "select", "Choose images by the scores of score samples."),
        "rank": ("synthfast.cli.rank", "rank", "Compare generators, and the scores that rank them."),
        "report": ("synthfast.cli.report", "report", "Results as one HTML file."),
        "shards": (
            "synthfast.cli.shards",
            "shards",
            "Look into shard folders, verify them, move images between formats.",
        ),
        "info": ("synthfast.cli.info", "info", "Show versions, device and what was built."),
    },
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=False,
)
@click.version_option(__version__, prog_name="synthfast")
@click.option("--debug", is_flag=True, help="Show a traceback on errors.")
def cli(debug: bool) -> None:
    """Train on synthetic images: sample from diffusion models, train classifiers on real plus synthetic data, score both."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit."""
    # Read by torch when it first allocates: tensors above 32 MB, mapped afresh each time, get large pages (1.2 to 1.4 times as
    # fast convolutions in wide layers on a CPU).
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    arguments = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    debug = "--debug" in arguments
    if debug and arguments[0] != "--debug":  # accepted anywhere
        arguments = ["--debug", *(word for word in arguments if word != "--debug")]
    try:
        status = cli.main(arguments, prog_name="synthfast", standalone_mode=False)
        sys.exit(status if isinstance(status, int) else 0)
    except SynthfastError as error:
        if debug:
            raise
        _fail(str(error), error.exit_status)
    except click.UsageError as error:
        context = f" (see: {error.ctx.command_path} --help)" if error.ctx is not None else ""
        _fail(error.format_message() + context, 2)
    except click.ClickException as error:
        _fail(error.format_message(), error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        _fail("interrupted; run the same command again to go on", 130)
    except OSError as error:
        if debug:
            raise
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"{where}{error.strerror or error}", 1)
    except MemoryError:
        if debug:
            raise
        _fail("out of memory; lower --batch-size", 1)
    except RuntimeError as error:
        kind = next((kind for words, kind in _OUT_OF_MEMORY.items() if words in str(error)), None)
        if debug or kind is None:
            raise
        _fail(f"out of {kind}; lower --batch-size", 1)


def _fail(message: str, status: int) -> None:
    rank = os.environ.get("RANK", "0")
    who = "synthfast" if rank == "0" else f"synthfast (rank {rank})"
    click.echo(f"{who}: " + " ".join(message.split()), err=True)
    sys.exit(status)


if __name__ == "__main__":
    main()
