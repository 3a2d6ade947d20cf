"""Options of the commands that move images between formats: ``synthfast shards export|import|merge|split|stats``."""

from __future__ import annotations

import math
from dataclasses import dataclass

from synthfast.config.fields import option, require, require_seed
from synthfast.errors import UsageError

SHARD_FORMATS = ("npy", "wds")
EXPORT_FORMATS = (*SHARD_FORMATS, "npz", "folder", "cifar")
CODECS = ("png", "jpg")

_SHARD_SIZE = "Images in a shard, the unit of work that an interruption can lose."
_CODEC = "wds: how images are stored, png if not given; jpg is smaller and changes the pixels."
_QUALITY = "jpg: quality from 1 to 100, 95 if not given."
_DATA_DIR = "Where data sets lie."


@dataclass(frozen=True)
class ExportConfig:
    """``synthfast shards export``: images into another format."""

    source: tuple[str, ...] = option((), "Shard folder, or another source of images.", metavar="DIR", positional=True)
    to: str | None = option(
        None,
        "npy or wds (shards), npz (one file with image and label), folder (png files, a subfolder a class), or cifar "
        "(CIFAR's binary version).",
        choices=EXPORT_FORMATS,
    )
    out: str | None = option(None, "Folder for the result; for npz the file.", metavar="PATH")
    selection: str | None = option(
        None, "Only the images of this selection (see synthfast select), without its weights.", metavar="FILE"
    )
    shard_size: int = option(10_000, f"npy, wds: {_SHARD_SIZE[0].lower()}{_SHARD_SIZE[1:]}")
    codec: str | None = option(None, _CODEC, choices=CODECS)
    quality: int | None = option(None, _QUALITY)
    compress: bool = option(False, "npz: deflate it, which makes it smaller, slower, and unfit to be memory-mapped.")
    data_dir: str = option("data", _DATA_DIR, metavar="DIR")

    def __post_init__(self) -> None:
        _require_one(self.source, "expected one shard folder")
        if self.to is None:
            raise UsageError(f"--to: expected one of {', '.join(EXPORT_FORMATS)}, found none; give one")
        _require_out(self.out)
        require(self.shard_size >= 1, "--shard-size", self.shard_size, "a whole number of at least 1")
        _require_layout("--to", self.to, self.codec, self.quality)
        if self.compress and self.to != "npz":
            raise UsageError(f"--compress: only npz files can be deflated, --to is {self.to}; leave it out")
        if self.to == "npz" and not str(self.out).endswith(".npz"):
            raise UsageError(f"--out {self.out}: expected a name like images.npz for --to npz; change it")


@dataclass(frozen=True)
class ImportConfig:
    """``synthfast shards import``: images from elsewhere into shards."""

    source: tuple[str, ...] = option(
        (),
        "digits, mnist, cifar10, cifar100, celeba, imagenet, folder:DIR, npz:FILE, cifar-binary:PATH, wds:PATH (a "
        "WebDataset tar, a folder of them or a pattern such as 'wds:train-*.tar'), or a shard folder.",
        metavar="SOURCE",
        positional=True,
    )
    out: str | None = option(None, "Folder for the shards.", metavar="DIR")
    format: str = option("npy", "Format of the shards.", choices=SHARD_FORMATS)
    shard_size: int = option(10_000, _SHARD_SIZE)
    codec: str | None = option(None, _CODEC, choices=CODECS)
    quality: int | None = option(None, _QUALITY)
    classes: int | None = option(
        None, "Number of classes, where the last ones may have no image; one more than the highest label if not given."
    )
    image_size: int | None = option(
        None, "Side of the square that celeba, imagenet, folders and WebDataset tars are resized to."
    )
    data_dir: str = option("data", _DATA_DIR, metavar="DIR")
    download: bool = option(False, "Fetch a missing data set.")

    def __post_init__(self) -> None:
        _require_one(self.source, "expected one source of images")
        _require_out(self.out)
        require(self.shard_size >= 1, "--shard-size", self.shard_size, "a whole number of at least 1")
        require(self.classes is None or self.classes >= 1, "--classes", self.classes, "a whole number of at least 1")
        require(self.image_size is None or self.image_size >= 1, "--image-size", self.image_size, "at least 1")
        _require_layout("--format", self.format, self.codec, self.quality)


@dataclass(frozen=True)
class MergeConfig:
    """``synthfast shards merge``: several shard folders into one."""

    parts: tuple[str, ...] = option((), "Shard folders, in the order of the result.", metavar="DIR", positional=True)
    out: str | None = option(None, "Folder for the result.", metavar="DIR")
    format: str | None = option(None, "Format of the result; that of the parts if not given.", choices=SHARD_FORMATS)
    shard_size: int | None = option(None, f"{_SHARD_SIZE} That of the first part if not given.")
    codec: str | None = option(None, _CODEC, choices=CODECS)
    quality: int | None = option(None, _QUALITY)

    def __post_init__(self) -> None:
        if len(self.parts) < 2:
            raise UsageError(f"expected two shard folders or more, found {len(self.parts)}; name them")
        _require_out(self.out)
        require(self.shard_size is None or self.shard_size >= 1, "--shard-size", self.shard_size, "at least 1")
        _require_layout("--format", self.format, self.codec, self.quality)


@dataclass(frozen=True)
class SplitConfig:
    """``synthfast shards split``: a shard folder into several."""

    source: tuple[str, ...] = option((), "Shard folder.", metavar="DIR", positional=True)
    parts: int | None = option(None, "So many parts of the same size, or one image more.")
    sizes: str | None = option(
        None, "Sizes of the parts: images such as 45000,5000, or shares of all such as 0.9,0.1.", metavar="LIST"
    )
    out: str | None = option(None, "The parts' folders are PREFIX-0, PREFIX-1 and so on.", metavar="PREFIX")
    shuffle: bool = option(False, "Draw the images of each part at random, instead of the first, the next ones ...")
    seed: int = option(0, "The order of --shuffle depends on it.")
    balanced: bool = option(False, "Give each part its share of every class.")
    format: str | None = option(None, "Format of the parts; that of the folder if not given.", choices=SHARD_FORMATS)
    shard_size: int | None = option(None, f"{_SHARD_SIZE} As in the folder if not given.")
    codec: str | None = option(None, _CODEC, choices=CODECS)
    quality: int | None = option(None, _QUALITY)

    def __post_init__(self) -> None:
        _require_one(self.source, "expected one shard folder")
        _require_out(self.out)
        if (self.parts is None) == (self.sizes is None):
            found = "none" if self.parts is None else "both"
            raise UsageError(f"--parts, --sizes: expected one of the two, found {found}; give one")
        require(self.parts is None or self.parts >= 1, "--parts", self.parts, "a whole number of at least 1")
        require(self.shard_size is None or self.shard_size >= 1, "--shard-size", self.shard_size, "at least 1")
        require_seed(self.seed)
        _require_layout("--format", self.format, self.codec, self.quality)
        if self.sizes is not None:
            _check_sizes(self.sizes, self.given_sizes)

    @property
    def given_sizes(self) -> list[int] | list[float]:
        """``sizes`` as numbers: whole ones are images, others shares."""
        words = [word.strip() for word in str(self.sizes).split(",")]
        if all(word.isascii() and word.isdecimal() and len(word) < 19 for word in words):
            return [int(word) for word in words]
        return [_share(word) for word in words]


@dataclass(frozen=True)
class StatsConfig:
    """``synthfast shards stats``: what the images of a shard folder are like."""

    source: tuple[str, ...] = option((), "Shard folder.", metavar="DIR", positional=True)
    json: bool = option(False, "Print the facts as JSON.")

    def __post_init__(self) -> None:
        _require_one(self.source, "expected one shard folder")


def _require_one(given: tuple[str, ...], expected: str) -> None:
    if len(given) != 1:
        raise UsageError(f"{expected}, found {len(given) or 'none'}; name one")


def _require_out(out: str | None) -> None:
    if not out:
        raise UsageError("--out: expected where to write to, found none; give it")


def _require_layout(option_name: str, layout: str | None, codec: str | None, quality: int | None) -> None:
    """Codec and quality belong to wds; ``layout`` None is not known yet."""
    if codec is not None and layout not in (None, "wds"):
        raise UsageError(f"--codec {codec}: {option_name} {layout} has no codec; leave it out, or take wds")
    if quality is not None and codec != "jpg":
        raise UsageError(f"--quality {quality}: only jpg has a quality; give --codec jpg with it")
    require(quality is None or 1 <= quality <= 100, "--quality", quality, "a whole number from 1 to 100")


def _share(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        return math.nan


def _check_sizes(text: str, sizes: list[int] | list[float]) -> None:
    require(all(size > 0 for size in sizes), "--sizes", text, "numbers of images such as 45000,5000, or shares of all")
    if isinstance(sizes[0], float) and abs(sum(sizes) - 1) > 1e-9:
        raise UsageError(f"--sizes {text}: add up to {sum(sizes):g}, expected shares that add up to 1")
