"""Grids of nodes: which heads, neurons or vectors of which kinds, at which layers and places, numbered from 0.

A **place** is what a node covers on the position axis: the last token, all tokens together, one position, or a span
(`patchkit.data.places` says which tokens). Numbers run kind by kind in execution order, and within a kind layer by
layer, place by place, unit by unit; so results are flat vectors that reshape into one tensor a kind.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from patchkit.errors import InputError
from patchkit.model.dims import Dims
from patchkit.model.once import once
from patchkit.model.sites import KINDS, Site, check_site, node_name, parse_node


class Located(NamedTuple):
    """Where nodes are: index into the grid's kinds, layer, place and unit (head, KV head, neuron or group; else 0)."""

    kind: Int[Tensor, " n"]
    layer: Int[Tensor, " n"]
    place: Int[Tensor, " n"]
    unit: Int[Tensor, " n"]


@dataclass(frozen=True)
class NodeGrid:
    """All nodes of some kinds in a model.

    Attributes:
        dims: the model's sizes.
        kinds: in execution order, each once.
        places: labels of the position axis, e.g. `("0", "1", "2")`.
        placed: whether tensors have a position axis; without it there is one place and no axis.
        group: how many neighbouring neurons make one node of kind `neuron`.
    """

    dims: Dims
    kinds: tuple[str, ...]
    places: tuple[str, ...] = ("all",)
    placed: bool = False
    group: int = 1

    def __post_init__(self) -> None:
        if not self.kinds:
            raise InputError("a grid of nodes needs at least one node kind, found none")
        for kind in self.kinds:
            check_site(Site(kind, 0), self.dims)
        ordered = tuple(kind for kind in KINDS if kind in self.kinds)
        if len(ordered) != len(self.kinds):
            raise InputError(f"node kinds {', '.join(self.kinds)}: a kind comes twice; name each once")
        object.__setattr__(self, "kinds", ordered)
        if not self.placed and len(self.places) != 1:
            raise InputError(f"{len(self.places)} places need a position axis")
        if self.group < 1 or (self.group > 1 and "neuron" not in self.kinds):
            raise InputError(
                f"group {self.group}: expected at least 1, and a group needs the node kind 'neuron' "
                f"(found {', '.join(self.kinds)})"
            )

    def units(self, kind: str) -> int:
        """Nodes of this kind at one layer and place."""
        count = KINDS[kind].count(self.dims)
        return -(-count // self.group) if kind == "neuron" else count

    def full_shape(self, kind: str) -> tuple[int, int, int]:
        """`(layers, places, units)`."""
        return self.dims.n_layers, len(self.places), self.units(kind)

    def axes(self, kind: str) -> tuple[str, ...]:
        """Names of the axes of this kind's tensor."""
        unit = {"vector": (), "neuron": ("neuron" if self.group == 1 else "neuron group",)}
        position = ("position",) if self.placed else ()
        return ("layer", *position, *unit.get(KINDS[kind].unit, ("head",)))

    def shape(self, kind: str) -> tuple[int, ...]:
        """Shape of this kind's tensor: the sizes of `axes`."""
        layers, places, units = self.full_shape(kind)
        position = (places,) if self.placed else ()
        return (layers, *position, *(() if KINDS[kind].unit == "vector" else (units,)))

    def size(self, kind: str) -> int:
        """Number of nodes of a kind."""
        return prod(self.full_shape(kind))

    def start(self, kind: str) -> int:
        """The number of the kind's first node."""
        return int(self._starts[self.kinds.index(kind)])

    @once
    def _starts(self) -> Tensor:
        return torch.tensor([0, *accumulate(self.size(kind) for kind in self.kinds)])

    @once
    def _units(self) -> Tensor:
        return torch.tensor([self.units(kind) for kind in self.kinds])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def split(self, values: Tensor) -> dict[str, Tensor]:
        """`[..., nodes]` as one tensor a kind, `[..., *shape(kind)]`."""
        parts = values.split([self.size(kind) for kind in self.kinds], dim=-1)
        return {
            kind: part.reshape(*part.shape[:-1], *self.shape(kind))
            for kind, part in zip(self.kinds, parts, strict=True)
        }

    def join(self, tensors: Mapping[str, Tensor], lead: int = 0) -> Tensor:
        """The inverse of `split`; `lead` axes come before those of the nodes."""
        return torch.cat([tensors[kind].flatten(lead) for kind in self.kinds], dim=-1)

    def locate(self, ids: Int[Tensor, " n"]) -> Located:
        """Kind, layer, place and unit of each node number."""
        kind = torch.searchsorted(self._starts, ids.contiguous(), right=True) - 1
        within, units = ids - self._starts[kind], self._units[kind]
        return Located(
            kind, within // (units * len(self.places)), within // units % len(self.places), within % units
        )

    def sites(self, ids: Int[Tensor, " n"]) -> list[Site]:
        """The sites of some nodes, in execution order."""
        where = self.locate(ids)
        keys = (where.kind * self.dims.n_layers + where.layer).unique().tolist()
        return sorted(Site(self.kinds[key // self.dims.n_layers], key % self.dims.n_layers) for key in keys)

    def name(self, number: int) -> str:
        """The node's name, e.g. `a1.h3`, `m2.n17`, `a1.h3@5`; a group of neurons is `m2.n16-31`."""
        return self.names([number])[0]

    def names(self, ids: Iterable[int] | None = None) -> list[str]:
        """Names of some nodes, or of all."""
        numbers = (
            torch.arange(len(self)) if ids is None else torch.tensor([int(i) for i in ids], dtype=torch.long)
        )
        where = self.locate(numbers)
        return [self._name(*place) for place in zip(*(part.tolist() for part in where), strict=True)]

    def _name(self, kind: int, layer: int, place: int, unit: int) -> str:
        name = node_name(self.kinds[kind], layer, unit)
        if self.kinds[kind] == "neuron" and self.group > 1:
            first = unit * self.group
            last = min(first + self.group, self.dims.d_mlp) - 1
            name = f"m{layer}.n{first}-{last}"
        return f"{name}@{self.places[place]}" if self.placed else name

    def find(self, name: str) -> Int[Tensor, " n"]:
        """Numbers of the nodes called `name`; without `@place` at every place.

        Raises:
            InputError: no such node in this grid, with what there is.
        """
        bare, at, place = name.partition("@")
        site, unit = parse_node(bare, self.dims)
        if site.kind not in self.kinds:
            raise InputError(
                f"node '{name}': the grid has no nodes of kind '{site.kind}', only {', '.join(self.kinds)}"
            )
        if at and (not self.placed or place not in self.places):
            has = f"places {', '.join(self.places[:12])}" if self.placed else "no position axis"
            raise InputError(f"node '{name}': there is no place '{place}'; the grid has {has}")
        numbers = torch.arange(self.start(site.kind), self.start(site.kind) + self.size(site.kind))
        at_layer = numbers.reshape(self.full_shape(site.kind))[site.layer]
        found = at_layer[:, unit // self.group if site.kind == "neuron" else unit]
        return found[self.places.index(place)][None] if at else found

    def select(self, words: Sequence[str], layers: Sequence[int] | None = None) -> Int[Tensor, " n"]:
        """Numbers of the nodes that kinds and node names ask for, ascending; `layers` keeps those of some layers.

        Raises:
            InputError: a name or layer that the model does not have.
        """
        chosen = torch.zeros(len(self), dtype=torch.bool)
        for word in words:
            if word in KINDS:
                start = self.start(word)
                chosen[start : start + self.size(word)] = True
            else:
                chosen[self.find(word)] = True
        if layers is not None:
            for layer in layers:
                check_site(Site(self.kinds[0], layer), self.dims)
            every = self.locate(torch.arange(len(self))).layer
            chosen &= torch.isin(every, torch.tensor(list(layers), dtype=torch.long))
        if not bool(chosen.any()):
            raise InputError(f"no node is left of {', '.join(words)} at layers {list(layers or [])}")
        return chosen.nonzero()[:, 0]


def kinds_of(words: Sequence[str], dims: Dims) -> tuple[str, ...]:
    """The node kinds that a list of kinds and node names speaks of, in execution order.

    Raises:
        InputError: a word that is neither, naming the kinds there are.
    """
    found: set[str] = set()
    for word in words:
        if word in KINDS:
            check_site(Site(word, 0), dims)
            found.add(word)
        elif "." in word or word[:1] in ("a", "m") and word[1:2].isdigit():
            found.add(parse_node(word.partition("@")[0], dims)[0].kind)
        else:
            raise InputError(
                f"'{word}' is neither a node kind ({', '.join(KINDS)}) nor a node name (a1.h3, m2, m2.n17, a1.h3@5)"
            )
    return tuple(kind for kind in KINDS if kind in found)
