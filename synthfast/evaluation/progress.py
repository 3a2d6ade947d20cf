"""Folders in which a score keeps what it has finished, so that an interrupted command goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from synthfast.artifacts import Lock, atomic_write_json, make_folder, os_error, read_json
from synthfast.data.shards.manifest import require_same
from synthfast.errors import UsageError

_FACTS_FILE = "facts.json"


def open_progress(
    folder: Path, facts: Mapping[str, Any], what: str, option: Callable[[str], str] = lambda key: key
) -> Lock:
    """Make a progress folder, or go on with one that was made under the same facts. Returns its lock, to be closed.

    Args:
        facts: JSON values on which the results depend; they lie in ``facts.json``.
        what: whose progress it is, in words such as "an evaluation".
        option: what to call a key of the facts in messages.

    Raises:
        UsageError: the folder holds something else, or was made under other facts.
        SynthfastError: another process is writing it, or the file system refuses.
    """
    make_folder(folder)
    lock = Lock(folder)
    try:
        path = folder / _FACTS_FILE
        if not path.exists() and any(entry.name[0] != "." for entry in folder.iterdir()):
            raise UsageError(f"{folder}: expected the progress of {what}, found other files; choose another --out")
        wanted = json.loads(json.dumps(facts))
        if path.exists():
            require_same(folder, read_json(path, f"facts of {what}"), wanted, option)
        else:
            atomic_write_json(path, wanted)
    except BaseException:
        lock.close()
        raise
    return lock


def remove_progress(folder: Path) -> None:
    """Remove a progress folder."""
    try:
        shutil.rmtree(folder)
    except OSError as error:
        raise os_error(folder, error, "remove it by hand") from error
