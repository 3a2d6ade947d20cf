"""Errors that a user can act on.

Every message is one line that says what was wrong, what was expected, what was found and what to do.
The command line prints it without a traceback and exits with ``exit_status``.
"""

from __future__ import annotations


class SynthfastError(Exception):
    """A failure at run time: a broken file, a full disk, a model that does not fit (exit status 1)."""

    exit_status = 1


class UsageError(SynthfastError):
    """A request that cannot be carried out as written: a bad option value or combination (exit status 2)."""

    exit_status = 2
