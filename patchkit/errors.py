"""The errors a person meets: each names the thing, what was expected, what was found, and the fix."""

from __future__ import annotations


class PatchkitError(Exception):
    """Base of every error patchkit raises on purpose; the command line prints it as one message, without a traceback."""

    exit_code = 1


class InputError(PatchkitError):
    """Something the user gave cannot be used: a file, a line in it, an option, a model. Exit status 2."""

    exit_code = 2


class RunError(PatchkitError):
    """The input was good but the run could not go on: disk full, a loss that became NaN. Exit status 1."""

    exit_code = 1
