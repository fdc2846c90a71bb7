"""A made-up scoreboard with every shape of data: three families, node and edge methods, gaps, seeds, notes."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from patchkit.results.convention import Convention
from patchkit.results.scoreboard import Case, Family, MethodOnCase, Missed, Ranking, Scoreboard
from patchkit.results.scoreboard_measures import all_means

KEPT = Convention(
    metric="logit-diff", direction="noise", ablation="resample", positions="all", patching="edge"
)
FRACTIONS = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0]
KINDS = {
    "saturated attention": "a one-hot attention has no gradient to its queries and keys",
    "saturated MLP": "a step that is at its end has no gradient",
    "cancellation": "two paths whose gradients cancel and whose effects do not",
    "redundancy": "others do the same work, so that none is missed alone",
    "backup": "it waits for another to fail",
    "works against": "its effect has the other sign",
}
#: Method -> how good (0 to 1), forwards a pair, and the kinds that it misses.
NODE_METHODS: dict[str, tuple[float, float, tuple[str, ...]]] = {
    "exact": (1.0, 24.0, ("redundancy", "backup")),
    "atp": (0.8, 3.0, ("saturated attention", "saturated MLP", "cancellation", "redundancy", "backup")),
    "atp-qk": (0.86, 3.0, ("saturated MLP", "cancellation", "redundancy", "backup")),
    "atp-graddrop": (0.84, 4.0, ("saturated attention", "saturated MLP", "redundancy", "backup")),
    "atp-star": (0.94, 4.0, ("saturated MLP", "redundancy", "backup")),
    "subsampling": (0.7, 20.0, ("backup",)),
    "blocks": (0.6, 5.0, ("backup", "cancellation")),
    "hierarchical": (0.9, 30.0, ("redundancy", "backup")),
    "mask": (0.88, 300.0, ("cancellation",)),
    "random nodes": (0.0, 0.0, tuple(KINDS)),
}
EDGE_METHODS: dict[str, tuple[float, float, tuple[str, ...]]] = {
    "exact edges": (1.0, 140.0, ("redundancy", "backup")),
    "eap": (0.75, 4.0, ("saturated attention", "saturated MLP", "cancellation", "redundancy", "backup")),
    "eap-qk": (0.82, 4.0, ("saturated MLP", "cancellation", "redundancy", "backup")),
    "eap-graddrop": (0.8, 11.0, ("saturated attention", "saturated MLP", "redundancy", "backup")),
    "eap-star": (0.92, 12.0, ("saturated MLP", "redundancy", "backup")),
    "eap-ig-inputs": (0.95, 12.0, ("redundancy", "backup")),
    "eap-ig-midpoint": (0.95, 12.0, ("redundancy", "backup")),
    "eap-ig-activations": (0.9, 240.0, ("redundancy", "backup")),
    "clean-corrupted": (0.85, 5.0, ("redundancy", "backup", "saturated MLP")),
    "acdc": (0.8, 400.0, ("redundancy", "backup", "works against")),
    "ifr": (0.4, 3.0, ("works against", "cancellation")),
    "random edges": (0.0, 0.0, tuple(KINDS)),
}
PROGRAMS = (
    "induction", "lookup", "saturated-lookup", "saturated-mlp", "cancelling-gradient", "cancelling-pair", "negative",
    "majority", "backup", "previous-token", "two-hop", "copy", "count", "argmax", "addition", "comparison",
)  # fmt: skip
SHAPES = ("llama", "gqa", "gpt2")


def ranking(generator: random.Random, quality: float, misses: Sequence[str], single: bool = True) -> Ranking:
    """Scores of this quality, 0 for chance and 1 for all found, that miss some kinds."""
    auroc = min(1.0, max(0.0, 0.5 + 0.5 * quality + generator.uniform(-0.08, 0.03)))
    held = [("", 6), *((kind, 2) for kind in KINDS)]
    missed = [
        Missed(kind=kind, missed=(lost := round(total * (0.9 if kind in misses else 0.6 * (1 - quality)))), total=total,
               names=[f"a0.h{i}" for i in range(lost)])
        for kind, total in held
    ]  # fmt: skip
    return Ranking(
        auroc=auroc, interval=(max(0.0, auroc - 0.05), min(1.0, auroc + 0.05)),
        single=max(0.0, auroc - 0.1) if single else None, precision=max(0.0, 2 * auroc - 1), missed=missed,
    )  # fmt: skip


def node_row(method: str, generator: random.Random, **changed: Any) -> MethodOnCase:
    quality, cost, misses = NODE_METHODS[method]
    fields: dict[str, Any] = {
        "method": method,
        "cost": cost * generator.uniform(0.8, 1.2),
        "nodes": ranking(generator, quality, misses, single=method != "mask"),
        "inputs": ranking(generator, quality, misses) if method.startswith(("exact", "atp", "random")) else None,
        "edges": ranking(generator, 0.6 * quality, misses),
        "faithfulness": quality * generator.uniform(0.8, 1.1),
        "n_edges": None,
        "overlap": quality * generator.uniform(0.6, 1.0),
        "seeds": [0.5, 0.52, 0.47] if method in ("random nodes", "subsampling") else [],
    }  # fmt: skip
    return MethodOnCase(**(fields | changed))


def edge_row(method: str, generator: random.Random, **changed: Any) -> MethodOnCase:
    quality, cost, misses = EDGE_METHODS[method]
    curve = [round(quality * fraction**0.15, 3) for fraction in FRACTIONS]
    whole = method == "acdc"
    fields: dict[str, Any] = {
        "method": method,
        "cost": cost * generator.uniform(0.8, 1.2),
        "nodes": ranking(generator, quality, misses, single=not whole),
        "inputs": ranking(generator, quality, misses, single=not whole),
        "edges": ranking(generator, quality, misses, single=not whole),
        "faithfulness": quality * generator.uniform(0.7, 1.1),
        "n_edges": 18,
        "overlap": quality * generator.uniform(0.5, 1.0),
        "cpr": None if whole else 0.9 * quality,
        "cmd": None if whole else 1 - 0.95 * quality,
        "curve": [] if whole else [None, *curve[1:]],
        "note": "a circuit, not scores" if whole else "",
    }
    return MethodOnCase(**(fields | changed))


def case(
    name: str, title: str, family: Family, seed: int = 0, methods: Sequence[str] | None = None, **changed: Any
) -> Case:
    generator = random.Random(f"{name} {seed}")
    asked = [*NODE_METHODS, *EDGE_METHODS] if methods is None else methods
    rows = [node_row(m, generator) if m in NODE_METHODS else edge_row(m, generator) for m in asked]
    fields: dict[str, Any] = {
        "name": name, "family": family, "title": title, "model": name, "architecture": name.rsplit("-", 1)[-1],
        "task": "the digit bound to the last letter: `a = 3 , b = 7 , b` -> `7`", "shows": f"what {title} plants",
        "layers": 3, "heads": 4, "kv_heads": 2 if "gqa" in name else 4, "pairs": 32, "test_pairs": 32, "n_nodes": 15,
        "n_edges": 412, "true_nodes": 4, "true_edges": 18,
        "silent": ["a0.h1", "a0.h1->m1"] if "majority" in name else [],
        "unlabelled_edges": 3 if family == "siit" else 0, "base_metric": 8.25, "source_metric": -7.5,
        "truth_faithfulness": 1.0 if family == "handmade" else 0.94, "truth_rule": f"of {family} cases: as it was made",
        "methods": rows, "seconds": 12.5,
    }  # fmt: skip
    return Case(**(fields | changed))


def cases() -> list[Case]:
    """About fifty."""
    made = [case(f"{program}-{shape}", program, "handmade") for program in PROGRAMS for shape in SHAPES]
    made += [case(f"siit-{task}", task, "siit") for task in ("bind", "add", "induct", "order")]
    made += [
        case(model, task, "natural")
        for model, task in (("varbind", "binding"), ("ioi-gpt2", "ioi"), ("ind-2l", "copy"))
    ]
    return made


def board(
    made: Sequence[Case] | None = None, methods: Mapping[str, str] | None = None, **changed: Any
) -> Scoreboard:
    """A scoreboard of some cases, with the means that go with them; `changed` replaces fields."""
    made = cases() if made is None else list(made)
    if methods is None:
        methods = {name: f"what {name} is" for name in [*NODE_METHODS, *EDGE_METHODS]}
    fields: dict[str, Any] = {
        "question": "Which method finds a circuit that is `known`?", "date": "2026-11-27",
        "versions": {"patchkit": "0.1.0", "torch": "2.13.0"}, "convention": KEPT,
        "parameters": {"pairs": "32", "steps of EAP-IG": "5"}, "fractions": FRACTIONS, "methods": dict(methods),
        "kinds": KINDS, "cases": made, "means": all_means(made, methods),
        "findings": ["Of nodes `atp-star` is nearly as good as exact patching.", "Nothing finds a backup."],
        "best": {"Which nodes matter?": "atp-star: AUROC 0.96 at 4 forwards", "Which edges?": "eap-ig-inputs"},
        "command": "patchkit study ground-truth --out DIR", "seconds": 3725.0,
    }  # fmt: skip
    return Scoreboard(**(fields | changed))


def bare_row(method: str) -> MethodOnCase:
    """A row of which nothing was measured but the cost."""
    return MethodOnCase(method=method, cost=0.0, nodes=None, edges=None, faithfulness=None)


def smallest() -> Scoreboard:
    """One case and two methods, with a number of every kind."""
    methods = ("atp", "eap")
    return board(
        [case("lookup-llama", "lookup", "handmade", methods=methods)], {method: "" for method in methods}
    )
