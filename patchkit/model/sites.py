"""Sites and nodes: what can be read and written in a forward pass, by name, in execution order.

A **site** is a node kind at a layer. A **node** is one head, neuron or whole vector of a site (at a position that the
caller gives). Sites are totally ordered by execution; a trace visits them in that order, always.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import total_ordering
from typing import Literal

from patchkit.errors import InputError
from patchkit.model.dims import Dims

Unit = Literal["vector", "head", "kv_head", "neuron"]


@dataclass(frozen=True)
class NodeKind:
    """One kind of node: how its site is divided into nodes, and what it is."""

    name: str
    unit: Unit
    description: str

    def count(self, dims: Dims) -> int:
        """Nodes per layer and position."""
        return {"vector": 1, "head": dims.n_heads, "kv_head": dims.n_kv_heads, "neuron": dims.d_mlp}[
            self.unit
        ]

    def width(self, dims: Dims) -> int:
        """Numbers in one node's activation."""
        return {"vector": dims.d_model, "head": dims.d_head, "kv_head": dims.d_head, "neuron": 1}[self.unit]

    def shape(self, dims: Dims) -> tuple[int, ...]:
        """Canonical shape of the whole site at one position: `(d_model,)`, `(heads, d_head)` or `(neurons,)`."""
        nodes = () if self.unit == "vector" else (self.count(dims),)
        return nodes if self.unit == "neuron" else (*nodes, self.width(dims))


_KINDS = (
    NodeKind("resid_pre", "vector", "residual stream before the layer"),
    NodeKind("q_proj", "head", "query projection's output, before any norm and rotary"),
    NodeKind("k_proj", "kv_head", "key projection's output, before any norm and rotary"),
    NodeKind("v_proj", "kv_head", "value projection's output"),
    NodeKind("q", "head", "queries as used by attention: after rotary and any q/k norm"),
    NodeKind("k", "kv_head", "keys as used by attention: after rotary and any q/k norm"),
    NodeKind("v", "kv_head", "values as used by attention"),
    NodeKind("z", "head", "attention-weighted values of a head, before W_O"),
    NodeKind("attn_out", "vector", "what attention adds to the residual stream"),
    NodeKind("resid_mid", "vector", "residual stream between attention and MLP (sequential blocks only)"),
    NodeKind("mlp_in", "vector", "what the MLP reads: the residual stream behind the MLP's norm"),
    NodeKind("neuron", "neuron", "MLP activation after the nonlinearity"),
    NodeKind("mlp_out", "vector", "what the MLP adds to the residual stream"),
    NodeKind("resid_post", "vector", "residual stream after the layer"),
)
#: Node kinds by name, in the order in which a layer computes them.
KINDS: dict[str, NodeKind] = {kind.name: kind for kind in _KINDS}
_ORDER = {name: place for place, name in enumerate(KINDS)}


@total_ordering
@dataclass(frozen=True)
class Site:
    """A node kind at a layer; sites sort in execution order."""

    kind: str
    layer: int

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"node kind '{self.kind}' is not known; expected one of: {', '.join(KINDS)}")

    def __lt__(self, other: Site) -> bool:
        return (self.layer, _ORDER[self.kind]) < (other.layer, _ORDER[other.kind])

    def __str__(self) -> str:
        return f"{self.kind}.{self.layer}"


def in_order(sites: Iterable[Site]) -> list[Site]:
    """The sites in execution order, each once."""
    return sorted(set(sites))


def check_site(site: Site, dims: Dims) -> None:
    """Raises InputError if a model of these sizes has no such site."""
    if not 0 <= site.layer < dims.n_layers:
        raise InputError(
            f"site {site}: layer {site.layer} is out of range, the model has layers 0 to {dims.n_layers - 1}"
        )
    if site.kind == "resid_mid" and dims.parallel:
        raise InputError(
            f"site {site}: this model's blocks run attention and MLP in parallel, so there is no residual stream "
            "between them; use resid_pre or resid_post"
        )
    if site.kind == "neuron" and not dims.d_mlp:
        raise InputError(
            f"site {site}: the MLP of family '{dims.family}' cannot be split into neurons (a mixture of experts, for "
            "one, has no module whose input they are); use mlp_out"
        )


def sites_of(kind: str, dims: Dims) -> list[Site]:
    """The sites of one kind at every layer; InputError for an unknown kind or one the model does not have."""
    sites = [Site(kind, layer) for layer in range(dims.n_layers)]
    check_site(sites[0], dims)
    return sites


_NAME = re.compile(r"(?P<unit>[am])(?P<layer>[0-9]+)(?:\.(?P<part>[hn])(?P<index>[0-9]+))?")
_LONG_NAME = re.compile(r"(?P<kind>[a-z_]+)\.(?P<layer>[0-9]+)(?P<part>\.h(?P<index>[0-9]+))?")


def node_name(kind: str, layer: int, index: int = 0) -> str:
    """The contract's name of a node where it has one (`a1.h3`, `m2`, `m2.n17`), else kind, layer and index."""
    match KINDS[kind].unit:
        case "head" if kind == "z":
            return f"a{layer}.h{index}"
        case "neuron":
            return f"m{layer}.n{index}"
        case "vector" if kind == "mlp_out":
            return f"m{layer}"
        case "vector":
            return f"{kind}.{layer}"
    return f"{kind}.{layer}.h{index}"


def parse_node(name: str, dims: Dims) -> tuple[Site, int]:
    """A node from its name: (site, index). `a1.h3` is the head's z, `m2` the MLP's output, `m2.n17` a neuron.

    Every other kind is spelled out, as `node_name` does: `resid_pre.2`, `k.1.h0`.

    Raises:
        InputError: the name is malformed, or the layer, head or neuron does not exist in this model.
    """
    kind, layer, index = _read_name(name)
    site = Site(kind, layer)
    check_site(site, dims)
    count = KINDS[kind].count(dims)
    if index >= count:
        raise InputError(
            f"node '{name}': index {index} is out of range, layer {site.layer} has 0 to {count - 1}"
        )
    return site, index


def _read_name(name: str) -> tuple[str, int, int]:
    match = _NAME.fullmatch(name)
    if match is not None:
        parts = (match["unit"], match["part"])
        kind = {("a", "h"): "z", ("m", None): "mlp_out", ("m", "n"): "neuron"}.get(parts)
        if kind is not None:
            return kind, int(match["layer"]), int(match["index"] or 0)
    match = _LONG_NAME.fullmatch(name)
    headed = match is not None and match["part"] is not None
    if match is not None and match["kind"] in KINDS and headed == ("head" in KINDS[match["kind"]].unit):
        return match["kind"], int(match["layer"]), int(match["index"] or 0)
    raise InputError(
        f"node '{name}' is not a node name; expected a{{layer}}.h{{head}}, m{{layer}}, m{{layer}}.n{{neuron}}, or "
        "a kind with its layer and head, as resid_pre.2 or k.1.h0"
    )
