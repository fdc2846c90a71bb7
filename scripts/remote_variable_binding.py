"""The published variable-binding mask on a model that an NDIF server hosts, from a laptop.

    export NDIF_API_KEY=...
    python scripts/remote_variable_binding.py --model huggyllama/llama-13b --host https://api.ndif.us --out DIR

The settings are those of `reproduce_variable_binding.py`. Every job is printed with its id when it is sent. They do not
wait for each other or for this process: close the laptop, or press Ctrl-C, and start the same command with `--resume`; it
takes up the jobs that were sent, by their ids, and what they gave in the meantime. `--plan` says how many jobs and bytes
it takes, and asks nobody.
"""

from __future__ import annotations

import logging
import sys

from reproduce_variable_binding import app

from patchkit.cli.console import say

#: Of what is logged of a host, what is printed: each job when it is sent, taken up again, or back.
_PRINTED = "job "


class _Jobs(logging.Handler):
    """Prints what becomes of the jobs; a host's tracebacks stay in DIR/host.log."""

    def emit(self, record: logging.LogRecord) -> None:
        said = record.getMessage()
        if said.startswith(_PRINTED):
            say(said.splitlines()[0])


def main() -> None:
    logger = logging.getLogger("patchkit.host")
    logger.setLevel(logging.INFO)
    logger.addHandler(_Jobs())
    words = sys.argv[1:]
    if "--backend" not in words and not any(word.startswith("--backend=") for word in words):
        sys.argv += ["--backend", "ndif"]
    app()


if __name__ == "__main__":
    main()
