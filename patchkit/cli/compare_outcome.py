"""How runs of `compare` and `generalise` end: the manifest's last fields, and what is printed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from patchkit.cli.console import give, plain_table, results
from patchkit.cli.outcome import counted, end

if TYPE_CHECKING:
    from patchkit.results.comparison import Across, Comparison
    from patchkit.results.generalisation import Generalisation
    from patchkit.results.manifest import RunDir
    from patchkit.runtime import LeftOut

#: Nodes of a table; the report has all.
_SHOWN = 8


def end_comparison(run: RunDir, found: Comparison, left_out: Sequence[LeftOut], quiet: bool) -> None:
    """Ends a run of `compare`."""
    end(
        run,
        quiet,
        lambda: _show_comparison(found),
        base_metric=found.models[0].clean,
        source_metric=found.models[1].clean,
        pairs=counted(found.pairs + len(found.held_out), left_out),
        cost=found.cost,
    )


def _show_comparison(found: Comparison) -> None:
    table = plain_table("circuit of")
    for title in ("edges asked for", "in the first", "in the second"):
        table.add_column(title, justify="right")
    for which in ("first", "second"):
        mine = [each for each in found.circuits if each.found_in == which]
        for size in dict.fromkeys(each.run.requested for each in mine):
            cells = [
                _number(each.run.faithfulness)
                for place in ("first", "second")
                for each in mine
                if each.run.requested == size and each.run_in == place
            ]
            table.add_row(f"the {which}", f"{size:,}", *cells)
    results().print(table)
    for across in found.across:
        _show_across(across)
    for said in (*found.findings, *found.notes):
        give(said)


def _show_across(across: Across) -> None:
    give(f"Activations of the {across.donor} put into the {across.model}:")
    table = plain_table("nodes")
    for title in ("effect", "share of the gap"):
        table.add_column(title, justify="right")
    ranked = sorted(across.nodes, key=lambda each: -abs(each.effect))[:_SHOWN]
    for name, effect, share in [
        *((each.group, each.effect, each.share) for each in across.groups),
        *((each.node, each.effect, each.share) for each in ranked),
    ]:
        table.add_row(name, f"{effect:+.4f}", "" if share is None else f"{share:+.1%}")
    results().print(table)


def end_generalisation(run: RunDir, found: Generalisation, left_out: Sequence[LeftOut], quiet: bool) -> None:
    """Ends a run of `generalise`."""
    used = sum(each.pairs + len(each.held_out) for each in found.sets)
    end(
        run,
        quiet,
        lambda: _show_generalisation(found),
        pairs=counted(used, left_out),
        cost=found.cost,
        sign="faithfulness: 1 = the whole model, 0 = every edge cut, of means over held-out pairs",
    )


def _show_generalisation(found: Generalisation) -> None:
    for matrix in found.sizes:
        table = plain_table(f"circuit of {matrix.requested:,} edges, found on")
        for each in found.sets:
            table.add_column(each.name, justify="right")
        for row in matrix.rows:
            table.add_row(row.circuit, *(_number(run.faithfulness) for run in row.runs))
        if matrix.random is not None:
            means = [
                None if None in cell else sum(value for value in cell if value is not None) / len(cell)
                for cell in matrix.random.faithfulness
            ]
            table.add_row(f"random, mean of {matrix.random.count}", *map(_number, means))
        results().print(table)
    for said in (*found.findings, *found.notes):
        give(said)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
