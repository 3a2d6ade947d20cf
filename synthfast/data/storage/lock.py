"""A lock on a folder at a URL, as far as storages allow one."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import secrets
import socket
import time
from typing import Any

from synthfast.data.storage.places import Missing, join, remote, remove, sizes, write_object
from synthfast.errors import SynthfastError

_CLAIM = r"\.synthfast-lock-[0-9a-f]{16}\.json"
_TRIES, _MOST_SECONDS = 4, 0.5  # of processes that came at the same moment; and between two tries


class RemoteLock:
    """Keeps other processes from writing a folder at a URL: each who wants to writes a claim of its own, an object
    ``.synthfast-lock-TOKEN.json`` with host, process and time, lists the folder, and holds the lock if there is no other claim.

    Of two who write their claims the one that lists later sees both, so both never hold it; that is sound wherever a listing
    shows every object that was written before, as those of S3, Google Cloud Storage and Azure do, without an exclusive "create"
    or "rename", which not every storage has. Two who see each other take their claims back and try again after a random time. A
    claim is removed by ``close``. What a local lock gives and this one can not:

    - A killed process leaves its claim. A process of the same machine removes it if the one that it names is gone; claims have
      names of their own, so that it can hit no other. From another machine, or after a new start of this one, nobody can tell,
      and the error says what to remove by hand.
    - Where listings lag behind, two who come at once may both get it.
    - Nobody who removes the claim, or does not look for it, is kept from writing.

    Two writers that get past it harm less than it seems: equal requests write equal bytes, and other requests are refused by the
    manifest.

    Raises:
        SynthfastError: another process holds it, or the storage refuses.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._name = f".synthfast-lock-{secrets.token_hex(8)}.json"
        self._held = False
        owner = {**_process(), "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        for _ in range(_TRIES):
            self._refuse(self._other())
            self._held = True
            try:
                write_object(folder, self._name, owner)
                other = self._other()
            except BaseException:
                self.close()
                raise
            if other is None:
                return
            self.close()
            time.sleep(random.uniform(0, _MOST_SECONDS))
        self._refuse(other)

    def close(self) -> None:
        """Let go of it."""
        if not self._held:
            return
        self._held = False
        with contextlib.suppress(SynthfastError):  # the work is done; the error would hide what ended it
            remove(self._folder, self._name)

    def _other(self) -> tuple[str, dict[str, Any]] | None:
        """Another's claim: its name, and what it says; those of processes that are gone are removed."""
        for name in sorted(filter(is_claim, sizes(self._folder))):
            if name == self._name:
                continue
            found = self._read(name)
            if found is not None and not _is_gone(found):
                return name, found
            remove(self._folder, name)
        return None

    def _read(self, name: str) -> dict[str, Any] | None:
        """What a claim says, {} if nothing that can be understood; None if it was taken back meanwhile."""
        try:
            with remote(self._folder) as (files, root):
                data = files.cat_file(f"{root}/{name}")
        except Missing:
            return None
        try:
            found = json.loads(data)
        except (ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    def _refuse(self, other: tuple[str, dict[str, Any]] | None) -> None:
        if other is None:
            return
        name, found = other
        who = f"process {found.get('pid', '?')} on {found.get('host', 'another host')} since {found.get('time', '?')}"
        raise SynthfastError(
            f"{self._folder}: another process is writing this folder ({' '.join(who.split())[:200]}); wait for it to end, or if "
            f"it is dead remove {join(self._folder, name)}"
        )


def is_claim(name: str) -> bool:
    """Whether a file of the folder belongs to its lock."""
    return re.fullmatch(_CLAIM, name) is not None


def _process() -> dict[str, Any]:
    """This process as others may look for it: a number means the same in one run of one machine and in one namespace alone."""
    facts = {"host": socket.gethostname(), "boot": "", "namespace": "", "pid": os.getpid()}
    with contextlib.suppress(OSError):
        facts["namespace"] = os.readlink("/proc/self/ns/pid")
        with open("/proc/sys/kernel/random/boot_id", encoding="utf-8") as file:
            facts["boot"] = file.read().strip()
    return facts


def _is_gone(found: dict[str, Any]) -> bool:
    """Whether the process that a claim names was one of this machine and has ended."""
    here = _process()
    pid = found.get("pid")
    same = all(found.get(key) == here[key] for key in ("host", "boot", "namespace"))
    if not same or type(pid) is not int or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        pass
    return False
