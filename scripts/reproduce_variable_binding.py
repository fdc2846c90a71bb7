"""Reproduce the published variable-binding mask.

    python scripts/reproduce_variable_binding.py --model huggyllama/llama-13b

The published settings on any model; `--plan` prints what it takes and needs no weights. On several GPUs give
`--device-map auto`.
"""

from __future__ import annotations

import shlex
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from patchkit import InputError, PatchkitError, learn_mask, load, write_desiderata
from patchkit.cli.console import plain_table, results
from patchkit.cli.mask_outcome import begin_mask, end_mask
from patchkit.cli.outcome import open_model
from patchkit.cli.progress import progress_bar
from patchkit.results.manifest import open_run_dir
from patchkit.results.study import VariableBindingStudy
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


def main(
    model: Annotated[
        str, typer.Option(help="Embedded name, local directory or hub name.")
    ] = "huggyllama/llama-13b",
    out: Annotated[Path, typer.Option(help="Directory for the results; new or empty.")] = Path(
        "reproduction"
    ),
    plan: Annotated[
        bool, typer.Option("--plan", help="Only say what it takes; needs the config, no weights.")
    ] = False,
    samples: Annotated[
        int, typer.Option(min=18, help="Triples a desideratum; 50 is published and gives 45.")
    ] = SAMPLES,
    seeds: Annotated[int, typer.Option(min=1, help="Masks trained.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the triples.")] = 0,
    dtype: Annotated[str | None, typer.Option(help="float16 is published.")] = None,
    device_map: Annotated[
        str | None, typer.Option(help="How accelerate spreads the model; default: auto where there is a GPU.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run that --out holds.")] = False,
    iterations: Annotated[
        int, typer.Option(min=1, help="Of one step a desideratum, at every lambda; 100 is published.")
    ] = 100,
    trailing_space: Annotated[
        bool,
        typer.Option(
            help="The prompt's last space stands before the answer; GPT-2's tokenizer needs --no-..."
        ),
    ] = True,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """Learns the mask at the published settings and holds it against the published outcome."""
    options = published_options(seeds=range(seeds), iterations=iterations)
    if plan:
        lazy = load(model, lazy=True, dtype=dtype)
        _show(plan_published(lazy, options).lines())
        return
    given = {
        "model": model,
        "samples": samples,
        "seeds": seeds,
        "seed": seed,
        "dtype": dtype,
        "device_map": device_map,
        "iterations": iterations,
        "trailing_space": trailing_space,
    }
    with open_run_dir(out, "reproduce-variable-binding", given, resume) as run:
        started = time.monotonic()
        loaded = open_model(model, dtype, device_map)
        made, task = published_triples(loaded, seed, samples, trailing_space)
        begin_mask(run, loaded, options, seed)
        write_desiderata(run.path / "desiderata.jsonl", made.triples())
        with progress_bar(quiet) as progress:
            result = learn_mask(loaded, made.triples(), options, checkpoint=run.checkpoint, progress=progress)
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
        end_mask(run, result, quiet)


def _show(lines: list[tuple[str, str]]) -> None:
    table = plain_table("", "")
    for label, value in lines:
        table.add_row(label, value)
    results().print(table, markup=False, highlight=False)


if __name__ == "__main__":
    try:
        typer.run(main)
    except PatchkitError as error:
        typer.echo(f"Error: {error}", err=True)
        sys.exit(2 if isinstance(error, InputError) else error.exit_code)
