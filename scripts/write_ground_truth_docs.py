"""Write the repository's page of a ground-truth study, and the scoreboard that `patchkit recommend` reads.

    python scripts/write_ground_truth_docs.py --run DIR --docs docs

Writes docs/ground-truth.md with its pictures in docs/ground-truth/, and patchkit/studies/scoreboard.json: the run's
scoreboard without what only a page needs. The same run gives the same bytes.
"""

from pathlib import Path
from typing import Annotated

import typer

from patchkit.cli.app import ScriptCommand
from patchkit.cli.console import give
from patchkit.report import write_scoreboard_docs
from patchkit.results.scoreboard import SCOREBOARD, Scoreboard
from patchkit.results.scoreboard_short import write_short

ROOT = Path(__file__).resolve().parent.parent


def main(
    run: Annotated[Path, typer.Option(help="The --out of `patchkit study ground-truth`.")],
    docs: Annotated[Path, typer.Option(help="Where the page goes.")] = ROOT / "docs",
    package: Annotated[Path, typer.Option(help="Where the scoreboard goes.")] = ROOT / "patchkit" / "studies",
) -> None:
    """The page and the shipped scoreboard, from a run's scoreboard.json alone."""
    give(str(write_scoreboard_docs(run, docs)))
    write_short(package / SCOREBOARD, Scoreboard.load(run))
    give(str(package / SCOREBOARD))


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
app.command(cls=ScriptCommand)(main)

if __name__ == "__main__":
    app()
