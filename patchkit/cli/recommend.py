"""`recommend`: which method to trust for a model, a question and a budget."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from patchkit.cli.console import give, hush_loading, plain_table, results
from patchkit.cli.options import Model, one_of, words_of
from patchkit.errors import InputError

if TYPE_CHECKING:
    from patchkit.results.recommendation import Recommendation

_ASKED, _EVIDENCE = "Asked", "Evidence"


def recommend(
    model: Model,
    nodes: Annotated[
        str | None,
        typer.Option(
            "--nodes",
            help="Node kinds and names, by comma; default: z,mlp_out.",
            rich_help_panel=_ASKED,
        ),
    ] = None,
    edges: Annotated[
        bool, typer.Option("--edges", help="Edges instead of nodes.", rich_help_panel=_ASKED)
    ] = False,
    question: Annotated[
        str,
        typer.Option(
            "--question",
            help="rank: more or less; top: which ones; circuit: of the true size; sizes: at every size.",
            rich_help_panel=_ASKED,
        ),
    ] = "rank",
    budget: Annotated[
        float | None,
        typer.Option(
            "--budget",
            help="Forwards a pair at the most; a backward counts 1. Default: whatever it takes.",
            rich_help_panel=_ASKED,
        ),
    ] = None,
    pairs: Annotated[
        int | None,
        typer.Option("--pairs", min=1, help="How many there are; default: 100.", rich_help_panel=_ASKED),
    ] = None,
    single_pair: Annotated[
        bool,
        typer.Option("--single-pair", help="One pair of prompts alone: --pairs 1.", rich_help_panel=_ASKED),
    ] = False,
    tokens: Annotated[
        int, typer.Option("--tokens", min=2, help="Length of a prompt.", rich_help_panel=_ASKED)
    ] = 32,
    scoreboard: Annotated[
        Path | None,
        typer.Option(
            "--scoreboard",
            help="A run of `patchkit study ground-truth`; default: the one that patchkit ships.",
            rich_help_panel=_EVIDENCE,
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="As JSON, with everything.", rich_help_panel=_EVIDENCE)
    ] = False,
) -> None:
    """Which method to trust, by what was measured where the circuit is known: no weights are needed, nothing is run."""
    if edges and nodes is not None:
        raise InputError("give --nodes KINDS or --edges, one of the two")
    if single_pair and pairs not in (None, 1):
        raise InputError(f"--single-pair contradicts --pairs {pairs}; give one of the two")
    from patchkit.results.scoreboard import Scoreboard
    from patchkit.studies.recommend import QUESTIONS, RecommendOptions
    from patchkit.studies.recommend import recommend as recommended

    hush_loading()
    asked = RecommendOptions(
        nodes=None if edges else words_of("z,mlp_out" if nodes is None else nodes, "--nodes"),
        budget=budget,
        pairs=1 if single_pair else pairs or 100,
        question=one_of(QUESTIONS, question, "--question"),
        tokens=tokens,
    )
    board = None if scoreboard is None else Scoreboard.load(scoreboard)
    found = recommended(model, asked, scoreboard=board)
    if as_json:
        give(json.dumps(found.model_dump(mode="json"), indent=2, ensure_ascii=False))
    else:
        _show(found)


def _show(found: Recommendation) -> None:
    from patchkit.studies.recommend import evidence_lines, lead_lines

    give("\n".join(lead_lines(found)))
    table = plain_table("method")
    for title in ("forwards a pair", "score", "95 % interval", "cases"):
        table.add_column(title, justify="right")
    table.add_column("")
    for choice in found.choices:
        interval = "" if choice.interval is None else " to ".join(f"{end:.3f}" for end in choice.interval)
        like = "best" if choice.method == found.best else "not told from the best" if choice.like_best else ""
        row = (choice.method, f"{choice.cost:,.1f}", f"{choice.score:.3f}", interval, f"{choice.cases}", like)
        table.add_row(*row)
    results().print(table)
    give("\n".join(evidence_lines(found)))
