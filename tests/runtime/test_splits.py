"""What a pair gives depends on nothing but the pair: not on its batch, the order, what ran out, or what broke off.

In float64 a neighbour, a column of padding or a lost item would show at once, and rounding does not. In float32 the
embedded models' numbers are held to a few units in the last place of the metric.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from torch import Tensor

from patchkit.data import Batch, Pair, Triple
from patchkit.methods._edge_options import EdgeOptions
from patchkit.methods._edge_replacement import EdgeReplacement
from patchkit.methods._edge_sweep import PatchEdges
from patchkit.methods._evaluate_repair import DirectEffects
from patchkit.methods._mask_layout import Layout
from patchkit.methods._mask_prepare import Preparation
from patchkit.methods._mask_prepared import prepare
from patchkit.methods._mask_steps import Gradient
from patchkit.methods._mask_triples import OwnAnswers
from patchkit.methods._node_options import NodeOptions
from patchkit.methods._path_program import PatchPaths
from patchkit.methods._scrub_draws import draw
from patchkit.methods._scrub_reading import read_hypothesis
from patchkit.methods.activation_patching import PatchSets, patch_nodes
from patchkit.methods.attribution import METHODS, Attribution, PairItem, attribute
from patchkit.methods.causal_scrubbing import Scrub, ScrubItem
from patchkit.methods.circuits import RunCircuits, run_circuits
from patchkit.methods.edge_attribution import EdgeAttribution, attribute_edges
from patchkit.methods.edge_patching import patch_edges
from patchkit.methods.path_patching import patch_paths
from patchkit.model import PatchModel
from patchkit.model.edges import EdgeGraph
from patchkit.results.circuit import Circuit
from patchkit.results.edge_scores import EdgeScores
from patchkit.results.scores import Scores
from patchkit.runtime import Journal, Session, run_program
from patchkit.runtime.sessions import Gathered
from patchkit.zoo.load import load
from tests.comparisons import pair as opened
from tests.scrub_oracle import mixed
from tests.trained_pairs import trained
from tests.ways import Attempt, Call, Way, check_equal, run_alone, run_in_a_way, ways

#: In the lane of what takes longest.
pytestmark = pytest.mark.nightly

FAMILIES = ("llama-gqa", "gpt2", "neox-parallel", "gemma2-post-norms-softcap")
#: Families whose norms transformers computes in float32 whatever the model's dtype.
IN_FLOAT32 = ("llama-gqa", "gemma2-post-norms-softcap")
TRAINED = {"ioi-gpt2": "ioi", "varbind-llama-gqa": "variable-binding"}
LENGTHS = (3, 10, 5, 8, 11)
PREAMBLE = (12, 7, 19, 30)
#: Names of tensors that are the metric itself.
METRICS = {"base", "source", "clean", "corrupt", "model"}


@functools.cache
def random_pairs() -> tuple[Pair, ...]:
    """Pairs of several lengths; some begin alike, so that they share a prefix."""
    drawn, found = random.Random(5), []
    for number, length in enumerate(LENGTHS):
        head = PREAMBLE if length > 6 else ()
        clean = [*head, *(drawn.randrange(3, 37) for _ in range(length - len(head)))]
        corrupt = list(clean)
        for place in drawn.sample(range(len(head), length), 2):
            corrupt[place] = 3 + (corrupt[place] + 11) % 34
        answer, wrong = drawn.sample(range(3, 37), 2)
        found.append(_with_span(Pair(tuple(clean), tuple(corrupt), answer, wrong, {}, f"p{number}")))
    return tuple(found)


def _with_span(pair: Pair) -> Pair:
    middle = len(pair.clean_ids) // 2
    return replace(pair, spans={"s": (middle - 1, middle + 1)})


@functools.cache
def material(name: str, dtype: torch.dtype) -> tuple[PatchModel, tuple[Pair, ...]]:
    """A random model or an embedded one, and the pairs that are run on it."""
    if name in FAMILIES:
        model, pairs = opened(name, dtype)[0], random_pairs()
    else:
        model, _, drawn = trained(name, TRAINED[name], len(LENGTHS))
        model = model if dtype == torch.float32 else load(name, dtype=dtype)
        pairs = tuple(_with_span(pair) for pair in drawn)
    _POOL_OF.update(dict.fromkeys(map(id, pairs), pairs))
    return model, pairs


#: By a pair: those that it was drawn with.
_POOL_OF: dict[int, tuple[Pair, ...]] = {}


@dataclass(frozen=True)
class Case:
    """A method: the Program whose batches are disturbed, and how it is called.

    Attributes:
        summed: those of its tensors that are sums over the pairs.
        function: that runs a batch.
    """

    program: type
    call: Call
    summed: frozenset[str] = frozenset()
    function: str = "run"


def _journal(directory: Path | None) -> Journal | None:
    return None if directory is None else Journal(directory)


def _of_scores(scores: Scores) -> dict[str, Tensor]:
    return {
        "effects": scores.effects,
        "magnitudes": scores.magnitudes,
        "base": scores.base_metric,
        "source": scores.source_metric,
    }


def _nodes(method: str, **options: Any) -> Call:
    def call(model: PatchModel, pairs: Sequence[Pair], budget: int, to: Path | None) -> Mapping[str, Tensor]:
        asked = NodeOptions(max_batch_tokens=budget, **options)
        if method == "exact":
            return _of_scores(patch_nodes(model, pairs, asked, checkpoint=to))
        return _of_scores(attribute(model, pairs, asked, method, checkpoint=to))  # pyright: ignore[reportArgumentType]

    return call


def _of_edges(scores: EdgeScores) -> dict[str, Tensor]:
    count = len(scores.pair_ids)
    found = {"mean": scores.mean.double() * count, "mean_abs": scores.mean_abs.double() * count}
    if scores.by_query is not None:
        found["by_query"] = scores.by_query[0].double() * count
    assert scores.per_pair is not None
    return found | {"pairs": scores.per_pair, "base": scores.base_metric, "source": scores.source_metric}


def _edges(method: str, **given_options: Any) -> Call:
    def call(model: PatchModel, pairs: Sequence[Pair], budget: int, to: Path | None) -> Mapping[str, Tensor]:
        options = EdgeOptions(max_batch_tokens=budget)
        if method != "exact":
            found = attribute_edges(
                model,
                pairs,
                options,
                method,  # pyright: ignore[reportArgumentType]
                keep_pairs=True,
                checkpoint=to,
                **given_options,
            )
        else:
            found = patch_edges(
                model, pairs, options, edges=_some_edges(model), keep_pairs=True, checkpoint=to
            )
        return _of_edges(found)

    return call


def _some_edges(model: PatchModel, share: float = 0.1, seed: int = 0) -> Tensor:
    real = EdgeGraph.of(model.dims).real
    return real & (torch.rand(real.shape, generator=torch.Generator().manual_seed(seed)) < share)


def _paths(model: PatchModel, pairs: Sequence[Pair], budget: int, to: Path | None) -> Mapping[str, Tensor]:
    found = patch_paths(
        model, pairs, ["all"], ["logits", "m2"], EdgeOptions(max_batch_tokens=budget), checkpoint=to
    )
    effects = torch.tensor([each.per_pair for each in found.stages[0].effects], dtype=torch.float64)
    return {"effects": effects.T}


def _circuits(model: PatchModel, pairs: Sequence[Pair], budget: int, to: Path | None) -> Mapping[str, Tensor]:
    graph = EdgeGraph.of(model.dims)
    circuits = [Circuit(graph, _some_edges(model, share)) for share in (0.1, 0.6)]
    found = run_circuits(model, pairs, circuits, EdgeOptions(max_batch_tokens=budget), checkpoint=to)
    return {"metric": found.metric, "clean": found.clean, "corrupt": found.corrupt}


def _scrubbing(
    model: PatchModel, pairs: Sequence[Pair], budget: int, to: Path | None
) -> Mapping[str, Tensor]:
    """Draws are made once, from the whole pool: a pair's are not those that it would have alone."""
    everything = _POOL_OF[id(pairs[0])]
    draws = draw(mixed(model.dims.group), everything, None, samples=1, seed=0)
    reading = read_hypothesis(mixed(model.dims.group), EdgeGraph.of(model.dims), draws.inputs)
    trees = {id(pair): tree for pair, tree in zip(everything, draws.trees, strict=True)}
    items = [
        ScrubItem(tree, max(len(draws.inputs[n].clean_ids) for n in {tree.input, *tree.inputs()}))
        for tree in (trees[id(pair)] for pair in pairs)
    ]
    program = Scrub(reading, draws.inputs, "logit-diff")
    found = run_program(program, model, items, max_batch_tokens=budget, journal=_journal(to))
    return {name: found[name] for name in ("model", "scrubbed", "random")}


def _repair(model: PatchModel, pairs: Sequence[Pair], budget: int, to: Path | None) -> Mapping[str, Tensor]:
    group = torch.zeros(EdgeGraph.of(model.dims).n_senders, dtype=torch.bool)
    group[3] = True
    program = DirectEffects("logit-diff", "noise", EdgeReplacement("resample"), group)
    items = [PairItem(pair, (tuple(range(len(pair.clean_ids))),)) for pair in pairs]
    return run_program(program, model, items, max_batch_tokens=budget, journal=_journal(to))


def _answers(model: PatchModel, pairs: Sequence[Pair], budget: int, to: Path | None) -> Mapping[str, Tensor]:
    prompts = [tuple(pair.clean_ids) for pair in pairs]
    return run_program(OwnAnswers(), model, prompts, max_batch_tokens=budget, journal=_journal(to))


def _mask(model: PatchModel, pairs: Sequence[Pair], budget: int, to: Path | None) -> Mapping[str, Tensor]:
    """The gradient of a mask, and the answers under it."""
    layout = Layout.build(("head", "mlp"), model.dims)
    keep = torch.rand(layout.size, generator=torch.Generator().manual_seed(1))
    triples = [Triple("a", pair.clean_ids, pair.corrupt_ids, pair.answer_id) for pair in pairs]
    made = prepare(model, layout, {"a": triples}, max_batch_tokens=budget)
    with made.sessions[0] as session:
        step = Gradient("cross-entropy", keep, torch.ones(len(pairs)))
        found = session.run(step, journal=_journal(to))
    return {
        "loss": found["loss"],
        "gradient": found["gradient"],
        "answer": made.answers((keep > 0.5).float()),
        "own": made.original_answer,
    }


SUMS = frozenset({"mean", "mean_abs", "by_query"})
CASES = {
    "exact": Case(PatchSets, _nodes("exact", nodes=("z", "k", "resid_pre"))),
    "exact-places": Case(PatchSets, _nodes("exact", nodes=("mlp_out", "v_proj"), positions="s,-1")),
    "exact-noise": Case(PatchSets, _nodes("exact", nodes=("z",), ablation="noise", direction="denoise")),
    **{
        method: Case(Attribution, _nodes(method, nodes=("q", "k", "z", "neuron"), positions="s,-1"))
        for method in METHODS
    },
    "eap": Case(EdgeAttribution, _edges("eap"), SUMS),
    "eap-star": Case(EdgeAttribution, _edges("eap", qk_fix=True, grad_drop=True), SUMS),
    "eap-ig-inputs": Case(EdgeAttribution, _edges("eap-ig-inputs", steps=2), SUMS),
    "eap-ig-activations": Case(EdgeAttribution, _edges("eap-ig-activations", steps=2), SUMS),
    "clean-corrupted": Case(EdgeAttribution, _edges("clean-corrupted"), SUMS),
    "ifr": Case(EdgeAttribution, _edges("ifr"), SUMS),
    "edges": Case(PatchEdges, _edges("exact"), SUMS),
    "paths": Case(PatchPaths, _paths),
    "circuits": Case(RunCircuits, _circuits),
    "scrubbing": Case(Scrub, _scrubbing),
    "self-repair": Case(DirectEffects, _repair),
    "answers": Case(OwnAnswers, _answers),
    "mask": Case(Preparation, _mask, frozenset({"loss", "gradient"}), "open"),
}
#: Each case on two families of four, and on one embedded model.
ON_FAMILIES = [(case, FAMILIES[(n + k) % 4]) for n, case in enumerate(CASES) for k in (0, 1)]
ON_TRAINED = [(case, (*TRAINED, *TRAINED)[n % 2]) for n, case in enumerate(CASES)]
EDGE_GRADIENTS = [case for case, made in CASES.items() if made.program is EdgeAttribution]


@functools.cache
def alone(name: str, case: str, dtype: torch.dtype) -> list[Mapping[str, Tensor]]:
    model, pairs = material(name, dtype)
    return run_alone(CASES[case].call, model, pairs)


def check(name: str, case: str, way: Way, tolerance: float, dtype: torch.dtype = torch.float64) -> None:
    """Numbers are held to `tolerance` of the largest of their kind, or of the metric, whose differences they are."""
    model, pairs = material(name, dtype)
    expected = alone(name, case, dtype)
    sizes = [float(each[key].abs().max()) for each in expected for key in METRICS & each.keys()]
    found = run_in_a_way(CASES[case].call, CASES[case].program, model, pairs, way, CASES[case].function)
    check_equal(found, expected, way.order, tolerance, CASES[case].summed, max(sizes, default=0.0))


#: Shrinking a case that takes a second takes longer than reading it.
def quickly(examples: int) -> settings:
    return settings(deadline=None, max_examples=examples, phases=(Phase.explicit, Phase.generate))


@pytest.mark.parametrize(("case", "family"), ON_FAMILIES)
@quickly(3)
@given(way=ways(len(LENGTHS)))
def test_a_pair_gives_what_it_gives_alone(case: str, family: str, way: Way) -> None:
    # The norms of all but GPT-2 and GPT-NeoX are in float32 always, and means over pairs are kept in float32.
    check(family, case, way, 1e-6 if CASES[case].summed or family in IN_FLOAT32 else 1e-10)


@pytest.mark.parametrize(("case", "name"), ON_TRAINED)
@quickly(2)
@given(way=ways(len(LENGTHS), 200))
def test_a_pair_gives_what_it_gives_alone_in_float32(case: str, name: str, way: Way) -> None:
    # An edge's score is a sum of products that are larger than it.
    check(name, case, way, 4e-6 if case in EDGE_GRADIENTS else 1e-6, torch.float32)


@pytest.mark.parametrize("case", ["eap", "eap-ig-inputs", "clean-corrupted"])
def test_what_is_left_is_rounding(case: str) -> None:
    """The same embedded model in float64: its edges' scores differ by what a mean in float32 is rounded by."""
    check("ioi-gpt2", case, Way((4, 0, 3, 1, 2), (Attempt(90, 1), Attempt(70)), 120), 1.2e-7)


# That the comparison can fail.


def _unshifted(batch: Batch) -> Tensor:
    return torch.arange(batch.width).expand(batch.rows, -1)


def _twice(self: Any, items: Any, sums: Any) -> None:
    _TAKE(self, items, [*sums, *sums])


def _places(self: Session, step: Any) -> list[str]:
    return [str(number) for number in range(len(self.items))]


def _as_it_came(self: Any) -> dict[str, Tensor]:
    return self._sums | {name: torch.cat(rows) for name, rows in self._rows.items()}


_TAKE = Gathered.take_found
MIXED = Way((4, 0, 3, 1, 2), (Attempt(24, 2), Attempt(60)), None)
MISTAKES: dict[str, tuple[str, Any, str, Any]] = {
    "positions count padding": ("exact", Batch, "position_ids", property(_unshifted)),
    "results are in the order of the batches": ("exact", Gathered, "result", _as_it_came),
    "the journal's sums count twice": ("eap", Gathered, "take_found", _twice),
    "items are known by their places": ("atp", Session, "keys", _places),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_seen(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, owner, name, wrong = MISTAKES[mistake]
    check("gpt2", case, MIXED, 1e-6)
    monkeypatch.setattr(owner, name, wrong)
    with pytest.raises(AssertionError, match="off by"):
        check("gpt2", case, MIXED, 1e-6)
