"""How a run over nodes begins and ends: what its manifest says, the top nodes, and what was verified."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from patchkit.cli.console import give, plain_table, results, say
from patchkit.cli.outcome import begin, counted, end

if TYPE_CHECKING:
    from patchkit.methods import NodeOptions
    from patchkit.model import PatchModel
    from patchkit.results.manifest import RunDir
    from patchkit.results.scores import Scores
    from patchkit.results.verification import Verification
    from patchkit.runtime import LeftOut

#: Rows of the table; the report has more, and the files have all.
_SHOWN = 12


def begin_nodes(run: RunDir, model: PatchModel, options: NodeOptions) -> None:
    """Notes the model and the convention of the numbers."""
    begin(
        run,
        [model],
        options.seed,
        metric=options.metric,
        direction=options.direction,
        ablation=options.ablation,
    )


def end_nodes(run: RunDir, scores: Scores, left_out: Sequence[LeftOut], quiet: bool) -> None:
    """The rest of the manifest, the table and the report."""
    proofs = [part.cost for part in (scores.verification, scores.bound) if part is not None]
    end(
        run,
        quiet,
        lambda: show(scores, quiet),
        axes={kind: list(scores.grid.axes(kind)) for kind in scores.grid.kinds},
        base_metric=float(scores.base_metric.double().mean()),
        source_metric=float(scores.source_metric.double().mean()),
        pairs=counted(len(scores.pair_ids), left_out),
        cost=scores.cost + sum(proofs),
    )


def show(scores: Scores, quiet: bool) -> None:
    """The nodes that matter most, one sentence about them, and what was proved; doubts about them go to stderr."""
    from patchkit.report import scores_headline, scores_warning

    _show_top(scores)
    give(scores_headline(scores))
    if scores.verification is not None:
        _show_verification(scores.verification)
    if scores.bound is not None:
        for sentence in scores.bound.sentences:
            give(sentence)
    if warning := scores_warning(scores):
        say(warning, quiet)


def _show_top(scores: Scores) -> None:
    numbers = scores.order()[:_SHOWN]
    columns = [values[numbers].tolist() for values in (scores.mean(), scores.mean_abs())]
    low, high = (values.tolist() for values in scores.interval(of=numbers))
    verified = scores.verification
    exact = {} if verified is None else {node.number: node.exact for node in verified.nodes}
    table = plain_table("node")
    for title in ("effect", "95 % interval", "mean |effect|", *(["exact |effect|"] if exact else [])):
        table.add_column(title, justify="right")
    for row, (number, name) in enumerate(
        zip(numbers.tolist(), scores.grid.names(numbers.tolist()), strict=True)
    ):
        interval = "" if low[row] != low[row] else f"{low[row]:+.4f} to {high[row]:+.4f}"
        checked = [f"{exact[number]:.4f}" if number in exact else ""] if exact else []
        table.add_row(name, f"{columns[0][row]:+.4f}", interval, f"{columns[1][row]:.4f}", *checked)
    results().print(table)


def _show_verification(found: Verification) -> None:
    give(
        f"Patched exactly: the top {found.k} and {found.sampled} others at random; {found.unverified:,} nodes were not."
    )
    for group, what in (("top", f"the top {found.k}"), ("sample", "the others"), ("all", "both")):
        correlation, agreement = found.rank_correlation[group], found.sign_agreement[group]
        if correlation is None and agreement is None:
            continue
        parts = [] if correlation is None else [f"rank correlation {correlation:.2f}"]
        parts += [] if agreement is None else [f"same sign {agreement:.0%}"]
        give(f"  {what}: {', '.join(parts)}")
    if found.sampled:
        few = ", ".join(found.missed[:_SHOWN]) + (", ..." if len(found.missed) > _SHOWN else "")
        give(
            f"Missed: {len(found.missed)} of the others have a larger effect than the least of the top {found.k}"
            f"{': ' + few if few else ''}."
        )
