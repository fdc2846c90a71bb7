"""The graph of edges: which senders write to the residual stream, which receivers read it, and who comes before whom.

A **sender** adds to the stream: the token embedding (`input`), each head, each MLP. A **receiver** reads it: the query,
key and value input of each head, each MLP, and the `logits`. Senders come in execution order, so those upstream of a
receiver are the first so many of all: an edge exists where the sender's number is below the receiver's `upstream`.

Everything follows from a few sizes, without weights and without one object an edge: Llama-70B has 40 million.

Order: senders `input`, then per layer its heads, then its MLP; receivers per layer all queries, all keys, all values,
the MLP; `logits` last. With grouped KV heads there is one key and one value receiver a KV head, unless the graph is
`by_query_head`, as files of the EAP-IG repository are; there the queries' numbers are used for keys and values too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from patchkit.errors import InputError
from patchkit.model.dims import Dims
from patchkit.model.once import once

# As names are written: each node has one, without zeros in front.
_NUMBER = "0|[1-9][0-9]{0,8}"
_RECEIVER = re.compile(
    rf"(?:a(?P<layer>{_NUMBER})\.h(?P<head>{_NUMBER})<(?P<letter>[qkv])>|m(?P<mlp>{_NUMBER}))"
)
_SENDER = re.compile(rf"(?:a(?P<attention>{_NUMBER})\.h(?P<head>{_NUMBER})|m(?P<mlp>{_NUMBER}))")


@dataclass(frozen=True)
class EdgeGraph:
    """Senders, receivers and edges of a decoder.

    Attributes:
        n_kv_heads: key and value receivers a layer; `n_heads` in a graph by query head.
        parallel: attention and MLP of a block read the same stream, so the MLP does not receive that layer's heads.
        d_model: width of the stream.
    """

    n_layers: int
    n_heads: int
    n_kv_heads: int
    parallel: bool
    d_model: int

    @classmethod
    def of(cls, dims: Dims, *, by_query_head: bool = False) -> EdgeGraph:
        """The graph of a model's sizes: native (one key and value receiver a KV head), or by query head."""
        kv_heads = dims.n_heads if by_query_head else dims.n_kv_heads
        return cls(dims.n_layers, dims.n_heads, kv_heads, dims.parallel, dims.d_model)

    @property
    def by_query_head(self) -> bool:
        """Whether every query head has key and value receivers of its own."""
        return self.n_kv_heads == self.n_heads

    @property
    def n_senders(self) -> int:
        return 1 + self.n_layers * (self.n_heads + 1)

    @property
    def receivers_a_layer(self) -> int:
        return self.n_heads + 2 * self.n_kv_heads + 1

    @property
    def n_receivers(self) -> int:
        return self.n_layers * self.receivers_a_layer + 1

    @property
    def n_edges(self) -> int:
        """Edges that exist, by arithmetic."""
        edges = 1 + self.n_layers * (self.n_heads + 1)
        for layer in range(self.n_layers):
            before = 1 + layer * (self.n_heads + 1)
            edges += (self.receivers_a_layer - 1) * before
            edges += before if self.parallel else before + self.n_heads
        return edges

    # Senders.

    def heads(self, layer: int) -> slice:
        """Senders of a layer's heads."""
        first = 1 + layer * (self.n_heads + 1)
        return slice(first, first + self.n_heads)

    def mlp_sender(self, layer: int) -> int:
        """The sender of a layer's MLP."""
        return (layer + 1) * (self.n_heads + 1)

    def sender_name(self, sender: int) -> str:
        if sender == 0:
            return "input"
        layer, place = divmod(sender - 1, self.n_heads + 1)
        return f"m{layer}" if place == self.n_heads else f"a{layer}.h{place}"

    def layer_of_sender(self, sender: int) -> int:
        """The layer of a sender; -1 for the input."""
        return (sender - 1) // (self.n_heads + 1) if sender else -1

    @once
    def senders(self) -> tuple[str, ...]:
        """Names of all senders."""
        return tuple(self.sender_name(sender) for sender in range(self.n_senders))

    def find_sender(self, name: str) -> int:
        """The number of the sender called `input`, `a1.h3` or `m2`.

        Raises:
            InputError: no such sender in this graph.
        """
        if name == "input":
            return 0
        match = _SENDER.fullmatch(name)
        if match is not None:
            layer = int(match["mlp"] or match["attention"])
            head = self.n_heads if match["head"] is None else int(match["head"])
            if layer < self.n_layers and (match["head"] is None or head < self.n_heads):
                return 1 + layer * (self.n_heads + 1) + head
        raise InputError(
            f"sender '{name}': expected input, a{{layer}}.h{{head}} or m{{layer}} with layers 0 to {self.n_layers - 1} "
            f"and heads 0 to {self.n_heads - 1}"
        )

    # Receivers.

    def receivers_of(self, layer: int, letter: str) -> slice:
        """Receivers of a layer's queries (`q`), keys (`k`) or values (`v`)."""
        first = layer * self.receivers_a_layer
        first += {"q": 0, "k": self.n_heads, "v": self.n_heads + self.n_kv_heads}[letter]
        return slice(first, first + (self.n_heads if letter == "q" else self.n_kv_heads))

    def attention_receivers(self, layer: int) -> slice:
        """Receivers of a layer's queries, keys and values together."""
        first = layer * self.receivers_a_layer
        return slice(first, first + self.receivers_a_layer - 1)

    def mlp_receiver(self, layer: int) -> int:
        return (layer + 1) * self.receivers_a_layer - 1

    @property
    def logits(self) -> int:
        """The last receiver."""
        return self.n_receivers - 1

    def receiver_name(self, receiver: int) -> str:
        if receiver == self.logits:
            return "logits"
        layer, place = divmod(receiver, self.receivers_a_layer)
        if place == self.receivers_a_layer - 1:
            return f"m{layer}"
        if place < self.n_heads:
            return f"a{layer}.h{place}<q>"
        place -= self.n_heads
        return f"a{layer}.h{place % self.n_kv_heads}<{'kv'[place // self.n_kv_heads]}>"

    def layer_of_receiver(self, receiver: int) -> int:
        """The layer of a receiver; `n_layers` for the logits."""
        return receiver // self.receivers_a_layer

    @once
    def receivers(self) -> tuple[str, ...]:
        """Names of all receivers."""
        return tuple(self.receiver_name(receiver) for receiver in range(self.n_receivers))

    def find_receiver(self, name: str) -> int:
        """The number of the receiver called `logits`, `m2`, `a1.h3<q>`, `a1.h0<k>` or `a1.h0<v>`.

        Raises:
            InputError: no such receiver in this graph.
        """
        if name == "logits":
            return self.logits
        match = _RECEIVER.fullmatch(name)
        if match is not None and int(match["mlp"] or match["layer"]) < self.n_layers:
            if match["mlp"]:
                return self.mlp_receiver(int(match["mlp"]))
            found = self.receivers_of(int(match["layer"]), match["letter"])
            if int(match["head"]) < found.stop - found.start:
                return found.start + int(match["head"])
        raise InputError(
            f"receiver '{name}': expected logits, m{{layer}}, or a{{layer}}.h{{head}} with <q>, <k> or <v>; layers 0 to "
            f"{self.n_layers - 1}, query heads 0 to {self.n_heads - 1}, key and value heads 0 to {self.n_kv_heads - 1}"
        )

    # Edges.

    @once
    def upstream(self) -> Int[Tensor, " receivers"]:
        """How many senders, from the first, each receiver has."""
        counts = []
        for layer in range(self.n_layers):
            before = 1 + layer * (self.n_heads + 1)
            counts += [before] * (self.receivers_a_layer - 1)
            counts.append(before if self.parallel else before + self.n_heads)
        return torch.tensor([*counts, self.n_senders])

    @once
    def real(self) -> Bool[Tensor, "senders receivers"]:
        """Which edges exist."""
        return torch.arange(self.n_senders)[:, None] < self.upstream

    def edge_name(self, sender: int, receiver: int) -> str:
        return f"{self.sender_name(sender)}->{self.receiver_name(receiver)}"

    def find_edge(self, name: str) -> tuple[int, int]:
        """(sender, receiver) of an edge such as `a0.h1->a2.h3<q>`.

        Raises:
            InputError: the name is malformed, or there is no such edge.
        """
        start, arrow, end = name.partition("->")
        if not arrow:
            raise InputError(
                f"edge '{name}': expected sender->receiver, such as a0.h1->a2.h3<q> or m1->logits"
            )
        sender, receiver = self.find_sender(start), self.find_receiver(end)
        if sender >= int(self.upstream[receiver]):
            raise InputError(f"edge '{name}': {start} is not upstream of {end}, so there is no such edge")
        return sender, receiver

    def find_edges(self, names: Iterable[str]) -> Bool[Tensor, "senders receivers"]:
        """The edges of these names, as a mask."""
        mask = torch.zeros(self.n_senders, self.n_receivers, dtype=torch.bool)
        for name in names:
            mask[self.find_edge(name)] = True
        return mask

    @once
    def owner(self) -> Bool[Tensor, "senders receivers"]:
        """Which receivers are inputs of which sender: a head's query, its KV head's key and value, an MLP's own.

        A key or value receiver of a KV head belongs to every query head of its group; `input` owns none, and nobody owns
        `logits`.
        """
        owner = torch.zeros(self.n_senders, self.n_receivers, dtype=torch.bool)
        group = self.n_heads // self.n_kv_heads
        for layer in range(self.n_layers):
            heads = self.heads(layer)
            for head in range(self.n_heads):
                owner[heads.start + head, self.receivers_of(layer, "q").start + head] = True
                for letter in "kv":
                    owner[heads.start + head, self.receivers_of(layer, letter).start + head // group] = True
            owner[self.mlp_sender(layer), self.mlp_receiver(layer)] = True
        return owner
