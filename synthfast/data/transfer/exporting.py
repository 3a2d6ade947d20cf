"""``synthfast shards export``: images into shards of either format, npz files, folders of png files or CIFAR's binary version."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from synthfast import __version__
from synthfast.config import ExportConfig
from synthfast.data.images import Chosen, ImageSet
from synthfast.data.selection import read_selection
from synthfast.data.storage.places import is_url, place
from synthfast.data.transfer.copying import Copied, Layout, Report, copy_to_shards, origin_of, shard_request
from synthfast.data.transfer.export_folder import write_cifar, write_folder
from synthfast.data.transfer.importing import OPTIONS, open_in_order
from synthfast.data.transfer.npz_stream import write_npz
from synthfast.errors import UsageError

_OPTIONS = {**OPTIONS, "classes": "DIR (its classes)", "format": "--to", "to": "--to", "selection": "--selection"}
_OPTIONS |= {"compress": "--compress"}
# Shards keep the fact in their manifest; see origin_of.
_LOSSY = (
    "the images were stored as jpg or webp, and this copy does not tell: scores will compare it with lossless images all the "
    "same; --to npy or wds keeps the fact"
)


def export_images(config: ExportConfig, report: Report | None = None) -> Copied:
    """Write the images of ``config.source``, or those of a selection, in the format ``config.to``.

    Pixels and labels stay exactly as they are, but for the jpg codec. An interrupted run is completed by the same command, npz
    files from the start; the result is the same, byte for byte.

    Raises:
        UsageError: images that the format cannot hold, or an ``out`` that was made by another command.
        SynthfastError: damaged data, another process writing there, or a disk at fault.
    """
    source = config.source[0]
    images = open_in_order(source, config.data_dir)
    selection = None if config.selection is None else read_selection(config.selection, images)
    origin = origin_of(images, source, selection)
    if selection is not None:
        images = Chosen(images, selection.indices)
    if config.to in ("npy", "wds"):
        layout = Layout(config.shard_size, config.to, config.codec, config.quality)
        request = shard_request(images, layout, origin)
        return copy_to_shards(images, str(config.out), request, options=_OPTIONS, report=report)
    if is_url(str(config.out)):
        raise UsageError(
            f"--out {config.out}: only shards are written to URLs; export to a local path and copy it there"
        )
    record = _record(images, config, origin)
    tell = report or (lambda done, total: None)
    out = place(str(config.out))
    if config.to == "npz":
        copied = write_npz(images, out, record, _OPTIONS, tell, config.compress)
    else:
        copied = {"folder": write_folder, "cifar": write_cifar}[config.to](images, out, record, _OPTIONS, tell)
    warnings = [warning for warning in (copied.warning, _LOSSY if images.lossy else None) if warning]
    return replace(copied, warning="; ".join(warnings) or None)


def _record(images: ImageSet, config: ExportConfig, origin: dict[str, Any]) -> dict[str, Any]:
    """What a file or folder was made for, by which a later run of the same command knows it. It is kept in the result."""
    record = {"n": len(images), "shape": list(images.shape), "classes": images.classes, "to": config.to}
    if config.to == "npz":
        record["compress"] = config.compress
    return {**record, "source": origin["source"], "selection": origin.get("selection"), "synthfast": __version__}
