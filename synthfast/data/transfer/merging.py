"""``synthfast shards merge``: several shard folders into one."""

from __future__ import annotations

from typing import Any

from synthfast.config import MergeConfig
from synthfast.data.joined import Joined
from synthfast.data.shards.shard_set import ShardSet
from synthfast.data.transfer.copying import Copied, Report, copy_to_shards, layout_of, shard_request
from synthfast.errors import UsageError

_OPTIONS = {
    "n": "DIR ... (their images)",
    "shape": "DIR ... (their image shape)",
    "classes": "DIR ... (their classes)",
    "shard_size": "--shard-size",
    "format": "--format",
    "codec": "--codec",
    "quality": "--quality",
    "parts": "DIR ...",
    "synthfast": "the version of synthfast",
}


def merge(config: MergeConfig, report: Report | None = None) -> Copied:
    """Write the images of all parts, in order, into the shard folder ``config.out``, or complete what an earlier run began.

    The manifest's request records each part's path, fingerprint, number of images and request.

    Raises:
        UsageError: parts of other shapes, classes or (without ``config.format``) formats, or a folder made from other parts.
        SynthfastError: a damaged part, or a disk at fault.
    """
    parts = [ShardSet(path) for path in config.parts]
    images = Joined(" + ".join(config.parts), parts)
    layouts = [layout_of(part, config.format, config.shard_size, config.codec, config.quality) for part in parts]
    for path, layout in zip(config.parts, layouts, strict=True):
        if (layout.format, layout.codec, layout.quality) != (layouts[0].format, layouts[0].codec, layouts[0].quality):
            raise UsageError(
                f"{path}: is stored in another way than {config.parts[0]}; say with --format how to store both"
            )
    origin = {"parts": [_part(part) for part in parts], **({"lossy": True} if images.lossy else {})}
    request = shard_request(images, layouts[0], origin)
    return copy_to_shards(images, str(config.out), request, options=_OPTIONS, report=report)


def _part(part: ShardSet) -> dict[str, Any]:
    facts = {"name": part.name, "fingerprint": part.fingerprint(), "n": len(part)}
    return {**facts, "original": part.manifest.request.values}
