"""How the card of an embedded model looks on screen."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table
from rich.text import Text

from patchkit.cli.console import plain_table
from patchkit.zoo import ModelCard


def overview(cards: list[ModelCard]) -> Table:
    """One row a model: sizes, seed, training, and the worst cell of its accuracy table."""
    table = plain_table()
    table.add_column("model", no_wrap=True)
    for title in ("layers x heads", "weights", "MB", "seed", "steps", "minutes", "worst"):
        table.add_column(title, justify="right")
    for card in cards:
        grouped = "" if card.kv_heads == card.heads else f" ({card.kv_heads} kv)"
        table.add_row(
            card.name,
            f"{card.layers} x {card.heads}{grouped}",
            f"{card.parameters / 1e3:,.0f}k",
            f"{card.bytes / 1e6:.1f}" if card.bytes else "-",
            _or_dash(card.seed),
            _or_dash(card.train_steps),
            "-" if card.train_seconds is None else f"{card.train_seconds / 60:.1f}",
            f"{card.worst_accuracy:.1%}",
        )
    return table


def programs() -> Table:
    """One row a handmade program: what it does and what is planted in it."""
    from patchkit.zoo.programs import PROGRAMS

    table = plain_table("program", "layers", "what it does", "what it shows")
    for program in PROGRAMS.values():
        table.add_row(program.name, str(program.layers), program.task, program.shows)
    return table


def accuracy(card: ModelCard) -> Table:
    """Accuracy on held-out prompts: a row a surface form, a column an operation."""
    columns = list(dict.fromkeys(column for row in card.accuracy.values() for column in row))
    table = plain_table("")
    for column in columns:
        table.add_column(column, justify="right")
    for name, row in card.accuracy.items():
        table.add_row(name, *(f"{row[column]:.1%}" if column in row else "-" for column in columns))
    return table


def description(card: ModelCard, directory: Path | None) -> Table:
    """What the model does, shows and does not show, and where its weights and training log lie."""
    lines = {
        "architecture": f"{card.architecture}, d_model {card.d_model}, d_mlp {card.d_mlp}",
        "task": card.task,
        "shows": card.shows,
        "does not show": card.does_not_show,
        **{name: f"{value:g}" for name, value in card.measurements.items()},
        "made by": card.command or "patchkit/zoo/handmade.py, patchkit/zoo/programs",
        "weights, log": str(directory) if directory else "built in code",
    }
    grid = Table.grid(padding=(0, 2))
    for label, text in lines.items():
        grid.add_row(label, Text(text, overflow="fold"))
    return grid


def summary(card: ModelCard) -> dict[str, str]:
    """The card in a few labelled lines, for a report."""
    trained = f"seed {card.seed}, {card.train_steps} steps" if card.seed is not None else "built in code"
    return {
        "model": f"{card.name} ({card.architecture})",
        "size": f"{card.layers} layers x {card.heads} heads, {card.parameters / 1e6:.2f} M parameters",
        "trained": trained,
        "held-out accuracy": f"{card.worst_accuracy:.1%} in its worst cell of form x operation",
    }


def _or_dash(value: object) -> str:
    return "-" if value is None else str(value)
