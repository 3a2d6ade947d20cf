"""Images in: data sets under one name each (``open_images``). Images out: shard folders (``ShardFolder``).

From the bottom up; each part imports only those above it in this list:

    images, joined, machine, grids    what every source of images looks like; several as one; contact sheets
    formats     bytes: npy, png, jpg, tars and their index
    selection   index lists of chosen images
    storage     folders here and at URLs
    shards      shard folders: manifest, writing, reading, verifying
    sources     ``digits``, ``cifar10:test``, ``folder:DIR``, ``npz:FILE``, tars, shard folders
    transfer    ``synthfast shards import|export|merge|split|stats``
    loaders     batches for training and scoring: resident arrays, DALI, DataLoader
"""

from synthfast.data.images import ArrayImages, Chosen, ImageSet
from synthfast.data.shards.folder import ShardFolder
from synthfast.data.shards.shard_set import ShardSet, summary, verify
from synthfast.data.shards.writer import ShardWriter
from synthfast.data.sources.names import open_images

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
