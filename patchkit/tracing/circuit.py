"""Running circuits: every edge outside carries the ablated value, every edge inside the sender's value in this very run.

    x_v = X~_v + sum over u in C(v) of (y_u - y~_u)

with X~_v the stream when every edge is cut (`_circuit_cut.py`), y_u the sender's current value and y~_u what a cut edge
carries: the forward of Hanna et al. 2024 (arXiv:2403.17806). Where a norm stands between the heads and the
stream, the heads of a layer that v reads enter together: norm(Y~ + sum of their differences) - norm(Y~).

Only senders with an edge out are computed, layer by layer. A layer's queries, keys and values are projected head by head
from the streams that are built for them and put in the place of the model's own projections, so that q/k norms,
rotary embeddings, windows and soft-caps are Hugging Face's. What a block itself adds to its residual stream is not read.

With grouped KV heads a circuit of the graph by query head gives each query head a key and a value of its own: the
attention runs on one copy of every row for each head of a group, copy j with the keys and values of each group's j-th
head, and a head's z is taken from its own copy. In a family with a joint q/k norm (OLMo 2) each copy's keys are normed
over all its KV heads together, as the module does.

Many circuits over a batch of pairs are the rows of one trace.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from patchkit.errors import InputError
from patchkit.model import PatchModel
from patchkit.model.access import module_at, skip_projections
from patchkit.model.edges import EdgeGraph
from patchkit.tracing._circuit_cut import CutRun as CutRun
from patchkit.tracing._circuit_cut import Start as Start
from patchkit.tracing._circuit_cut import cut_run as cut_run
from patchkit.tracing._circuit_cut import first_receiver
from patchkit.tracing._circuit_cut import run_both as run_both
from patchkit.tracing._circuit_cut import start_at as start_at
from patchkit.tracing._circuit_inputs import Inputs, Rows
from patchkit.tracing._inputs import forward_inputs
from patchkit.tracing.senders import position_embedding


def circuit_logits(
    model: PatchModel,
    cut: CutRun,
    graph: EdgeGraph,
    circuits: Sequence[Bool[Tensor, "senders receivers"]],
    start: Start | None = None,
) -> Float[Tensor, "circuits pairs vocab"]:
    """Last-position logits of circuits, run on every pair of a batch.

    Args:
        graph: the circuits' own: native, or by query head.
        circuits: which edges each holds; need not be pruned.
        start: for circuits that hold every edge below it: those layers are not run.

    Raises:
        InputError: a graph of other sizes than the model's, no circuits, or one that lacks an edge below the start.
    """
    check_graph(model, graph)
    if not circuits:
        raise InputError("there are no circuits to run; expected at least one")
    if start is not None:
        first = first_receiver(graph, start.known)
        for edges in circuits:
            missing = graph.real[:, :first] & ~edges[:, :first]
            if bool(missing.any()):
                sender, receiver = missing.nonzero()[0].tolist()
                raise InputError(
                    f"edge {graph.edge_name(sender, receiver)} is cut, but the circuit is started behind it, where all "
                    "lower edges must be in the circuit"
                )
    run = _Run(model, cut, graph, circuits, start)
    inputs = run.forward_inputs()
    with torch.no_grad():
        with model.lm.trace(**inputs):
            run.run()
            logits = model.lm.output.logits[:, -1].save()
    return logits[: len(circuits) * cut.batch.rows].unflatten(0, (len(circuits), cut.batch.rows))


def check_graph(model: PatchModel, graph: EdgeGraph) -> None:
    """Raises InputError unless the graph is one of the model's: native, or by query head."""
    if graph not in (EdgeGraph.of(model.dims), EdgeGraph.of(model.dims, by_query_head=True)):
        raise InputError(
            f"the circuit is of a graph of {graph.n_layers} layers, {graph.n_heads} heads, {graph.n_kv_heads} KV heads, "
            f"d_model {graph.d_model}, {'parallel' if graph.parallel else 'sequential'} blocks, but {model!r} has "
            f"{model.dims.n_kv_heads} KV heads and {'parallel' if model.dims.parallel else 'sequential'} blocks; give "
            "a circuit of this model"
        )


class _Run:
    """The rows of one trace: copies x circuits x pairs. `run` is called in its body."""

    def __init__(
        self,
        model: PatchModel,
        cut: CutRun,
        graph: EdgeGraph,
        circuits: Sequence[Tensor],
        start: Start | None,
    ) -> None:
        self.model, self.cut, self.graph = model, cut, graph
        self.pairs, self.width = cut.batch.rows, cut.batch.width
        self.split = graph.n_kv_heads != model.dims.n_kv_heads
        self.copies = model.dims.group if self.split else 1
        #: Whether only the last position is left to compute.
        self.last = False
        known = 1 if start is None else start.known
        self.shared = None if start is None else Rows(start.differences, torch.arange(-1, known), 1 + known)
        self.own: list[Rows] = []
        self.circuits: list[Inputs] = []
        #: Of each circuit, the heads to compute in each layer, and whether its MLP is.
        self.heads: list[list[Tensor]] = []
        self.mlps: list[list[bool]] = []
        #: Of some circuits, what the layer's MLP reads but for the layer's own heads, and how many rows that is.
        self.partial: dict[int, tuple[Tensor, tuple[int, ...]]] = {}
        behind = None if model.arch.attn_out is None else self._behind_heads
        for edges in circuits:
            computed = edges.any(1)
            computed[:known] = False
            own = self._rows(computed.nonzero()[:, 0])
            self.own.append(own)
            pieces = [own] if self.shared is None else [self.shared, own]
            self.circuits.append(Inputs(graph, edges, pieces, behind))
            layers = range(graph.n_layers)
            self.heads.append([computed[graph.heads(layer)].nonzero()[:, 0] for layer in layers])
            self.mlps.append([bool(computed[graph.mlp_sender(layer)]) for layer in layers])

    def forward_inputs(self) -> dict[str, Any]:
        times = self.copies * len(self.circuits)
        return forward_inputs(self.model, self.cut.batch.repeat(times))

    def run(self) -> None:
        model, arch, cut = self.model, self.model.arch, self.cut
        placed = None if cut.placed else position_embedding(model)
        self.placed = None if placed is None else placed[: self.pairs].clone()
        rows, end = self.copies * len(self.circuits) * self.pairs, model.dims.n_layers - 1
        # A block that is skipped must give something of this shape; nothing reads it.
        blank = cut.input.new_zeros(1, 1, 1).expand(rows, self.width, model.dims.d_model)
        self._set_stream(cut.before[0])
        for layer in range(model.dims.n_layers):
            block = model.block(layer)
            attends = any(len(heads[layer]) for heads in self.heads)
            if attends:
                self._set_stream(cut.before[layer])
                self._add_heads(layer, self._attend(layer))
            if layer == end and not self.last:
                self._keep_last_position()
            self._set_stream(cut.between[layer])
            self._add_mlps(layer)
            if attends:
                module_at(block, arch.mlp).skip(blank[:, -1:].to(self._device(layer)))
            written = self._end() if layer == end else blank
            if not attends:
                block.skip(written.to(self._device(layer)))
            elif layer == end:
                block.output = written.to(self._device(layer))

    # Rows of differences.

    def _rows(self, senders: Int[Tensor, " n"]) -> Rows:
        """Room for the differences of a circuit's senders; without a start the stream and the input come first."""
        own = self.cut.input
        tokens, width = own.shape[0] * own.shape[1], own.shape[2]
        if self.shared is not None:
            return Rows(own.new_empty(tokens, len(senders), width), senders, 0)
        rows = Rows(
            own.new_empty(tokens, 2 + len(senders), width), torch.cat([torch.tensor([-1, 0]), senders]), 1
        )
        rows.add((own - self.cut.other.input).reshape(tokens, 1, width))
        return rows

    def _set_stream(self, stream: Float[Tensor, "pairs width d_model"]) -> None:
        """Makes this the stream that receivers read when every edge is cut."""
        self.stream = self._tokens(stream if self.placed is None else stream + self.placed.to(stream))
        for rows in self.own if self.shared is None else [self.shared]:
            rows.values[:, 0] = self.stream

    def _tokens(self, value: Float[Tensor, "pairs width ..."]) -> Float[Tensor, "tokens ..."]:
        """One axis for the tokens of all pairs; at the end of the last layer there is only the last of each."""
        return value[:, -1] if self.last else value.flatten(0, 1)

    def _keep_last_position(self) -> None:
        """Behind the last layer's keys and values nothing reads any other position."""
        self.last = True
        for rows in [*self.own, *([] if self.shared is None else [self.shared])]:
            rows.values = self._last(rows.values)
        self.stream = self._last(self.stream)
        self.partial = {circuit: (self._last(total), rows) for circuit, (total, rows) in self.partial.items()}

    def _last(self, value: Float[Tensor, "tokens ..."]) -> Float[Tensor, "pairs ..."]:
        return value.unflatten(0, (self.pairs, self.width))[:, -1]

    def _sums(self) -> list[Tensor]:
        return [self._tokens(total) for total in self.cut.sums]

    def _behind_heads(self, layer: int, total: Tensor) -> Tensor:
        norm = module_at(self.model.block(layer), self.model.arch.attn_out_path)
        return norm(total.to(self._device(layer))).to(total)

    def _device(self, layer: int) -> torch.device:
        """Where a layer computes; rows of differences are where the prompts are."""
        return self.model.layer_device(layer) or self.cut.input.device

    # Attention.

    def _attend(self, layer: int) -> Float[Tensor, "copies circuits pairs width head d_head"]:
        """Runs the layer's attention on the queries, keys and values of every circuit; returns z, and skips W_O."""
        model, dims = self.model, self.model.dims
        shape = (len(self.circuits), self.pairs, self.width)
        sizes = {
            "q": (1, dims.n_heads),
            "k": (self.copies, dims.n_kv_heads),
            "v": (self.copies, dims.n_kv_heads),
        }
        given = {
            letter: self.cut.input.new_zeros(copies, *shape, heads, dims.d_head, device=self._device(layer))
            for letter, (copies, heads) in sizes.items()
        }
        for letters in ("kv", "q") if layer == dims.n_layers - 1 else ("qkv",):
            if letters == "q":
                self._keep_last_position()
            for circuit, heads in enumerate(self.heads):
                if len(heads[layer]):
                    self._project(layer, circuit, letters, heads[layer], given)
        rows = (self.copies * shape[0] * self.pairs, self.width)
        given["q"] = given["q"].expand(self.copies, *given["q"].shape[1:])
        skip_projections(model, layer, *(each.reshape(*rows, *each.shape[-2:]) for each in given.values()))
        out = module_at(model.block(layer), model.arch.out_proj)
        z = out.input
        out.skip(z.new_zeros(rows[0], 1, dims.d_model))
        return z.reshape(self.copies, *shape, dims.n_heads, dims.d_head)

    def _project(
        self, layer: int, circuit: int, letters: str, heads: Int[Tensor, " n"], given: Mapping[str, Tensor]
    ) -> None:
        """Puts one circuit's queries, keys or values of some heads in their places among those that are given."""
        dims, arch = self.model.dims, self.model.arch
        if arch.joint_qk_norm:
            # A norm over all heads needs all of them.
            heads = torch.arange(dims.n_heads)
        # The receivers of keys and values in the graph.
        slots = heads if self.split else (heads // dims.group).unique()
        slots_of = {"q": heads, "k": slots, "v": slots}
        receivers = [self.graph.receivers_of(layer, letter).start + slots_of[letter] for letter in letters]
        if self.mlps[circuit][layer] and letters != "q":
            # The MLP's stream is begun here, since what is read of all rows is read once.
            receivers.append(torch.tensor([self.graph.mlp_receiver(layer)]))
        streams = self.circuits[circuit].read(torch.cat(receivers), self._sums())
        if self.mlps[circuit][layer] and letters != "q":
            begun = streams[:, -1:] - self.stream[:, None].to(streams)
            self.partial[circuit] = (begun, self.circuits[circuit].filled)
        streams = streams.to(self._device(layer))
        if arch.attn_norm is not None:
            streams = module_at(self.model.block(layer), arch.attn_norm)(streams)
        streams = streams.transpose(0, 1).expand(sum(map(len, receivers)), -1, -1)
        at = 0
        for letter in letters:
            here, projection = slots_of[letter], self.model.projections(layer)["qkv".index(letter)]
            part, at = streams[at : at + len(here)], at + len(here)
            apart = self.split and letter != "q"
            kv_head = here // dims.group if apart else here
            weight = _some(projection.weight.to(part), 0, kv_head)
            if projection.bias is None:
                projected = torch.bmm(part, weight)
            else:
                bias = _some(projection.bias.to(part), 0, kv_head)
                projected = torch.baddbmm(bias[:, None], part, weight)
            for copy, target in enumerate(given[letter][:, circuit]):
                mine = here % dims.group == copy if apart else torch.ones_like(here).bool()
                _put(self._tokens(target), kv_head[mine], projected[mine] if apart else projected)

    def _add_heads(self, layer: int, z: Float[Tensor, "copies circuits pairs width head d_head"]) -> None:
        """The differences of the layer's heads, z_h W_O[h] less what cut edges carry."""
        group, other = self.model.dims.group, self._tokens(self.cut.other.heads[layer])
        weight = self.model.w_o(layer)
        for circuit, of_layers in enumerate(self.heads):
            heads = of_layers[layer]
            if len(heads):
                if self.split:
                    mine = z[heads % group, circuit, :, :, heads].movedim(0, 2)
                else:
                    mine = _some(z[0, circuit], 2, heads)
                change = self._tokens(mine) - _some(other, 1, heads).to(mine)
                written = torch.bmm(change.transpose(0, 1), _some(weight.to(change), 0, heads))
                self.own[circuit].add(written.transpose(0, 1))

    # MLPs and the end.

    def _add_mlps(self, layer: int) -> None:
        """The differences of the layer's MLP in every circuit that has it, in one call."""
        arch, block = self.model.arch, self.model.block(layer)
        having = [circuit for circuit, mlps in enumerate(self.mlps) if mlps[layer]]
        if not having:
            return
        written = torch.cat([self._read_by_mlp(circuit, layer) for circuit in having])
        self.partial.clear()
        width = 1 if self.last else self.width
        written = written.reshape(len(having) * self.pairs, width, -1).to(self._device(layer))
        if arch.mlp_norm is not None:
            written = module_at(block, arch.mlp_norm)(written)
        written = module_at(block, arch.mlp)(written)
        if arch.mlp_out is not None:
            written = module_at(block, arch.mlp_out)(written)
        other = self._tokens(self.cut.other.mlps[layer])
        for circuit, mine in zip(having, written.reshape(len(having), *other.shape), strict=True):
            self.own[circuit].add((mine - other.to(mine))[:, None])

    def _read_by_mlp(self, circuit: int, layer: int) -> Float[Tensor, "tokens 1 d_model"]:
        inputs, receiver = self.circuits[circuit], torch.tensor([self.graph.mlp_receiver(layer)])
        if circuit not in self.partial:
            return inputs.read(receiver, self._sums())
        begun, since = self.partial[circuit]
        return inputs.add(begun + self.stream[:, None].to(begun), receiver, self._sums(), since)

    def _end(self) -> Float[Tensor, "rows width d_model"]:
        """The stream before the final norm, the same at all positions since only the last is read."""
        self._set_stream(self.cut.before[-1])
        receiver = torch.tensor([self.graph.logits])
        ends = torch.cat([inputs.read(receiver, self._sums()) for inputs in self.circuits])
        return ends.repeat(self.copies, 1, 1).expand(-1, self.width, -1)


def _some(value: Tensor, axis: int, which: Int[Tensor, " n"]) -> Tensor:
    """Entries along an axis, some of them perhaps several times; a view where that is all of them in order."""
    every = torch.equal(which.cpu(), torch.arange(value.shape[axis]))
    return value if every else value.index_select(axis, which.to(value.device))


def _put(
    target: Float[Tensor, "tokens head d"], heads: Int[Tensor, " n"], value: Float[Tensor, "n tokens d"]
) -> None:
    """Writes some heads' values, ascending, into a view."""
    if len(heads) == target.shape[1]:
        target.copy_(value.transpose(0, 1))
    else:
        target.index_copy_(1, heads.to(target.device), value.transpose(0, 1))
