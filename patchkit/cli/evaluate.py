"""`evaluate`: whether to believe a circuit."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from patchkit.cli.console import say
from patchkit.cli.edge_options import Direction, EdgeAblation, Reference, begin_edges, edge_options
from patchkit.cli.edge_outcome import end_evaluation
from patchkit.cli.given import check_pairs, given_pairs, given_reference
from patchkit.cli.options import (
    AnswerFirstToken,
    Metric,
    Model,
    Out,
    Pairs,
    PairsN,
    PairsTask,
    one_of,
    options_of,
    sizes_of,
    words_of,
)
from patchkit.cli.outcome import finished, open_model
from patchkit.cli.progress import progress_bar
from patchkit.cli.run_options import RunOptions, runs

if TYPE_CHECKING:
    from patchkit.methods import EvaluateOptions

_CIRCUIT, _TESTS = "Circuit", "Tests"


@runs
def evaluate(
    ctx: typer.Context,
    shared: RunOptions,
    model: Model,
    circuit: Annotated[
        Path,
        typer.Option(
            "--circuit",
            help="A run of `patchkit edges`, an EAP-IG .json or .pt, or names of edges.",
            rich_help_panel=_CIRCUIT,
        ),
    ],
    out: Out,
    pairs: Pairs = None,
    task: PairsTask = None,
    n: PairsN = 100,
    answer_first_token: AnswerFirstToken = False,
    top_n: Annotated[
        str | None,
        typer.Option(
            "--top-n", help="Numbers of edges to select, by comma: 50,200,1000.", rich_help_panel=_CIRCUIT
        ),
    ] = None,
    absolute: Annotated[
        bool, typer.Option("--absolute", help="Rank edges by |score|.", rich_help_panel=_CIRCUIT)
    ] = False,
    selection: Annotated[
        str,
        typer.Option(
            "--selection",
            help="top, greedy (from the logits backwards) or threshold.",
            rich_help_panel=_CIRCUIT,
        ),
    ] = "top",
    tau: Annotated[
        float | None,
        typer.Option("--tau", help="Least score, of --selection threshold.", rich_help_panel=_CIRCUIT),
    ] = None,
    patching: Annotated[
        str,
        typer.Option(
            "--patching", help="edge, or node: its senders against all others.", rich_help_panel=_CIRCUIT
        ),
    ] = "edge",
    curve: Annotated[
        bool,
        typer.Option("--curve", help="Faithfulness at MIB's ten sizes; CPR and CMD.", rich_help_panel=_TESTS),
    ] = False,
    completeness: Annotated[
        int,
        typer.Option(
            "--completeness", min=0, help="Random sets of nodes to take away.", rich_help_panel=_TESTS
        ),
    ] = 0,
    minimality: Annotated[
        bool, typer.Option("--minimality", help="Is each node needed?", rich_help_panel=_TESTS)
    ] = False,
    random: Annotated[
        int, typer.Option("--random", min=0, help="Random circuits of equal size.", rich_help_panel=_TESTS)
    ] = 0,
    stability: Annotated[
        int,
        typer.Option(
            "--stability",
            min=0,
            help="Bootstraps of the pairs (edges --keep-pairs).",
            rich_help_panel=_TESTS,
        ),
    ] = 0,
    knockout: Annotated[
        str | None,
        typer.Option(
            "--knockout", help="Heads and MLPs to knock out: who makes up for them?", rich_help_panel=_TESTS
        ),
    ] = None,
    truth: Annotated[
        Path | None,
        typer.Option("--truth", help="A circuit or run to compare with.", rich_help_panel=_TESTS),
    ] = None,
    direction: Direction = "noise",
    metric: Metric = "logit-diff",
    ablation: EdgeAblation = "resample",
    reference: Reference = None,
) -> None:
    """Run a circuit: faithfulness, completeness, minimality, random circuits, curves, overlap, self-repair."""
    given = ctx.params
    check_pairs(given)
    options, asked = edge_options(given, shared), evaluate_options(given)
    from patchkit import methods
    from patchkit.results.circuit_source import read_circuit
    from patchkit.results.manifest import open_run_dir
    from patchkit.runtime import without_failures

    with open_run_dir(out, "evaluate", options_of(ctx), shared.resume) as run:
        if run.done:
            finished(run, shared.quiet)
            return
        loaded = open_model(model, shared)
        source = read_circuit(circuit, loaded.dims)
        compared = None if truth is None else read_circuit(truth, loaded.dims)
        made, mean_over = given_pairs(loaded, given), given_reference(loaded, given)
        begin_edges(run, loaded, options)
        for note in source.notes:
            say(f"{circuit}: {note}", shared.quiet)
        with progress_bar(shared.quiet) as progress:
            more: dict[str, Any] = {
                "reference": mean_over,
                "truth": None if compared is None else compared.source,
                "truth_name": "reference" if truth is None else str(truth),
                "origin": str(circuit),
                "checkpoint": run.checkpoint,
                "progress": progress,
            }
            found, left_out = without_failures(
                lambda kept: methods.evaluate(loaded, kept, source.source, options, asked, **more), made
            )
        found = found.model_copy(update={"notes": [*source.notes, *found.notes]})
        found.save(run.path)
        end_evaluation(run, found, left_out, shared.quiet)


def evaluate_options(given: dict[str, Any]) -> EvaluateOptions:
    """What is asked about the circuit, as the method takes it."""
    from patchkit.methods import EvaluateOptions
    from patchkit.methods._evaluate_options import PATCHINGS, SELECTION_NAMES

    return EvaluateOptions(
        sizes=() if given["top_n"] is None else sizes_of(given["top_n"]),
        absolute=given["absolute"],
        selection=one_of(SELECTION_NAMES, given["selection"], "--selection"),
        tau=given["tau"],
        patching=one_of(PATCHINGS, given["patching"], "--patching"),
        curve=given["curve"],
        completeness=given["completeness"],
        minimality=given["minimality"],
        random=given["random"],
        stability=given["stability"],
        knockout=() if given["knockout"] is None else words_of(given["knockout"], "--knockout"),
        seed=given["seed"],
    )
