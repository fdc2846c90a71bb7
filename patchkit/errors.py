"""The errors a person meets: each names the thing, what was expected, what was found, and the fix."""

from __future__ import annotations

# Of a message; what a file holds may be of any length, and is quoted in messages.
_LONGEST = 2_000


class PatchkitError(Exception):
    """Base of every error patchkit raises on purpose; the command line prints it as one line, without a traceback.

    Messages quote names and values out of files. Whatever in them would begin a new line or move the cursor is written
    as an escape, and of a message of thousands of letters the middle is left out.
    """

    exit_code = 1

    def __init__(self, message: str) -> None:
        # Spelled out: `super()` without arguments does not travel to a hosted model.
        Exception.__init__(self, one_line(message))


class InputError(PatchkitError):
    """Something the user gave cannot be used: a file, a line in it, an option, a model. Exit status 2."""

    exit_code = 2


class RunError(PatchkitError):
    """The input was good but the run could not go on: disk full, a loss that became NaN. Exit status 1."""

    exit_code = 1


def one_line(text: str) -> str:
    """A text that prints as one line of limited length; one that does already is returned as it is."""
    if not text.isprintable():
        text = "".join(
            letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii")
            for letter in text
        )
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 + 5 :]}"
    return text
