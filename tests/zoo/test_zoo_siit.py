"""The models with a forced circuit: their programs by hand, and the circuits' checks rerun on the weights that ship."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import cache

import pytest
import torch
from transformers import PreTrainedModel

from patchkit import InputError, PatchModel, load, patch_edges, zoo
from patchkit.model import EdgeGraph
from patchkit.model.sites import parse_node
from patchkit.studies.siit_checks import _Runs, interchange_accuracy, non_circuit_change
from patchkit.zoo import siit
from patchkit.zoo.siit import CASES, SiitCase, Words
from tests import siit_oracle as oracle

NAMES = sorted(CASES)
ENOUGH, AT_MOST = 0.98, 0.02


@cache
def shipped(name: str) -> PatchModel:
    return load(name)


@cache
def untrained(name: str) -> PatchModel:
    """A model of the same shape with random weights, large ones: the usual small ones give every prompt one answer."""
    trained = shipped(name)
    torch.manual_seed(0)
    config = deepcopy(trained.hf.config)
    config.initializer_range = 0.3
    kind: Callable[..., PreTrainedModel] = type(trained.hf)
    return load(kind(config).eval(), tokenizer=trained.tokenizer)


def words(text: str) -> Words:
    return tuple(text.split())


# The programs.


@pytest.mark.parametrize(
    ("name", "prompt", "others", "answer"),
    [
        ("siit-add-llama", "3 plus 6 skip 2 is", {}, "1"),
        ("siit-add-llama", "3 plus 6 skip 2 is", {"first": "5 plus 0 skip 7 is"}, "3"),
        ("siit-add-llama", "3 plus 6 skip 2 is", {"second": "5 plus 0 skip 7 is"}, "3"),
        ("siit-add-llama", "3 plus 6 skip 2 is", {"total": "5 plus 0 skip 7 is"}, "5"),
        (
            "siit-add-llama",
            "3 plus 6 skip 2 is",
            {"first": "5 plus 0 skip 7 is", "second": "7 plus 4 skip 0 is"},
            "1",
        ),
        ("siit-chain-gpt2", "3 plus 6 minus 5 is", {}, "4"),
        ("siit-chain-gpt2", "3 plus 6 minus 5 is", {"partial": "1 plus 1 minus 7 is"}, "5"),
        ("siit-chain-gpt2", "3 plus 6 minus 5 is", {"third": "1 plus 1 minus 7 is"}, "2"),
        # What depends on a variable that is set does not matter any more.
        (
            "siit-chain-gpt2",
            "3 plus 6 minus 5 is",
            {"first": "0 plus 0 minus 0 is", "partial": "1 plus 1 minus 7 is"},
            "5",
        ),
        ("siit-bind-gqa", "b 3 a 7 d 0 c 2 ; a", {}, "0"),
        ("siit-bind-gqa", "b 3 a 7 d 0 c 2 ; a", {"owners": "a 1 d 1 c 1 b 1 ; d"}, "4"),
        ("siit-bind-gqa", "b 3 a 7 d 0 c 2 ; a", {"found": "a 1 d 5 c 1 b 1 ; d"}, "6"),
        ("siit-bind-gqa", "b 3 a 7 d 0 c 2 ; a", {"successor": "a 1 d 5 c 1 b 1 ; d"}, "6"),
        ("siit-choice-gpt2", "red blue ? cat dog :", {}, "dog"),
        ("siit-choice-gpt2", "red red ? cat dog :", {}, "cat"),
        ("siit-choice-gpt2", "red blue ? cat dog :", {"left": "blue green ? cow fox :"}, "cat"),
        ("siit-choice-gpt2", "red blue ? cat dog :", {"same": "green green ? cow fox :"}, "cat"),
        ("siit-choice-gpt2", "red blue ? cat dog :", {"chosen": "green green ? cow fox :"}, "cow"),
    ],
)
def test_programs_by_hand(name: str, prompt: str, others: dict[str, str], answer: str) -> None:
    case = CASES[name]
    assert case.answer(words(prompt), {variable: words(text) for variable, text in others.items()}) == answer


@pytest.mark.parametrize("name", NAMES)
def test_edges_are_those_of_the_program(name: str) -> None:
    """A node reads another if its variable changes with the other's alone, and the input if it changes with that."""
    case, rng = CASES[name], random.Random(0)
    prompts = case.prompts(60, seed=3)
    every = [case.values(prompt) for prompt in prompts]
    found = {f"{case.nodes[-1]}->logits"}
    for place, variable in enumerate(case.program):
        for _ in range(300):
            one, other = rng.sample(range(len(prompts)), 2)
            before = variable.value(prompts[one], every[one])
            if variable.value(prompts[other], every[one]) != before:
                found.add(f"input->{variable.node}")
            for earlier in case.program[:place]:
                values = {**every[one], earlier.name: every[other][earlier.name]}
                if variable.value(prompts[one], values) != before:
                    found.add(f"{earlier.node}->{variable.node}")
    assert sorted(found) == sorted(case.edges)


@pytest.mark.parametrize("name", NAMES)
def test_the_alignment_is_of_the_model(name: str) -> None:
    case, dims = CASES[name], shipped(name).dims
    assert case.name == name and case.nodes == tuple(case.variables.values())
    assert len(set(case.nodes)) == len(case.nodes) == len(case.variables) == len(case.program)
    for node in case.nodes:
        assert parse_node(node, dims)[0].kind in ("z", "mlp_out")
    graph = EdgeGraph.of(dims, by_query_head=True)
    of_model = {graph.edge_name(*edge).split("<")[0] for edge in graph.real.nonzero().tolist()}
    assert len(set(case.edges)) == len(case.edges) and set(case.edges) <= of_model


def test_what_there_is_not() -> None:
    with pytest.raises(InputError, match="no case is called 'siit-gpt5'; there are: siit-add-llama"):
        siit.find("siit-gpt5")
    case = siit.find("siit-add-llama")
    (prompt,) = case.prompts(1, 0)
    with pytest.raises(
        InputError, match="siit-add-llama has no variable 'third'; its program has first, second"
    ):
        case.answer(prompt, {"third": prompt})
    with pytest.raises(InputError, match="siit-add-llama has no variable 'third'"):
        case.values(prompt, {"third": "1"})
    other = shipped("siit-choice-gpt2").tokenizer
    assert other is not None
    with pytest.raises(
        InputError, match="siit-add-llama: the tokenizer has no token '.*expected the tokenizer that"
    ):
        case.pairs(other, 1, 0)


# Prompts and pairs.


@pytest.mark.parametrize("name", NAMES)
def test_pairs(name: str) -> None:
    case, tokenizer = CASES[name], shipped(name).tokenizer
    assert tokenizer is not None
    pairs = case.pairs(tokenizer, 40, seed=5)
    assert pairs == case.pairs(tokenizer, 40, seed=5) != case.pairs(tokenizer, 40, seed=6)
    assert len({pair.id for pair in pairs}) == 40
    differing = set()
    for pair in pairs:
        for ids, text, answer in (
            (pair.clean_ids, pair.meta["clean"], pair.answer_id),
            (pair.corrupt_ids, pair.meta["corrupt"], pair.wrong_id),
        ):
            assert list(ids) == tokenizer(text)["input_ids"]
            assert tokenizer.convert_ids_to_tokens(answer) == case.answer(words(text))
        assert len(pair.clean_ids) == len(pairs[0].clean_ids) == len(pair.corrupt_ids)
        assert pair.answer_id != pair.wrong_id
        values = [case.values(words(pair.meta[side])) for side in ("clean", "corrupt")]
        differing |= {variable for variable in case.variables if values[0][variable] != values[1][variable]}
    assert differing == set(case.variables)


# The circuits, on the weights that ship and prompts of another seed than the card's.


@pytest.mark.parametrize("name", NAMES)
def test_the_circuit_holds(name: str) -> None:
    followed = interchange_accuracy(shipped(name), CASES[name], n=200, seed=2)
    assert followed.plain >= ENOUGH
    assert set(followed.variables) == set(CASES[name].variables)
    assert followed.worst >= ENOUGH, followed
    changed = non_circuit_change(shipped(name), CASES[name], n=200, seed=2)
    assert set(changed.single) == set(oracle.all_nodes(shipped(name).hf)) - set(CASES[name].nodes)
    assert changed.worst <= AT_MOST, changed


@pytest.mark.parametrize("name", NAMES)
def test_the_card_holds_what_is_measured(name: str) -> None:
    card = zoo.card(name)
    rest = {key: value for key, value in card.measurements.items() if not key.startswith("answers changed")}
    assert card.worst_accuracy >= ENOUGH and min(rest.values()) >= ENOUGH
    assert len(rest) == len(CASES[name].variables) + 1 and len(card.measurements) == len(rest) + 4
    assert max(value for key, value in card.measurements.items() if key not in rest) <= AT_MOST


def test_all_together_are_under_three_megabytes() -> None:
    directories = [zoo.find(name) for name in NAMES]
    files = [path for directory in directories if directory is not None for path in directory.iterdir()]
    assert len(files) == 6 * len(NAMES)
    assert sum(path.stat().st_size for path in files) < 3_000_000
    architectures = [(zoo.card(name).architecture, zoo.card(name).kv_heads) for name in NAMES]
    assert {("LlamaForCausalLM", 4), ("LlamaForCausalLM", 2), ("GPT2LMHeadModel", 4)} <= set(architectures)


@pytest.mark.parametrize("name", NAMES)
def test_the_program_s_edges_carry_the_answer(name: str) -> None:
    """By exact patching: each of them more than any other edge; of queries, keys and values the largest counts."""
    model, case = shipped(name), CASES[name]
    scores = patch_edges(model, case.pairs(model.tokenizer, 8, seed=0), by_query=True)
    magnitudes = scores.mean_abs if scores.by_query is None else scores.by_query[1]
    graph = EdgeGraph.of(model.dims, by_query_head=True)
    strongest: dict[str, float] = {}
    for sender, receiver in graph.real.nonzero().tolist():
        edge = graph.edge_name(sender, receiver).split("<")[0]
        strongest[edge] = max(strongest.get(edge, 0.0), float(magnitudes[sender, receiver]))
    weakest = min(strongest[edge] for edge in case.edges)
    assert weakest > max(value for edge, value in strongest.items() if edge not in case.edges)


# The checks can fail.


@pytest.mark.parametrize("name", NAMES)
def test_a_permuted_alignment_fails(name: str) -> None:
    """Each variable at the node of the next one; then the whole circuit moved by one head."""
    case = CASES[name]
    nodes = case.nodes[1:] + case.nodes[:1]
    permuted = replace(case, program=tuple(map(at, case.program, nodes)))
    assert interchange_accuracy(shipped(name), permuted, n=60).worst < 0.6
    heads = [node for node in case.nodes if node.startswith("a")]
    moved = {node: f"{node[:-1]}{(int(node[-1]) + 1) % 4}" for node in heads}
    if set(moved.values()) & set(case.nodes):
        moved = {heads[0]: next(n for n in oracle.all_nodes(shipped(name).hf) if n not in case.nodes)}
    nodes = tuple(moved.get(node, node) for node in case.nodes)
    elsewhere = replace(case, program=tuple(map(at, case.program, nodes)))
    assert interchange_accuracy(shipped(name), elsewhere, n=60).worst < 0.2
    assert non_circuit_change(shipped(name), elsewhere, n=60).resample > 0.2


def at(variable: siit.Variable, node: str) -> siit.Variable:
    return replace(variable, node=node)


@pytest.mark.parametrize("name", NAMES)
def test_an_untrained_model_fails(name: str) -> None:
    followed = interchange_accuracy(untrained(name), CASES[name], n=60)
    assert followed.plain < 0.4 and followed.worst < 0.4
    assert non_circuit_change(untrained(name), CASES[name], n=60).worst > 0.1


# The same by plain hooks.


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("get", [shipped, untrained])
def test_agrees_with_plain_hooks(name: str, get: Callable[[str], PatchModel]) -> None:
    model, case, n = get(name), CASES[name], 8
    plain = plain_twin(model)
    prompts = case.prompts(n, seed=4)
    runs = _Runs(model, case, prompts)
    kept = [oracle.activations(plain, ids) for ids in case.encode(case.tokenizer(), prompts)]
    rng = random.Random(name)
    taken = [{v: rng.randrange(n) for v in case.variables if rng.random() < 0.5} for _ in range(n)]
    found = [
        {case.variables[v]: kept[other][case.variables[v]] for v, other in mine.items()} for mine in taken
    ]
    answers = oracle_answers(plain, case, prompts, found)
    wanted = runs.ids_of(
        [
            case.answer(prompt, {v: prompts[other] for v, other in mine.items()})
            for prompt, mine in zip(prompts, taken, strict=True)
        ]
    )
    assert runs.followed(taken) == pytest.approx(float((answers == wanted).float().mean()))

    changed = non_circuit_change(model, case, n, seed=4)
    outside = [node for node in oracle.all_nodes(plain) if node not in case.nodes]
    means = {node: torch.stack([each[node] for each in kept]).mean(0) for node in outside}
    before = oracle_answers(plain, case, prompts, [{}] * n)
    assert torch.equal(before, runs.plain)
    for how, values in (
        (changed.resample, [{node: kept[(row + 1) % n][node] for node in outside} for row in range(n)]),
        (changed.mean, [means] * n),
        (changed.zero, [{node: torch.zeros_like(means[node]) for node in outside}] * n),
        (changed.single[outside[0]], [{outside[0]: kept[(row + 1) % n][outside[0]]} for row in range(n)]),
    ):
        after = oracle_answers(plain, case, prompts, values)
        assert how == pytest.approx(float((after != before).float().mean()))


def plain_twin(model: PatchModel) -> PreTrainedModel:
    kind: Callable[..., PreTrainedModel] = type(model.hf)
    twin = kind(model.config).eval()
    twin.load_state_dict(model.hf.state_dict())
    return twin


def oracle_answers(
    plain: PreTrainedModel,
    case: SiitCase,
    prompts: Sequence[Words],
    values: Sequence[dict[str, torch.Tensor]],
) -> torch.Tensor:
    ids = case.encode(case.tokenizer(), prompts)
    return torch.tensor([oracle.answer(plain, *each) for each in zip(ids, values, strict=True)])
