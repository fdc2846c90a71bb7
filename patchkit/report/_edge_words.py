"""The sentences of the page of edges that depend on numbers."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from patchkit.report._html import count, decimals, signed, unit
from patchkit.report._largest import largest
from patchkit.results.edge_scores import EdgeScores

METHODS = {
    "eap": "EAP",
    "eap-ig-inputs": "EAP-IG (inputs)",
    "eap-ig-activations": "EAP-IG (activations)",
    "clean-corrupted": "EAP at both ends",
    "exact": "exact edge patching",
    "acdc": "ACDC",
    "ifr": "information-flow routes",
}


def method_name(scores: EdgeScores) -> str:
    """The method as a person says it, with the corrections that were asked for."""
    name = METHODS.get(scores.method.name, scores.method.name)
    if scores.method.name == "eap" and scores.method.qk_fix and scores.method.grad_drop:
        return "AtP* for edges"
    added = [
        said
        for said, on in (("the QK fix", scores.method.qk_fix), ("GradDrop", scores.method.grad_drop))
        if on
    ]
    return f"{name} with {' and '.join(added)}" if added else name


def flows(scores: EdgeScores) -> bool:
    """Whether scores are shares of a stream and not effects on a metric."""
    return scores.method.name == "ifr"


def what(scores: EdgeScores) -> str:
    """What the size of an edge's score is called."""
    return "share" if flows(scores) else "|effect|" if len(scores.pair_ids) == 1 else "mean |effect|"


def runs(scores: EdgeScores) -> tuple[str, str]:
    """(base, source): which prompts are run and which the activations come from."""
    return ("clean", "corrupt") if scores.convention.direction == "noise" else ("corrupt", "clean")


def put_in(ablation: str, source: str) -> str:
    """What a cut edge carries."""
    said = {
        "resample": f"what its sender writes on the {source} prompt",
        "mean": "its sender's mean over the reference prompts and their positions",
        "mean-positional": "its sender's mean over the reference prompts, position by position",
        "zero": "nothing (zeros)",
    }
    return said.get(ablation, ablation)


def sizes(scores: EdgeScores) -> Float[Tensor, "*places senders receivers"]:
    """What edges are ranked by: mean |effect|. Of routes without those alone at their receiver, which are always 1."""
    if not flows(scores):
        return scores.mean_abs
    return scores.mean_abs.masked_fill(scores.graph.upstream == 1, torch.nan)


def ranked(scores: EdgeScores, k: int) -> list[tuple[int, float, float]]:
    """The k largest edges: (place in the flattened tensor, mean, mean |effect|); ties by number."""
    flat = sizes(scores).flatten()
    order = largest(flat, k)
    return list(zip(order.tolist(), scores.mean.flatten()[order].tolist(), flat[order].tolist(), strict=True))


def scored(scores: EdgeScores) -> int:
    """How many edges (at places: edges of a place) have a score."""
    return int((~scores.mean_abs.isnan()).sum())


def unscored(scores: EdgeScores) -> int:
    """How many edges of the graph have none."""
    return len(scores.places if scores.placed else (0,)) * scores.graph.n_edges - scored(scores)


def means(scores: EdgeScores) -> dict[str, float]:
    """Mean metric of the clean and of the corrupt prompts; NaN where a run has none."""
    base, source = (float(metric.double().mean()) for metric in (scores.base_metric, scores.source_metric))
    return dict(zip(runs(scores), (base, source), strict=True))


def headline(scores: EdgeScores) -> str:
    """Which edges matter most, and what the first of them does."""
    if scores.method.name == "acdc" and scores.circuit is not None:
        return _kept(scores)
    top = [(scores.name(number), mean, size) for number, mean, size in ranked(scores, 3) if size > 0]
    edges, pairs = scored(scores), len(scores.pair_ids)
    unit_of = "edges" if not scores.placed else "edges at positions"
    if not edges:
        return "No edge was scored."
    if not top:
        does = "carries anything" if flows(scores) else f"changes {scores.convention.metric} when it is cut"
        return f"None of {count(edges)} {unit_of} {does}."
    names = [name for name, _, _ in top]
    several = f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]
    name, mean, size = top[0]
    sender, _, receiver = name.partition("->")
    if flows(scores):
        verb = "carry" if len(names) > 1 else "carries"
        return (
            f"Of {count(edges)} {unit_of}, {several} {verb} most: {unit(size)} of what {receiver} reads comes from "
            f"{sender}."
        )
    places = decimals(size)
    over = f"on average over {count(pairs)} pairs" if pairs > 1 else "on the one pair"
    change = f"{signed(mean, places, plus=True)} {over}"
    if abs(mean) < 0.5 * size:
        change = (
            f"{signed(size, places)} in size {over}, up and down (mean {signed(mean, places, plus=True)})"
        )
    does = "changes" if scores.method.name == "exact" else "is estimated to change"
    base = runs(scores)[0]
    matter = "matter" if len(names) > 1 else "matters"
    return (
        f"Of {count(edges)} {unit_of}, {several} {matter} most. Cutting {name} {does} {scores.convention.metric} by "
        f"{change}; with every edge whole it is {signed(means(scores)[base], places)}."
    )


def _kept(scores: EdgeScores) -> str:
    circuit, total, untried = scores.circuit, scores.graph.n_edges, scores.method.untried
    if circuit is None or circuit.is_empty:
        return f"ACDC kept none of {count(total)} edges: at this threshold nothing is worth keeping."
    share = unit(circuit.n_edges / total)
    kept = f"{count(circuit.n_edges)} of {count(total)} edges ({share}), among {count(int(circuit.nodes.sum()))} nodes"
    if untried:
        return f"When its budget ended, ACDC had kept {kept}; {count(untried)} edges it had not tried."
    return (
        f"ACDC kept {kept}: cutting any one of the others cost less than {scores.method.threshold:g} of "
        f"{scores.convention.metric}."
    )


def warnings(scores: EdgeScores) -> list[str]:
    """What forbids reading the scores as a finding, or limits it."""
    found = []
    metric = means(scores)
    if not flows(scores) and metric["clean"] <= metric["corrupt"]:
        found.append(
            f"This says little: {scores.convention.metric} of the clean prompts ({signed(metric['clean'], 2)}) is not "
            f"above that of the corrupt ones ({signed(metric['corrupt'], 2)}), so the model does not show the "
            "behaviour here."
        )
    if scores.method.untried:
        found.append(
            f"The budget ended before {count(scores.method.untried)} edges were tried: they are still in the circuit, "
            "unless they are dead ends, because nothing is known of them. Run it again with a larger "
            "`--max-forwards`."
        )
    missing = unscored(scores)
    if missing and scores.method.name != "acdc":
        found.append(
            f"{count(missing)} of {count(scored(scores) + missing)} edges were not scored: shares and ranks below are "
            "of those that were."
        )
    return found
