"""Grids of nodes: numbers, names and tensors say the same, and what is not there is refused by name."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patchkit.errors import InputError
from patchkit.model import KINDS, Dims, NodeGrid, Site, kinds_of

DIMS = Dims(
    n_layers=3, n_heads=4, n_kv_heads=2, d_head=5, d_model=20, d_mlp=11, vocab_size=50, parallel=False
)
PARALLEL = Dims(**{**vars(DIMS), "parallel": True})
PLACES = ("0", "1", "verb")

#: What `a_grid` takes: grids are not made while values are drawn, where the shape checks' dice are not allowed.
grids = st.tuples(
    st.lists(st.sampled_from(sorted(KINDS)), min_size=1, unique=True), st.integers(0, 3), st.integers(1, 12)
)


def a_grid(kinds: list[str], places: int, group: int) -> NodeGrid:
    """A grid with so many places, 0 for none; without neurons there are no groups."""
    labels = PLACES[:places] if places else ("all",)
    return NodeGrid(DIMS, tuple(kinds), labels, bool(places), group if "neuron" in kinds else 1)


def by_loops(grid: NodeGrid) -> list[tuple[str, int, str, int]]:
    """(kind, layer, place, unit) of every node, in the order that the module's docstring gives."""
    units = {"vector": 1, "head": 4, "kv_head": 2, "neuron": len(range(0, 11, grid.group))}
    return [
        (kind, layer, place, unit)
        for kind in KINDS
        if kind in grid.kinds
        for layer in range(3)
        for place in grid.places
        for unit in range(units[KINDS[kind].unit])
    ]


@settings(deadline=None)
@given(grids)
def test_numbers_are_those_of_loops_over_kinds_layers_places_and_units(
    drawn: tuple[list[str], int, int],
) -> None:
    grid = a_grid(*drawn)
    expected = by_loops(grid)
    assert len(grid) == len(expected)
    where = grid.locate(torch.arange(len(grid)))
    found = [
        (grid.kinds[kind], layer, grid.places[place], unit)
        for kind, layer, place, unit in zip(*(part.tolist() for part in where), strict=True)
    ]
    assert found == expected
    for kind in grid.kinds:
        start = grid.start(kind)
        assert expected[start][0] == kind and expected[start + grid.size(kind) - 1][0] == kind
    assert grid.sites(torch.arange(len(grid))) == sorted({Site(kind, layer) for kind, layer, *_ in expected})


@settings(deadline=None, max_examples=30)
@given(grids)
def test_every_name_finds_its_node_and_no_two_nodes_share_one(drawn: tuple[list[str], int, int]) -> None:
    grid = a_grid(*drawn)
    names = grid.names()
    assert len(set(names)) == len(grid)
    for number, (kind, _, _, unit) in list(enumerate(by_loops(grid)))[::5]:
        name = names[number]
        assert grid.name(number) == name
        if kind == "neuron" and grid.group > 1:
            first, last = unit * grid.group, min(unit * grid.group + grid.group, 11) - 1
            bare, at, place = name.partition("@")
            assert bare.endswith(f".n{first}-{last}")
            # A group has no name that is read; any of its neurons means the group.
            members = [f"{bare.partition('.')[0]}.n{neuron}{at}{place}" for neuron in (first, last)]
        else:
            members = [name]
        assert all(grid.find(member).tolist() == [number] for member in members)


@settings(deadline=None)
@given(grids, st.integers(1, 3))
def test_vectors_split_into_tensors_by_kind_and_join_again(
    drawn: tuple[list[str], int, int], pairs: int
) -> None:
    grid = a_grid(*drawn)
    flat = torch.arange(pairs * len(grid)).reshape(pairs, len(grid)).double()
    tensors = grid.split(flat)
    assert torch.equal(grid.join(tensors, lead=1), flat)
    assert list(tensors) == list(grid.kinds)
    for kind, tensor in tensors.items():
        assert tensor.shape == (pairs, *grid.shape(kind))
        assert len(grid.axes(kind)) == len(grid.shape(kind))
    for number, (kind, layer, place, unit) in enumerate(by_loops(grid)):
        index = (layer, *((grid.places.index(place),) if grid.placed else ()))
        index += () if KINDS[kind].unit == "vector" else (unit,)
        assert tensors[kind][(0, *index)] == number


def test_the_contracts_names_and_axes() -> None:
    grid = NodeGrid(DIMS, ("neuron", "k", "z", "mlp_out"), ("5", "6"), True, group=4)
    assert grid.kinds == ("k", "z", "neuron", "mlp_out")
    assert grid.names(grid.select(["a1.h3@5"]).tolist()) == ["a1.h3@5"]
    assert grid.names(grid.select(["k.2.h1"]).tolist()) == ["k.2.h1@5", "k.2.h1@6"]
    assert grid.names(grid.select(["m0.n9@6"]).tolist()) == ["m0.n8-10@6"]
    assert grid.axes("z") == ("layer", "position", "head") and grid.shape("z") == (3, 2, 4)
    assert grid.axes("neuron") == ("layer", "position", "neuron group") and grid.shape("neuron") == (3, 2, 3)
    assert grid.axes("mlp_out") == ("layer", "position") and grid.shape("mlp_out") == (3, 2)
    assert NodeGrid(DIMS, ("k",)).axes("k") == ("layer", "head")
    assert NodeGrid(DIMS, ("neuron",)).axes("neuron") == ("layer", "neuron")


def test_selection_by_kinds_names_and_layers() -> None:
    grid = NodeGrid(DIMS, ("z", "mlp_out"), PLACES, True)
    every = by_loops(grid)

    def chosen(*words: str, layers: tuple[int, ...] | None = None) -> list[tuple[str, int, str, int]]:
        return [every[number] for number in grid.select(words, layers).tolist()]

    assert chosen("z", "mlp_out") == every
    assert chosen("mlp_out") == [node for node in every if node[0] == "mlp_out"]
    assert chosen("a1.h3", "m2@verb") == [
        *(("z", 1, place, 3) for place in PLACES),
        ("mlp_out", 2, "verb", 0),
    ]
    assert chosen("z", layers=(0, 2)) == [node for node in every if node[0] == "z" and node[1] != 1]
    assert chosen("z", "a0.h0", layers=(0,)) == [node for node in every if node[:2] == ("z", 0)]
    with pytest.raises(InputError, match=r"no node is left of a1.h3 at layers \[0\]"):
        grid.select(["a1.h3"], [0])
    for layer in (3, -1):
        with pytest.raises(InputError, match=f"layer {layer} is out of range, the model has layers 0 to 2"):
            grid.select(["z"], [layer])


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("a3.h0", "layer 3 is out of range, the model has layers 0 to 2"),
        ("a0.h4", "index 4 is out of range, layer 0 has 0 to 3"),
        ("m0.n11", "no nodes of kind 'neuron', only z, mlp_out"),
        ("a0.h1@7", "no place '7'; the grid has places 0, 1, verb"),
        ("a0.h1@", "no place ''"),
        ("a0.x1", "is not a node name"),
    ],
)
def test_nodes_that_are_not_there(name: str, says: str) -> None:
    grid = NodeGrid(DIMS, ("z", "mlp_out"), PLACES, True)
    # The index is looked at before the kind: neuron 11 does not exist at all.
    says = "index 11 is out of range, layer 0 has 0 to 10" if name == "m0.n11" else says
    with pytest.raises(InputError, match=says):
        grid.find(name)
    with pytest.raises(InputError, match="no nodes of kind 'neuron', only z, mlp_out"):
        grid.find("m0.n1")
    with pytest.raises(InputError, match="no place '0'; the grid has no position axis"):
        NodeGrid(DIMS, ("z",)).find("a0.h1@0")


def test_grids_that_cannot_be() -> None:
    for kinds, says in (((), "at least one node kind"), (("z", "q", "z"), "a kind comes twice")):
        with pytest.raises(InputError, match=says):
            NodeGrid(DIMS, kinds)
    with pytest.raises(InputError, match="node kind 'heads' is not known"):
        NodeGrid(DIMS, ("heads",))
    with pytest.raises(InputError, match="in parallel.*use resid_pre or resid_post"):
        NodeGrid(PARALLEL, ("resid_mid",))
    with pytest.raises(InputError, match="2 places need a position axis"):
        NodeGrid(DIMS, ("z",), ("0", "1"))
    with pytest.raises(InputError, match="group 0: expected at least 1"):
        NodeGrid(DIMS, ("neuron",), group=0)
    with pytest.raises(InputError, match=r"group 2: .* needs the node kind 'neuron' \(found z\)"):
        NodeGrid(DIMS, ("z",), group=2)


def test_the_kinds_that_words_speak_of() -> None:
    assert kinds_of(["mlp_out", "z", "z"], DIMS) == ("z", "mlp_out")
    assert kinds_of(["m2", "a1.h3@5", "m0.n3", "k.1.h0", "resid_pre.2@verb"], DIMS) == (
        *("resid_pre", "k", "z"),
        *("neuron", "mlp_out"),
    )
    with pytest.raises(InputError, match="'heads' is neither a node kind .* nor a node name"):
        kinds_of(["z", "heads"], DIMS)
    with pytest.raises(InputError, match="layer 7 is out of range"):
        kinds_of(["a7.h0"], DIMS)
    with pytest.raises(InputError, match="in parallel"):
        kinds_of(["resid_mid"], PARALLEL)


def test_two_grids_of_the_same_nodes_are_equal() -> None:
    for first, second in itertools.product(
        [NodeGrid(DIMS, ("z",)), NodeGrid(DIMS, ("z", "q")), NodeGrid(DIMS, ("z",), ("0",), True)], repeat=2
    ):
        assert (first == second) == (first is second)
    assert NodeGrid(DIMS, ("z", "q")) == NodeGrid(DIMS, ("q", "z"))
