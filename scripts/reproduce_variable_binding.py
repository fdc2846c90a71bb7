"""Reproduce the published variable-binding mask.

    python scripts/reproduce_variable_binding.py --model huggyllama/llama-13b

The published settings on any model; `--plan` prints what it takes and needs no weights. On eight GPUs that hold the
model each, `--backend accelerate --num-processes 8` shares the triples among eight processes; a model that one GPU does
not hold takes `--gpus-per-replica 2`, or `--device-map auto` without processes.
"""

from __future__ import annotations

import shlex
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from patchkit import learn_mask, load, write_desiderata
from patchkit.cli.app import ScriptCommand
from patchkit.cli.console import plain_table, results
from patchkit.cli.mask_outcome import begin_mask, end_mask
from patchkit.cli.options import Out, options_of
from patchkit.cli.outcome import finished, open_model
from patchkit.cli.progress import progress_bar
from patchkit.cli.run_options import RunOptions, runs
from patchkit.results.manifest import open_run_dir
from patchkit.results.study import VariableBindingStudy
from patchkit.runtime import without_failures
from patchkit.runtime.plan_words import Machine
from patchkit.studies.published import (
    SAMPLES,
    compare_with_published,
    plan_published,
    published_options,
    published_triples,
)

_QUESTION = (
    "Which heads and MLPs of the last token carry the value of x in `x = 41, y = 27, x + y = `? The settings are those "
    "of Discovering Variable Binding Circuitry with Desiderata (arXiv 2307.03637)."
)


@runs
def main(
    ctx: typer.Context,
    shared: RunOptions,
    model: Annotated[
        str, typer.Option(help="Embedded name, local directory or hub name.")
    ] = "huggyllama/llama-13b",
    out: Out = Path("reproduction"),
    plan: Annotated[
        bool, typer.Option("--plan", help="Only say what it takes; needs the config, no weights.")
    ] = False,
    samples: Annotated[
        int, typer.Option(min=18, help="Triples a desideratum; 50 is published and gives 45.")
    ] = SAMPLES,
    seeds: Annotated[int, typer.Option(min=1, help="Masks trained.")] = 1,
    iterations: Annotated[
        int, typer.Option(min=1, help="Of one step a desideratum, at every lambda; 100 is published.")
    ] = 100,
    trailing_space: Annotated[
        bool,
        typer.Option(
            help="The prompt's last space stands before the answer; GPT-2's tokenizer needs --no-..."
        ),
    ] = True,
) -> None:
    """Learn the mask at the published settings (float16 is published) and hold it against the published outcome."""
    options = replace(
        published_options(seeds=range(seeds), iterations=iterations), max_batch_tokens=shared.batch_tokens
    )
    if plan:
        lazy = load(model, lazy=True, dtype=shared.dtype)
        machine = Machine(processes=shared.num_processes or 1)
        _show(plan_published(lazy, options, machine, shared.gpus_per_replica or 1).lines())
        return
    with open_run_dir(out, "reproduce-variable-binding", options_of(ctx), shared.resume) as run:
        if run.done:
            finished(run, shared.quiet)
            return
        started = time.monotonic()
        loaded = open_model(model, shared)
        made, task = published_triples(loaded, shared.seed, samples, trailing_space)
        begin_mask(run, loaded, options, shared.seed)
        write_desiderata(run.path / "desiderata.jsonl", made.triples())
        with progress_bar(shared.quiet) as progress:
            result, left_out = without_failures(
                lambda kept: learn_mask(loaded, kept, options, checkpoint=run.checkpoint, progress=progress),
                made.triples(),
            )
        result = result.model_copy(update={"excluded": made.excluded | result.excluded})
        result.save(run.path)
        comparison = compare_with_published(loaded, result, task)
        VariableBindingStudy(
            question=_QUESTION,
            model=loaded.name,
            model_card={key: str(value) for key, value in asdict(loaded.dims).items()},
            examples=[],
            attention=[],
            forms=[],
            command=shlex.join(["python", *sys.argv]),
            seconds=time.monotonic() - started,
            comparison=comparison,
        ).save(run.path)
        _show(list(comparison.items()))
        end_mask(run, result, left_out, shared.quiet)


def _show(lines: list[tuple[str, str]]) -> None:
    table = plain_table("", "")
    for label, value in lines:
        table.add_row(label, value)
    results().print(table, markup=False, highlight=False)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
app.command(cls=ScriptCommand)(main)

if __name__ == "__main__":
    app()
