"""The sentences of the page of scores that depend on numbers, and the conventions those numbers come with."""

from __future__ import annotations

from patchkit.report._html import count, decimals, duration, signed
from patchkit.report._words import where
from patchkit.results.manifest import Manifest
from patchkit.results.scores import Scores

METHODS = {
    "exact": "exact activation patching",
    "atp": "AtP",
    "atp-qk": "AtP with the QK fix",
    "atp-graddrop": "AtP with GradDrop",
    "atp-star": "AtP*",
}
_HOW = {
    "exact": "Exact: every node was patched by itself, in a run of its own.",
    "atp": "AtP: (what is put in - what is there) times the metric's gradient there, one backward for all nodes.",
    "atp-qk": "AtP; for queries and keys the attention pattern is recomputed exactly and linear only after the softmax.",
    "atp-graddrop": "AtP; |effect| is the mean over layers of |effect| without that layer's gradient, times L/(L-1).",
    "atp-star": "AtP* (arXiv 2403.00745): attention patterns of patched queries and keys recomputed, and |effect| "
    "the mean over layers of |effect| without that layer's gradient, times L/(L-1).",
}


def method_name(scores: Scores) -> str:
    """The method as a person says it."""
    return METHODS.get(scores.method, scores.method)


def runs(scores: Scores) -> tuple[str, str]:
    """(base, source): which prompts are run and which the activations come from."""
    return ("clean", "corrupt") if scores.convention.direction == "noise" else ("corrupt", "clean")


def put_in(scores: Scores) -> str:
    """What stands in for a node's activation."""
    said = {
        "resample": f"its activation on the {runs(scores)[1]} prompt",
        "mean": "its mean activation over the reference prompts",
        "zero": "zeros",
        "noise": "its own activation with Gaussian noise added",
    }
    return said.get(scores.convention.ablation, scores.convention.ablation)


def means(scores: Scores) -> dict[str, float]:
    """Mean metric of the clean and of the corrupt prompts; NaN where a run has none."""
    base, source = (float(metric.double().mean()) for metric in (scores.base_metric, scores.source_metric))
    return dict(zip(runs(scores), (base, source), strict=True))


def headline(scores: Scores) -> str:
    """Which nodes matter most, and what the first of them does."""
    top = [entry for entry in scores.top(3) if entry[2] > 0]
    nodes, pairs = int(scores.computed.sum()), len(scores.pair_ids)
    if not top:
        return f"None of {count(nodes)} nodes changes {scores.convention.metric} when it is patched."
    names = [name for name, _, _ in top]
    several = f"{', '.join(names[:-1])} and {names[-1]} matter" if len(names) > 1 else f"{names[0]} matters"
    name, mean, size = top[0]
    places = decimals(size)
    over = f"on average over {count(pairs)} pairs" if pairs > 1 else "on the one pair"
    if abs(mean) < 0.5 * size:
        change = (
            f"{signed(size, places)} in size {over}, up and down (mean {signed(mean, places, plus=True)})"
        )
    else:
        change = f"{signed(mean, places, plus=True)} {over}"
    does = "changes" if scores.method == "exact" else "is estimated to change"
    base = runs(scores)[0]
    return (
        f"Of {count(nodes)} nodes, {several} most. {_doing(scores, name)} {does} "
        f"{scores.convention.metric} by {change}; without a patch it is {signed(means(scores)[base], places)}."
    )


def _doing(scores: Scores, name: str) -> str:
    """Patching a node, as the beginning of a sentence."""
    base, source = runs(scores)
    said = {
        "resample": f"Putting the {source} prompt's {name} into the {base} run",
        "mean": f"Putting the mean {name} of the reference prompts into the {base} run",
        "zero": f"Setting {name} to zero in the {base} run",
        "noise": f"Adding noise to {name} in the {base} run",
    }
    return said.get(scores.convention.ablation, f"Patching {name} in the {base} run")


def warning(scores: Scores) -> str:
    """What forbids reading the effects as a finding; empty when nothing does."""
    metric = means(scores)
    if metric["clean"] > metric["corrupt"] or any(value != value for value in metric.values()):
        return ""
    return (
        f"This says little: {scores.convention.metric} of the clean prompts ({signed(metric['clean'], 2)}) is not above "
        f"that of the corrupt ones ({signed(metric['corrupt'], 2)}), so the model does not show the behaviour here."
    )


def blind_spots(scores: Scores) -> list[str]:
    """What the method cannot see, and what these scores in particular leave open."""
    attends = bool({"q", "k", "q_proj", "k_proj"} & set(scores.grid.kinds))
    vectors = [kind for kind in scores.grid.kinds if kind.startswith("resid")]
    notes = [
        "A node was patched alone: backups that step in for each other, and nodes that only matter together, look weak."
        if scores.method == "exact"
        else "An estimate is linear in the patch: it is least sure for large effects and for nodes early in the model."
    ]
    if scores.method in ("atp", "atp-graddrop") and attends:
        notes.append(
            "Where attention is saturated, a query or key that would move the whole pattern has almost no gradient: its "
            "estimate is near 0, or of the wrong sign. `--method atp-star` recomputes the pattern."
        )
    if scores.method in ("atp", "atp-qk"):
        notes.append(
            "A direct effect and an opposite one through later layers cancel in the gradient; `--method atp-star` drops "
            "each layer's gradient in turn."
        )
    if scores.method in ("atp-graddrop", "atp-star"):
        notes.append(
            "|effect| is a mean over drops and can be larger than the size of the mean effect: it ranks the nodes; the "
            "signed mean is the one without drops."
        )
    if scores.method != "exact" and vectors:
        notes.append(
            f"For whole residual-stream vectors ({', '.join(vectors)}) the linear estimate is poor and exact patching "
            "cheap: use `patchkit patch`."
        )
    if scores.method != "exact" and scores.verification is None:
        notes.append(
            "No estimate was checked: `--verify K` patches the top K and a sample of the rest exactly."
        )
    if len(scores.pair_ids) == 1:
        notes.append("There is one pair: nothing here says how another prompt would come out.")
    if scores.convention.ablation in ("zero", "noise"):
        notes.append(
            f"The ablation `{scores.convention.ablation}` takes the model off its usual activations: an effect may come "
            "from that and not from what the node says."
        )
    return notes


def conventions(scores: Scores, manifest: Manifest | None) -> list[tuple[str, str]]:
    """Term and meaning of everything a number on the page depends on (text)."""
    base, source = runs(scores)
    kept = scores.convention
    entries = [
        ("effect", "metric(base run with the patch) - metric(base run), per pair. Negative: the patch lowers it."),
        ("method", _HOW.get(scores.method, scores.method)),
        ("metric", f"{kept.metric}; higher is more of the behaviour, and it is never negated."),
        ("direction", f"{kept.direction}: the {base} prompt is run (base), the {source} prompt is the source."),
        ("ablation", f"{kept.ablation}: put in is {put_in(scores)}."),
        ("positions", _positions(scores)),
        ("mean |effect|", "the absolute value of each pair's effect, then the mean: nodes are ranked by it."),
        ("95 % interval", "of the mean effect: percentile bootstrap over pairs, 1,000 draws."),
        ("nodes", f"{count(int(scores.computed.sum()))} of kinds {', '.join(scores.grid.kinds)}."),
        ("cost", _cost(scores)),
    ]  # fmt: skip
    if manifest is not None:
        entries += [
            (term, said)
            for term, said in (
                ("seed", None if manifest.seed is None else str(manifest.seed)),
                ("time", duration(manifest.seconds) if manifest.seconds else None),
            )
            if said
        ]
    return entries


def _positions(scores: Scores) -> str:
    text = scores.convention.positions
    if not scores.grid.placed:
        return f"{text}: nodes are patched {where(text)}."
    shown = "one node a position" if text == "each" else "one node a place"
    return f"{text}: {shown}; positions count real tokens from 0, not padding."


def _cost(scores: Scores) -> str:
    parts = [f"scores {_forwards(scores.cost)}"]
    if scores.verification is not None:
        parts.append(f"exact checks {_forwards(scores.verification.cost)}")
    if scores.bound is not None:
        parts.append(f"bound {_forwards(scores.bound.cost)}")
    dropped = (
        f" GradDrop: {count(scores.layer_backwards)} layer-backwards a batch beyond the ordinary backward."
        if scores.layer_backwards
        else ""
    )
    return f"{', '.join(parts)} forward-equivalents; 1 is one forward over every base prompt.{dropped}"


def _forwards(cost: float) -> str:
    return f"{cost:,.1f}"
