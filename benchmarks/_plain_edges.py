"""The edge methods in plain torch, on a Hugging Face model that nnsight never touched: hooks and autograd, no more.

The stream is never split: a head's gradient at its own input comes from that at its query, key or value, through its
rows of the projection and the norm's backward in closed form. Written as someone would for one model and one question:
frozen parameters, logits at the last position only, the differences of all senders in one tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from _plain_runs import Hooks, PlainModel, Run, hooked
from torch import Tensor, nn


class PlainEdges(PlainModel):
    """EAP, EAP-IG-inputs, a circuit's run and single edges, for one batch of prompt pairs of one length."""

    # Estimates.

    def eap(self) -> Tensor:
        """`[senders, receivers]`, mean over pairs; 0 where there is no edge."""
        other = self.run(self.source)
        own = self.run(self.base, grad=True)
        scores = torch.zeros(self.senders, self.receivers)
        self._products(self._differences(other, own), self._gradients(own), scores)
        return scores / len(self.base)

    def eap_ig_inputs(self, steps: int) -> Tensor:
        """The gradient at `source + k/steps (base - source)` of the embeddings, k = 0 to steps - 1, averaged."""
        own = self.run(self.base)
        other, total = None, {}
        for step in range(steps):
            start = self.embed(self.source)
            run = self.run(self.base, grad=True, given=start + step / steps * (own.embed - start))
            # On the first step the run is that of the source prompts.
            other = run if other is None else other
            for place, gradient in self._gradients(run).items():
                total[place] = gradient.add_(total[place]) if place in total else gradient
        assert other is not None
        scores = torch.zeros(self.senders, self.receivers)
        self._products(self._differences(other, own), total, scores)
        return scores / len(self.base) / steps

    def _gradients(self, run: Run) -> dict[tuple[str, int], Tensor]:
        """Of the summed metric at what each receiver reads: by layer `[receivers, pair, position, d_model]`."""
        places = list(run.reads)
        taken = torch.autograd.grad(self.metric(run.logits).sum(), [run.reads[place] for place in places])
        given = dict(zip(places, taken, strict=True))
        found = {("logits", self.layers): given["logits", self.layers][None]}
        for layer, block in enumerate(self.blocks):
            parts = [given[name, layer] for name in self.places.projections]
            heads = torch.cat(parts, dim=-1).unflatten(-1, (self.readers, -1))
            weights = self.projections(block)
            pairs, tokens = heads.shape[:2]
            at_norm = torch.bmm(heads.flatten(0, 1).transpose(0, 1), weights).unflatten(1, (pairs, tokens))
            norm = block.get_submodule(self.places.attention_norm)
            found["attention", layer] = _norm_backward(norm, run.streams["attention", layer], at_norm)
            norm = block.get_submodule(self.places.mlp_norm)
            found["mlp", layer] = _norm_backward(norm, run.streams["mlp", layer], given["mlp", layer][None])
        return found

    def _products(self, changes: Tensor, gradients: dict[tuple[str, int], Tensor], scores: Tensor) -> None:
        for (kind, layer), gradient in gradients.items():
            before, first = self._upstream(kind, layer)
            scores[:before, first : first + len(gradient)] = (
                changes[:before].flatten(1) @ gradient.flatten(1).T
            )

    def _upstream(self, kind: str, layer: int) -> tuple[int, int]:
        """(how many senders are upstream, number of the first receiver)."""
        before, first = 1 + layer * (self.heads + 1), layer * (self.readers + 1)
        return (before + self.heads, first + self.readers) if kind == "mlp" else (before, first)

    # Circuits.

    @torch.no_grad()
    def evaluate(self, circuit: Tensor) -> Tensor:
        """The metric `[pairs]` with every edge outside a circuit (`[senders, receivers]`) cut."""
        other = self.run(self.source)
        cut = (~circuit).float()
        changes = torch.zeros(self.senders, *self.base.shape, self.d_model)
        held: dict[str, Tensor] = {}

        def update(kind: str, layer: int, readers: int) -> Tensor:
            before, first = self._upstream(kind, layer)
            mask = cut[:before, first : first + readers]
            return (mask.T @ changes[:before].flatten(1)).unflatten(1, changes.shape[1:])

        def embedded(_: nn.Module, __: Any, output: Tensor) -> None:
            changes[0] = other.embed - output

        def before_attention(layer: int) -> Callable[..., None]:
            norm = self.blocks[layer].get_submodule(self.places.attention_norm)

            def hook(_: nn.Module, args: tuple[Tensor]) -> None:
                # `forward`, since a call would come here again.
                inputs = norm.forward(args[0] + update("attention", layer, self.readers))
                held["heads"] = torch.bmm(inputs.flatten(1, 2), self.projections(self.blocks[layer]).mT)

            return hook

        def projected(name: str) -> Callable[..., Tensor]:
            def hook(module: nn.Module, _: Any, output: Tensor) -> Tensor:
                # [receivers, pair and position, d_head] to [pair, position, receivers and d_head].
                part = held["heads"][self.slots[name]].transpose(0, 1).reshape(output.shape)
                bias = getattr(module, "bias", None)
                return part if bias is None else part + bias

            return hook

        def attended(layer: int) -> Callable[..., None]:
            def hook(_: nn.Module, args: tuple[Tensor]) -> None:
                self._heads(layer, other.z[layer] - args[0], changes)

            return hook

        def before_norm(kind: str, layer: int) -> Callable[..., tuple[Tensor]]:
            return lambda _, args: (args[0] + update(kind, layer, 1)[0],)

        def fed(layer: int) -> Callable[..., None]:
            def hook(_: nn.Module, __: Any, output: Tensor) -> None:
                changes[(layer + 1) * (self.heads + 1)] = other.mlp[layer] - output

            return hook

        hooks: Hooks = [(self.embed, embedded, False)]
        for layer, block in enumerate(self.blocks):
            get = block.get_submodule
            hooks.append((get(self.places.attention_norm), before_attention(layer), True))
            hooks += [(get(name), projected(name), False) for name in self.places.projections]
            hooks.append((get(self.places.out), attended(layer), True))
            hooks.append((get(self.places.mlp_norm), before_norm("mlp", layer), True))
            hooks.append((get(self.places.mlp), fed(layer), False))
        hooks.append((self.norm, before_norm("logits", self.layers), True))
        with hooked(hooks):
            logits = self.model(input_ids=self.base, use_cache=False, logits_to_keep=1).logits[:, -1]
        return self.metric(logits)

    # Single edges.

    @torch.no_grad()
    def exact(self, edges: Sequence[tuple[int, int]], tokens: int) -> Tensor:
        """The effect of each edge alone, mean over pairs, from a cache of the residual stream.

        Runs the blocks from the receiver's on, with its input changed in the rows of that edge, as many rows at once as
        give so many tokens.
        """
        other, own = self.run(self.source), self.run(self.base)
        changes = self._differences(other, own)
        before = self.metric(own.logits)
        pairs, width = self.base.shape
        effects = torch.empty(len(edges))
        for layer in range(self.layers + 1):
            here = [i for i, (_, receiver) in enumerate(edges) if receiver // (self.readers + 1) == layer]
            for start in range(0, len(here), max(1, tokens // (width * pairs))):
                chosen = here[start : start + max(1, tokens // (width * pairs))]
                senders = torch.tensor([edges[i][0] for i in chosen])
                readers = [edges[i][1] % (self.readers + 1) for i in chosen]
                logits = self._restarted(layer, own, changes[senders], readers)
                effects[chosen] = (
                    (self.metric(logits) - before.repeat(len(chosen))).unflatten(0, (-1, pairs)).mean(1)
                )
        return effects

    def _restarted(self, layer: int, own: Run, added: Tensor, readers: list[int]) -> Tensor:
        """Logits of the blocks from `layer` on, with `added` `[edge, pair, ...]` to what one receiver a row reads."""
        rows = added.flatten(0, 1)
        if layer == self.layers:
            stream = own.streams["logits", layer][:, -1].repeat(len(readers), 1)
            return self.model.lm_head(self.norm(stream + rows[:, -1]))
        block, pairs = self.blocks[layer], len(self.base)
        stream = own.streams["attention", layer].repeat(len(readers), 1, 1)
        get, weights = block.get_submodule, self.projections(block)
        normed = get(self.places.attention_norm)(stream + rows).unflatten(0, (-1, pairs))

        def projected(name: str) -> Callable[..., Tensor]:
            def hook(module: nn.Module, _: Any, output: Tensor) -> Tensor:
                heads = output.unflatten(-1, (-1, weights.shape[1])).unflatten(0, (-1, pairs)).clone()
                slot, bias = self.slots[name], getattr(module, "bias", None)
                for edge, reader in enumerate(readers):
                    if slot.start <= reader < slot.stop:
                        place = reader - slot.start
                        new = normed[edge] @ weights[reader].T
                        if bias is not None:
                            new = new + bias.unflatten(0, (-1, weights.shape[1]))[place]
                        heads[edge, :, :, place] = new
                return heads.flatten(0, 1).flatten(-2)

            return hook

        to_mlp = torch.tensor([reader == self.readers for reader in readers]).repeat_interleave(pairs)

        def mlp_read(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            return (args[0] + rows * to_mlp[:, None, None],)

        hooks: Hooks = [(get(name), projected(name), False) for name in self.places.projections]
        with hooked([*hooks, (get(self.places.mlp_norm), mlp_read, True)]):
            stream = block(stream, **self.rotary)
        for above in self.blocks[layer + 1 :]:
            stream = above(stream, **self.rotary)
        return self.model.lm_head(self.norm(stream[:, -1]))

    def _differences(self, other: Run, own: Run) -> Tensor:
        """What every sender adds to the stream in `other` less in `own`: `[senders, pair, position, d_model]`."""
        changes = torch.empty(self.senders, *self.base.shape, self.d_model)
        with torch.no_grad():
            changes[0] = other.embed - own.embed
            for layer in range(self.layers):
                self._heads(layer, other.z[layer] - own.z[layer], changes)
                changes[(layer + 1) * (self.heads + 1)] = other.mlp[layer] - own.mlp[layer]
        return changes

    def _heads(self, layer: int, z: Tensor, into: Tensor) -> None:
        """z_h W_O[h] of each head of a layer, into its place among the senders."""
        weight = self.out_weight(layer).T
        first = 1 + layer * (self.heads + 1)
        by_head = z.flatten(0, 1).unflatten(-1, (self.heads, -1)).transpose(0, 1)
        out = into[first : first + self.heads].flatten(1, 2)
        torch.bmm(by_head, weight.unflatten(0, (self.heads, -1)), out=out)


def _norm_backward(norm: Any, stream: Tensor, gradient: Tensor) -> Tensor:
    """The gradient at what a norm is given, from that at its output; LayerNorm where it has a bias, else RMSNorm."""
    stream = stream.detach()
    centred = getattr(norm, "bias", None) is not None
    if centred:
        stream = stream - stream.mean(-1, keepdim=True)
    eps = norm.eps if centred else norm.variance_epsilon
    scale = (stream.square().mean(-1, keepdim=True) + eps).rsqrt()
    unit = stream * scale
    gradient = gradient * norm.weight
    along = (gradient * unit).mean(-1, keepdim=True)
    if centred:
        gradient -= gradient.mean(-1, keepdim=True)
    return gradient.addcmul_(unit, along, value=-1.0).mul_(scale)
