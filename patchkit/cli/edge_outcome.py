"""How runs over edges, paths and circuits end: the rest of the manifest, a table, one sentence, the report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from patchkit.cli.console import give, plain_table, results
from patchkit.cli.outcome import counted, end

if TYPE_CHECKING:
    from patchkit.results.edge_scores import EdgeScores
    from patchkit.results.evaluation import Evaluation
    from patchkit.results.manifest import RunDir
    from patchkit.results.paths import PathResult
    from patchkit.runtime import LeftOut

#: Rows of a table; the report has more, and the files have all.
_SHOWN = 12


def end_edges(run: RunDir, scores: EdgeScores, left_out: Sequence[LeftOut], quiet: bool) -> None:
    """Ends a run of `edges`."""
    axes = [*(["place"] if scores.placed else []), "sender", "receiver"]
    end(
        run,
        quiet,
        lambda: _show_edges(scores),
        axes={"scores": axes, "scores_abs": axes},
        base_metric=float(scores.base_metric.double().mean()),
        source_metric=float(scores.source_metric.double().mean()),
        pairs=counted(len(scores.pair_ids), left_out),
        cost=scores.cost,
    )


def _show_edges(scores: EdgeScores) -> None:
    table = plain_table("edge")
    for title in ("effect", "mean |effect|"):
        table.add_column(title, justify="right")
    for name, mean, size in scores.top(_SHOWN):
        table.add_row(name, f"{mean:+.4f}", f"{size:.4f}")
    results().print(table)
    kept = scores.circuit
    if kept is not None:
        senders = len(kept.node_names)
        give(
            f"The circuit that is kept: {kept.n_edges:,} edges of {scores.graph.n_edges:,}, {senders} senders."
        )
        if scores.method.untried:
            give(
                f"The budget ended it: {scores.method.untried:,} edges were never tried and are in the circuit."
            )
    give(f"{scores.graph.n_edges:,} edges by {scores.method.name}, at {scores.cost:,.1f} forwards a prompt.")


def end_paths(run: RunDir, found: PathResult, left_out: Sequence[LeftOut], quiet: bool) -> None:
    """Ends a run of `paths`."""
    end(
        run,
        quiet,
        lambda: _show_paths(found),
        base_metric=found.base_metric,
        source_metric=found.source_metric,
        pairs=counted(len(found.pair_ids), left_out),
        cost=found.cost,
    )


def _show_paths(found: PathResult) -> None:
    for stage in found.stages:
        give(
            f"{stage.name}: paths to {', '.join(stage.receivers[:8])}{' ...' if len(stage.receivers) > 8 else ''}"
        )
        table = plain_table("sender")
        for title in ("effect", "share", "mean |effect|"):
            table.add_column(title, justify="right")
        table.add_column("")
        ranked = sorted(stage.effects, key=lambda effect: -abs(effect.effect))[:_SHOWN]
        for effect in ranked:
            share = "" if effect.share is None else f"{effect.share:+.1%}"
            chosen = "chosen" if effect.sender in stage.chosen else ""
            table.add_row(effect.sender, f"{effect.effect:+.4f}", share, f"{effect.effect_abs:.4f}", chosen)
        results().print(table)
    for note in found.notes:
        give(note)


def end_evaluation(run: RunDir, found: Evaluation, left_out: Sequence[LeftOut], quiet: bool) -> None:
    """Ends a run of `evaluate`."""
    clean_is_base = found.convention.direction == "noise"
    end(
        run,
        quiet,
        lambda: _show_evaluation(found),
        base_metric=found.clean_metric,
        source_metric=found.corrupt_metric,
        pairs=counted(len(found.pair_ids), left_out),
        cost=found.cost,
        sign="circuit_metric has the metric's own sign; faithfulness 1 = the base run, 0 = every edge cut"
        + ("" if clean_is_base else " (base: the corrupt prompt)"),
    )


def _show_evaluation(found: Evaluation) -> None:
    table = plain_table("edges asked for")
    for title in ("edges left", "senders", "metric", "faithfulness", "95 % interval"):
        table.add_column(title, justify="right")
    for run in found.circuits:
        interval = run.faithfulness_interval
        table.add_row(
            "as given" if run.requested is None else f"{run.requested:,}",
            f"{run.n_edges:,}{' (empty)' if run.empty else ''}",
            f"{run.n_nodes:,}",
            f"{run.circuit_metric:+.4f}",
            "" if run.faithfulness is None else f"{run.faithfulness:.3f}",
            "" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}",
        )
    if found.circuits:
        results().print(table)
    for curve in found.curves:
        areas = ", ".join(
            f"{name} {value:.3f}"
            for name, value in (("CPR", curve.cpr), ("CMD", curve.cmd), ("on a log axis CPR", curve.cpr_log))
            if value is not None
        )
        give(f"Curve by {'absolute' if curve.absolute else 'signed'} scores: {areas or 'not defined'}")
    if found.completeness is not None:
        give(f"Completeness: |F(C without K) - F(M without K)| is {found.completeness.worst:.4f} at worst.")
    if found.minimality is not None:
        idle = found.minimality.superfluous
        listed = f": {', '.join(idle[:8])}" if idle else ""
        give(f"Minimality: {len(idle)} of {len(found.minimality.nodes)} nodes are idle{listed}.")
    if found.random is not None:
        give(f"Random circuits of equal size: p = {found.random.p_value:.3g} of {found.random.count}.")
    for overlap in found.overlaps:
        shares = ", ".join(
            f"{name} {value:.3f}"
            for name, value in (
                ("precision", overlap.precision),
                ("recall", overlap.recall),
                ("Jaccard", overlap.jaccard),
                ("AUROC", overlap.auroc),
            )
            if value is not None
        )
        give(f"Against {overlap.reference}, by {overlap.level}: {shares}")
    if found.stability is not None:
        give(f"Stability: bootstraps share {found.stability.jaccard:.2f} of their edges (Jaccard).")
    if found.repair is not None:
        repair = found.repair
        give(
            f"Without {', '.join(repair.group)} the metric is {repair.knocked_out:+.4f}; their direct effects alone "
            f"would leave {repair.expected:+.4f}."
        )
    for note in found.notes:
        give(note)
