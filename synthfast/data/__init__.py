"""Images in: data sets under one name each (``open_images``). Images out: shard folders (``ShardFolder``)."""

from synthfast.data.images import ArrayImages, Chosen, ImageSet
from synthfast.data.shard_set import ShardSet, summary, verify
from synthfast.data.shard_writer import ShardWriter
from synthfast.data.shards import ShardFolder
from synthfast.data.sources import open_images

__all__ = [
    "ArrayImages",
    "Chosen",
    "ImageSet",
    "ShardFolder",
    "ShardSet",
    "ShardWriter",
    "open_images",
    "summary",
    "verify",
]
