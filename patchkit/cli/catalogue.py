"""`models`, `tasks`, `pairs`: what comes with the package, and prompt pairs generated from it.

Packages that take seconds to import are imported inside the commands, so that `--help` is immediate.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from patchkit.cli.console import give, hush_loading, plain_table, results, say
from patchkit.cli.options import Model, Quiet, Seed


def models(
    name: Annotated[str | None, typer.Argument(help="One model: its whole card.")] = None,
) -> None:
    """The embedded models: sizes, how they were trained, accuracy on held-out prompts."""
    from patchkit import zoo
    from patchkit.cli.cards import accuracy, description, overview, programs

    cards = [zoo.card(each) for each in (zoo.names() if name is None else [name])]
    console = results()
    console.print(overview(cards))
    for card in cards:
        give(f"{card.name}: accuracy on {card.prompts_per_cell} held-out prompts a cell")
        console.print(accuracy(card))
        if name is not None:
            console.print(description(card, zoo.find(card.name)), markup=False, highlight=False)
    if name is None:
        give(
            "Written by hand, with a circuit that is known: handmade-PROGRAM-SHAPE, SHAPE one of llama, gqa, gpt2"
        )
        console.print(programs(), markup=False, highlight=False)


def tasks() -> None:
    """The tasks that prompts are generated for, with their desiderata."""
    from patchkit.tasks import TASKS

    table = plain_table("task", "desideratum", "what it asks")
    for task in TASKS.values():
        table.add_row(task.name, "", task.description, style="bold")
        for name, desideratum in task.desiderata.items():
            table.add_row("", name, desideratum.description)
    results().print(table, markup=False, highlight=False)


def pairs(
    task: Annotated[str, typer.Argument(help="One of `patchkit tasks`.")],
    model: Model,
    out: Annotated[Path, typer.Option("--out", help="JSON Lines file; replaced whole if it exists.")],
    n: Annotated[int, typer.Option("--n", min=1, help="How many pairs.")] = 100,
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Generate clean and corrupt prompts of a task for a model's tokenizer."""
    from patchkit import tasks, zoo
    from patchkit.data import write_pairs
    from patchkit.zoo.load import load

    hush_loading()
    # Only the tokenizer is needed: weights of other models stay on the meta device.
    tokenizer = zoo.build(model)[1] if zoo.embedded(model) else load(model, lazy=True).tokenizer
    made = tasks.pairs(task, tokenizer, n, seed)
    write_pairs(out, made)
    say(f"{len(made)} pairs of {task} for {model}, seed {seed}:", quiet)
    give(str(out))
