"""The sentences of the page of an evaluation that depend on numbers: how faithful, and whether to believe it."""

from __future__ import annotations

from dataclasses import dataclass

from patchkit.report._edge_words import METHODS
from patchkit.report._html import count, signed, unit
from patchkit.results.evaluation import CircuitRun, Evaluation, RandomTest

#: What the page calls faithful, and by how much a test may miss before it counts against a circuit.
FAITHFUL, ABOVE, WIDE = 0.8, 1.05, 0.3
COMPLETE, CHANCE, STABLE = 0.2, 0.05, 0.8


@dataclass(frozen=True)
class Check:
    """One question about the circuit: what was found, and whether that speaks for it (None: it does not say)."""

    question: str
    found: str
    good: bool | None


def method_name(found: Evaluation) -> str:
    """The method that chose the edges, as a person says it."""
    if found.method == "given":
        return "a given circuit"
    return METHODS.get(found.method, found.method)


def main_run(found: Evaluation) -> CircuitRun | None:
    """The circuit the page is about: the smallest that keeps enough, else the one nearest to the whole model.

    None when there is no circuit with an edge and a score.
    """
    known = [run for run in found.circuits if not run.empty and run.faithfulness is not None]
    enough = [run for run in known if near(run.faithfulness)]
    if enough:
        return min(enough, key=lambda run: run.n_edges)
    return min(known, key=lambda run: abs(1 - (run.faithfulness or 0.0)), default=None)


def near(faithfulness: float | None) -> bool:
    """Whether a circuit does nearly what the whole model does: not much less, and not much more."""
    return faithfulness is not None and abs(1 - faithfulness) <= 1 - FAITHFUL + 1e-9


def tested_run(found: Evaluation) -> CircuitRun | None:
    """The circuit that the tests are about."""
    if found.tested is None or not 0 <= found.tested < len(found.circuits):
        return None
    return found.circuits[found.tested]


def size_of(run: CircuitRun, found: Evaluation) -> str:
    """`200 of 32,491 edges (0.6 %)`."""
    share = f" ({unit(run.n_edges / found.graph_edges)})" if found.graph_edges else ""
    return f"{count(run.n_edges)} of {count(found.graph_edges)} edges{share}"


def headline(found: Evaluation) -> str:
    """How much of the behaviour which size of circuit keeps, and whether chance does as well."""
    metric, run = found.convention.metric, main_run(found)
    if run is None:
        if found.circuits and all(run.empty for run in found.circuits):
            many = (
                "The circuit is"
                if len(found.circuits) == 1
                else f"All {count(len(found.circuits))} circuits are"
            )
            return (
                f"{many} empty: no edge lies on a path from the input to the logits, so nothing was measured."
            )
        if not found.circuits:
            return f"No circuit was run; the whole model has {metric} {signed(found.clean_metric, 2)}."
        return (
            f"Faithfulness is not defined: {metric} is {signed(found.clean_metric, 2)} whether all edges are whole or "
            "all are cut."
        )
    kept = f"{unit(run.faithfulness)} of {metric}{_between(run)}"
    if len([each for each in found.circuits if not each.empty]) == 1:
        said = f"The circuit of {size_of(run, found)} keeps {kept}"
    elif near(run.faithfulness):
        said = f"{size_of(run, found)} are enough for {kept}"
    else:
        most = count(max(each.n_edges for each in found.circuits))
        said = (
            f"No circuit of up to {most} edges comes within {100 * (1 - FAITHFUL):.0f} points of the whole model: the "
            f"nearest, of {size_of(run, found)}, keeps {kept}"
        )
    return f"{said}{_chance(found)}."


def _between(run: CircuitRun) -> str:
    if run.faithfulness_interval is None:
        return ""
    low, high = run.faithfulness_interval
    return f" (95 % interval {unit(low)} to {unit(high)})"


def _chance(found: Evaluation) -> str:
    if found.random is None:
        return ""
    known = [value for value in found.random.faithfulness if value is not None]
    mean = f" {unit(sum(known) / len(known))} on average" if known else " nothing that could be scored"
    run = tested_run(found)
    size = (
        "that size"
        if run is None or run is main_run(found)
        else f"the size of the one with {count(run.n_edges)}"
    )
    return f"; random circuits of {size} keep{mean} (p = {found.random.p_value:.2g})"


def warnings(found: Evaluation) -> list[str]:
    """What forbids reading the numbers as a finding."""
    said = []
    metric, kept = found.convention.metric, found.convention
    whole, cut = found.clean_metric, found.corrupt_metric
    absent = whole <= cut if kept.direction == "noise" else whole >= cut and kept.ablation == "resample"
    if absent and found.circuits:
        said.append(
            f"This says little: {metric} of the whole model ({signed(whole, 2)}) is not "
            f"{'above' if kept.direction == 'noise' else 'below'} that with every edge cut ({signed(cut, 2)}), so "
            "there is no behaviour that a circuit could keep."
        )
    empty = [run for run in found.circuits if run.empty]
    if empty and len(empty) < len(found.circuits):
        asked = ", ".join(count(run.requested) for run in empty if run.requested is not None)
        of = f" (asked for: {asked} edges)" if asked else ""
        verb = "is" if len(empty) == 1 else "are"
        said.append(
            f"{count(len(empty))} of {count(len(found.circuits))} circuits {verb} empty after pruning{of}: no edge "
            "lies on a path from the input to the logits. Their metric is that of the model with every edge cut."
        )
    if found.random is not None and found.random.p_value >= CHANCE and _as_close(found.random):
        said.append(
            f"Chance does as well: {in_words(found.random)} Whatever the circuit keeps, its edges need not be why."
        )
    return said


def in_words(test: RandomTest) -> str:
    """A p-value as a sentence."""
    near = _as_close(test)
    who = "none" if near == 0 else count(near)
    verb = "are" if near > 1 else "is"
    return (
        f"Of {count(test.count)} random circuits {who} {verb} at least as close to 100 % as the circuit: p = "
        f"{test.p_value:.2g}."
    )


def _as_close(test: RandomTest) -> int:
    """How many random circuits are at least as close to the whole model as the circuit."""
    return max(0, round(test.p_value * (1 + test.count) - 1))


def checks(found: Evaluation) -> list[Check]:
    """What speaks for the circuit and what against it, question by question; tests that were not run say so."""
    run = tested_run(found) or main_run(found)
    return [check for check in (
        _faithful(run), _spread(run, len(found.pair_ids)), _pruned(run), _random(found), _complete(found),
        _minimal(found), _stable(found), _agrees(found),
    ) if check is not None]  # fmt: skip


def _faithful(run: CircuitRun | None) -> Check | None:
    if run is None or run.faithfulness is None:
        return None
    share = run.faithfulness
    question = "Does it do what the model does?"
    if share > ABOVE:
        return Check(
            question,
            f"It keeps {unit(share)}: more than the whole model. It leaves out what works against the behaviour, so it "
            "is not what the model does; |1 - faithfulness| judges that, faithfulness does not.",
            False,
        )
    if share >= FAITHFUL:
        return Check(question, f"It keeps {unit(share)} of the metric.", True)
    return Check(
        question, f"It keeps {unit(share)} of the metric; the rest is done by edges outside it.", False
    )


def _spread(run: CircuitRun | None, pairs: int) -> Check | None:
    if run is None or run.faithfulness is None:
        return None
    question = "Would other prompts say the same?"
    if run.faithfulness_interval is None:
        return Check(question, f"Not known: {'one pair' if pairs == 1 else 'no interval'}.", None)
    low, high = run.faithfulness_interval
    said = f"95 % interval over {count(pairs)} pairs: {unit(low)} to {unit(high)}."
    return Check(
        question, said if high - low <= WIDE else f"{said} That is wide: take more pairs.", high - low <= WIDE
    )


def _pruned(run: CircuitRun | None) -> Check | None:
    if run is None or run.requested is None or run.requested == 0:
        return None
    said = f"{count(run.n_edges)} of the {count(run.requested)} edges asked for are left after pruning dead ends."
    return Check("Do its edges hang together?", said, run.n_edges >= 0.5 * run.requested)


def _random(found: Evaluation) -> Check:
    question = "Is it better than chance?"
    if found.random is None:
        return Check(question, "Not tested: `--random 100` compares with random circuits of its size.", None)
    if found.random.p_value >= CHANCE and not _as_close(found.random):
        least = round(1 / CHANCE) - 1
        said = f"{in_words(found.random)} So few cannot give a smaller p: ask for at least {least} (`--random {least}`)."
        return Check(question, said, None)
    return Check(question, in_words(found.random), found.random.p_value < CHANCE)


def _complete(found: Evaluation) -> Check:
    question = "Does it hold all that the model uses?"
    if found.completeness is None:
        return Check(
            question, "Not tested: `--completeness 20` takes nodes away from circuit and model alike.", None
        )
    worst, share = found.completeness.worst, found.completeness.worst_share
    of = f", {unit(share)} of the behaviour" if share is not None else ""
    return Check(
        question,
        f"Without the same {_nodes(found)} circuit and model differ by up to {signed(worst, 2)}{of}.",
        None if share is None else share <= COMPLETE,
    )


def _nodes(found: Evaluation) -> str:
    sizes = [len(removal.nodes) for removal in found.completeness.removals] if found.completeness else []
    if not sizes:
        return "nodes"
    return f"{min(sizes)} to {max(sizes)} nodes" if min(sizes) < max(sizes) else f"{max(sizes)} node(s)"


def _minimal(found: Evaluation) -> Check:
    question = "Is every node needed?"
    if found.minimality is None:
        return Check(question, "Not tested: `--minimality` takes each node away.", None)
    spare = found.minimality.superfluous
    limit = f"{100 * found.minimality.limit:g} %"
    if not spare:
        return Check(
            question, f"Each of {count(len(found.minimality.nodes))} nodes changes at least {limit}.", True
        )
    return Check(
        question,
        f"{count(len(spare))} of {count(len(found.minimality.nodes))} nodes change less than {limit} of the behaviour "
        "in any context tried.",
        False,
    )


def _stable(found: Evaluation) -> Check:
    question = "Would other pairs have given the same circuit?"
    if found.stability is None:
        return Check(
            question,
            "Not tested: `--stability 20` selects again on bootstraps of the pairs (with `edges --keep-pairs`).",
            None,
        )
    low, high = found.stability.interval
    return Check(
        question,
        f"Circuits of {count(found.stability.draws)} bootstraps share {found.stability.jaccard:.2f} of their edges "
        f"(Jaccard; {low:.2f} to {high:.2f}).",
        found.stability.jaccard >= STABLE,
    )


def _agrees(found: Evaluation) -> Check | None:
    if not found.overlaps:
        return None
    said = "; ".join(
        f"{overlap.reference}: {count(overlap.common)} of its {count(overlap.truth)} {overlap.level}s found"
        for overlap in found.overlaps[-2:]
    )
    return Check("Does it agree with a reference?", f"{said}.", None)
