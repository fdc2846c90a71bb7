"""Sites and nodes: their order, their names, and what is refused."""

from __future__ import annotations

import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patchkit.errors import InputError, one_line
from patchkit.model import KINDS, Dims, Site, check_site, in_order, node_name, parse_node, sites_of

DIMS = Dims(
    n_layers=12,
    n_heads=8,
    n_kv_heads=2,
    d_head=6,
    d_model=48,
    d_mlp=100,
    vocab_size=50,
    parallel=False,
)
PARALLEL = Dims(**{**vars(DIMS), "parallel": True})
sites = st.builds(Site, st.sampled_from(sorted(KINDS)), st.integers(0, 11))


def test_the_kinds_are_those_of_the_contract_and_what_the_mlp_reads() -> None:
    contract = {
        *("resid_pre", "resid_mid", "resid_post", "q", "k", "v", "q_proj", "k_proj", "v_proj"),
        *("z", "attn_out", "neuron", "mlp_out"),
    }
    assert set(KINDS) == contract | {"mlp_in"}
    assert all(name == kind.name and kind.description for name, kind in KINDS.items())


@pytest.mark.parametrize(
    ("kind", "count", "width", "shape"),
    [
        ("resid_pre", 1, 48, (48,)),
        ("mlp_out", 1, 48, (48,)),
        ("q", 8, 6, (8, 6)),
        ("z", 8, 6, (8, 6)),
        ("k", 2, 6, (2, 6)),
        ("v_proj", 2, 6, (2, 6)),
        ("neuron", 100, 1, (100,)),
    ],
)
def test_nodes_of_a_kind(kind: str, count: int, width: int, shape: tuple[int, ...]) -> None:
    assert KINDS[kind].count(DIMS) == count
    assert KINDS[kind].width(DIMS) == width
    assert KINDS[kind].shape(DIMS) == shape


@settings(deadline=None)
@given(st.lists(sites, max_size=40), st.randoms(use_true_random=False))
def test_order_is_total_and_does_not_depend_on_the_order_given(
    given_sites: list[Site], dice: random.Random
) -> None:
    shuffled = list(given_sites)
    dice.shuffle(shuffled)
    ordered = in_order(given_sites)
    assert ordered == in_order(shuffled)
    assert len(ordered) == len(set(given_sites))
    for earlier, later in zip(ordered, ordered[1:], strict=False):
        assert earlier < later and later > earlier and not later < earlier


@settings(deadline=None)
@given(sites, sites)
def test_layers_come_first_then_kinds_as_they_are_computed(a: Site, b: Site) -> None:
    order = list(KINDS)
    assert (a < b) == ((a.layer, order.index(a.kind)) < (b.layer, order.index(b.kind)))
    assert (a <= b) == (a < b or a == b)


def test_the_order_of_a_layer() -> None:
    """Not alphabetical, and not that of the contract's list."""
    layer = [site.kind for site in in_order(Site(kind, 3) for kind in reversed(KINDS))]
    assert layer == [
        *("resid_pre", "q_proj", "k_proj", "v_proj", "q", "k", "v"),
        *("z", "attn_out", "resid_mid", "mlp_in", "neuron", "mlp_out", "resid_post"),
    ]
    assert in_order([Site("resid_pre", 1), Site("resid_post", 0)]) == [
        Site("resid_post", 0),
        Site("resid_pre", 1),
    ]


def test_a_site_is_a_value() -> None:
    assert Site("z", 1) == Site("z", 1) and hash(Site("z", 1)) == hash(Site("z", 1))
    assert str(Site("attn_out", 3)) == "attn_out.3"
    with pytest.raises(
        InputError, match="node kind 'heads' is not known; expected one of: resid_pre, q_proj"
    ):
        Site("heads", 0)


nodes = st.sampled_from(sorted(KINDS)).flatmap(
    lambda kind: st.tuples(st.just(kind), st.integers(0, 11), st.integers(0, KINDS[kind].count(DIMS) - 1))
)


@settings(deadline=None)
@given(nodes)
def test_names_and_nodes_are_one_to_one(node: tuple[str, int, int]) -> None:
    kind, layer, index = node
    name = node_name(kind, layer, index)
    short = {"z": r"a\d+\.h\d+", "mlp_out": r"m\d+", "neuron": r"m\d+\.n\d+"}
    long = rf"{kind}\.\d+" + ("" if KINDS[kind].unit == "vector" else r"\.h\d+")
    assert re.fullmatch(short.get(kind, long), name)
    assert parse_node(name, DIMS) == (Site(kind, layer), index)


def test_the_names_of_the_contract() -> None:
    assert node_name("z", 1, 3) == "a1.h3"
    assert node_name("mlp_out", 2) == "m2"
    assert node_name("neuron", 3, 17) == "m3.n17"
    assert node_name("resid_pre", 2) == "resid_pre.2" and node_name("k", 1, 0) == "k.1.h0"


def test_other_kinds_have_names_that_differ() -> None:
    names = {
        node_name(kind, layer, index)
        for kind in KINDS
        for layer in range(DIMS.n_layers)
        for index in range(KINDS[kind].count(DIMS))
    }
    assert len(names) == DIMS.n_layers * sum(kind.count(DIMS) for kind in KINDS.values())


MALFORMED = (
    "",
    "a1",
    "a1.n3",
    "m1.h2",
    "x1.h1",
    "a1.h1 ",
    " a1.h1",
    "a-1.h0",
    "a1.h",
    "m",
    "m1.",
    "a1.h3@5",
    "A1.h3",
    "resid_pre",
    "resid_pre.1.h0",
    "resid_pre.x",
    "k.1",
    "k.1.h",
    "k.1.n0",
    "neuron.1.h0",
    "heads.1.h0",
)


@pytest.mark.parametrize("name", [*MALFORMED, "a1.h1\n", "m\u0661"])
def test_malformed_names_are_refused(name: str) -> None:
    with pytest.raises(
        InputError, match="is not a node name; expected a{layer}.h{head}, m{layer}, m{layer}.n{neuron}"
    ):
        parse_node(name, DIMS)


@given(st.text(max_size=8))
@settings(max_examples=200, deadline=None)
def test_any_text_is_a_name_or_an_input_error(text: str) -> None:
    try:
        site, index = parse_node(text, DIMS)
    except InputError as error:
        assert one_line(text) in str(error)
    else:
        check_site(site, DIMS)
        assert 0 <= index < KINDS[site.kind].count(DIMS)
        # `m07` is `m7`, and other digits than ours are not accepted.
        assert text.isascii()


def test_nodes_that_do_not_exist_are_refused_with_the_range() -> None:
    with pytest.raises(InputError, match="node 'a1.h8': index 8 is out of range, layer 1 has 0 to 7"):
        parse_node("a1.h8", DIMS)
    with pytest.raises(InputError, match="layer 12 is out of range, the model has layers 0 to 11"):
        parse_node("m12", DIMS)
    with pytest.raises(InputError, match="index 100 is out of range, layer 0 has 0 to 99"):
        parse_node("m0.n100", DIMS)
    with pytest.raises(InputError, match="layer -1 is out of range"):
        check_site(Site("z", -1), DIMS)


def test_parallel_blocks_have_no_stream_between_attention_and_mlp() -> None:
    check_site(Site("resid_mid", 0), DIMS)
    with pytest.raises(InputError, match="run attention and MLP in parallel.*use resid_pre or resid_post"):
        check_site(Site("resid_mid", 0), PARALLEL)
    with pytest.raises(InputError, match="in parallel"):
        sites_of("resid_mid", PARALLEL)


def test_sites_of_a_kind() -> None:
    assert sites_of("z", DIMS) == [Site("z", layer) for layer in range(12)]
    with pytest.raises(InputError, match="node kind 'mlp' is not known"):
        sites_of("mlp", DIMS)
