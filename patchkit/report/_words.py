"""The sentences of the page that depend on numbers, and the conventions every number comes with."""

from __future__ import annotations

from patchkit.report._html import count, duration, unit
from patchkit.results.manifest import Manifest
from patchkit.results.mask import MaskResult

_SETS = {
    "complement": "all the other components",
    "random": "random sets of the same size",
    "all": "every component",
    "empty": "nothing",
}


def where(position: str) -> str:
    """The patched position in words."""
    named = {"last": "at the last token", "all": "at all positions together"}
    return named.get(position, f"at position {position}")


def best_baseline(result: MaskResult) -> tuple[str, float]:
    """The comparison set that comes closest to the chosen one, by joint score; random sets by their best."""
    scores = {key: result.joint[key] for key in ("complement", "all", "empty")}
    scores["random"] = max(result.random_joint, default=result.joint["random"])
    best = max(scores, key=lambda key: scores[key])
    return best, scores[best]


def headline(result: MaskResult) -> str:
    """The answer in one sentence, with its baselines."""
    total = count(result.n_components)
    if not result.chosen:
        return (
            f"None of {total} components was chosen; with nothing patched the joint score is "
            f"{unit(result.joint['empty'])}."
        )
    joint = result.joint
    size = f"{count(len(result.chosen))} of {total} components ({unit(result.fraction)})"
    return (
        f"Patching {size} {where(result.position)} reaches {unit(joint['chosen'])} {joint_of(result)}; "
        f"patching all the others {unit(joint['complement'])}, random sets of the same size "
        f"{unit(joint['random'])} on average, nothing {unit(joint['empty'])}."
    )


def joint_of(result: MaskResult) -> str:
    """What the joint score is the minimum over, in words."""
    trained = [scores.name for scores in result.desiderata if scores.trained]
    if len(trained) == 1:
        return f"on {trained[0]}"
    if len(trained) == 2:
        return f"on {trained[0]} and {trained[1]} together (the lower of the two)"
    return f"on {len(trained)} desiderata together (the lowest of them)"


def warning(result: MaskResult) -> str:
    """What forbids reading the headline as a finding; empty when nothing does."""
    if not result.chosen:
        return "Nothing was chosen, so there is nothing to compare: the sparsity penalty was too strong or no set works."
    name, score = best_baseline(result)
    if result.joint["chosen"] > score:
        return ""
    who = "the best random set of the same size" if name == "random" else _SETS[name]
    return (
        f"This is no finding: patching {who} reaches {unit(score)}, at least as much as the chosen set "
        f"({unit(result.joint['chosen'])})."
    )


def state(manifest: Manifest | None) -> str:
    """What is wrong with a run that did not end well, or that went without some of its pairs; empty otherwise."""
    if manifest is None:
        return ""
    said = []
    if manifest.status not in ("done", "running"):
        reason = f": {manifest.error}" if manifest.error else ""
        ended = "was interrupted" if manifest.status == "interrupted" else "failed"
        said.append(f"The run {ended}{reason}. Shown is what it had reached.")
    if manifest.pairs is not None and manifest.pairs.failures:
        failures = manifest.pairs.failures
        said.append(
            f"{count(len(failures))} of {count(manifest.pairs.total)} gave no numbers, and all results are without them. "
            f"The first is {failures[0].id}: {failures[0].reason}."
        )
    return " ".join(said)


def conventions(result: MaskResult, manifest: Manifest | None) -> list[tuple[str, str]]:
    """Term and meaning of everything a number on the page depends on (text)."""
    entries = [
        (
            "w",
            "w = 1 keeps the original prompt's activation, w = 0 puts in the alternate's: "
            "w × original + (1 − w) × alternate. Chosen: w rounded to 0.",
        ),
        (
            "direction",
            "The original prompt is run, activations of the alternate prompt are put in. Every score is the fraction "
            "of held-out triples whose most likely next token is the target.",
        ),
        (
            "position",
            f"Components are patched {where(result.position)}; positions count real tokens, not padding.",
        ),
        ("components", f"{', '.join(result.components)}: {count(result.n_components)} in all."),
        (
            "dependence, invariance",
            "Dependence: with the patch the answer must become the target, which differs from the original's answer. "
            "Invariance: it must stay the original's; with nothing patched an invariance is met for free.",
        ),
        (
            "joint score",
            "The minimum over the desiderata the mask was trained on. Patching too much fails an invariance, patching "
            "too little a dependence: only both together say something.",
        ),
        (
            "baselines",
            f"Nothing patched, every component, all but the chosen, and {count(len(result.random_joint))} random sets "
            "of the chosen size.",
        ),
        ("loss", result.loss),
        ("sparsity", result.sparsity),
    ]
    if result.stopped:
        entries.append(("training ended", result.stopped))
    if manifest is not None:
        entries.extend(run_facts(manifest))
    return entries


def run_facts(manifest: Manifest) -> list[tuple[str, str]]:
    """What the manifest adds to the conventions, where it says anything."""
    facts = [
        ("metric", manifest.metric),
        ("ablation", manifest.ablation),
        ("seed", None if manifest.seed is None else str(manifest.seed)),
        ("cost", None if manifest.cost is None else f"{manifest.cost:,.0f} forward-equivalents"),
        ("time", duration(manifest.seconds) if manifest.seconds else None),
    ]
    return [(term, said) for term, said in facts if said]
