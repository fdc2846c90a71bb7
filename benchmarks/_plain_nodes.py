"""The node methods in plain torch, on a Hugging Face model that nnsight never touched: hooks and autograd, no more.

Written as someone would for one model and one question: frozen parameters, logits at the last position only, hooks on
for the one run that needs them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

#: Where the modules are, by model type: blocks, embedding, final norm; in a block: output projection, MLP, its last map.
PATHS = {
    "gpt2": ("transformer.h", "transformer.wte", "transformer.ln_f", "attn.c_proj", "mlp", "mlp.c_proj"),
    "llama": ("model.layers", "model.embed_tokens", "model.norm", "self_attn.o_proj", "mlp", "mlp.down_proj"),
}
#: Activations of a run by kind (z, neuron, mlp_out, attn_out) and layer.
Kept = dict[tuple[str, int], Tensor]
SCORED = ("z", "neuron", "mlp_out")


class PlainNodes:
    """AtP, GradDrop and the sweep of all heads for one batch of prompt pairs of one length.

    Args:
        base, source: `[pairs, tokens]`; nodes of `base` are replaced by those of `source`.
        answer, wrong: `[pairs]`; the metric is the difference of their logits at the last token.
    """

    def __init__(self, model: Any, base: Tensor, source: Tensor, answer: Tensor, wrong: Tensor) -> None:
        self.model, self.base, self.source = model.requires_grad_(False), base, source
        self.answer, self.wrong = answer, wrong
        blocks, embed, norm, self.out, self.mlp, self.down = PATHS[model.config.model_type]
        self.blocks: nn.ModuleList = attrgetter(blocks)(model)
        self.embed: nn.Module = attrgetter(embed)(model)
        self.norm: nn.Module = attrgetter(norm)(model)
        self.heads: int = model.config.num_attention_heads

    def forward(self) -> None:
        """F: one forward over the base prompts as Hugging Face gives it, logits at every position."""
        with torch.no_grad():
            self.model(input_ids=self.base, use_cache=False)

    def metric(self, logits: Tensor, pairs: Tensor | None = None) -> Tensor:
        answer, wrong = (
            (self.answer, self.wrong) if pairs is None else (self.answer[pairs], self.wrong[pairs])
        )
        return (logits.gather(1, answer[:, None]) - logits.gather(1, wrong[:, None]))[:, 0]

    def atp(self) -> dict[str, Tensor]:
        """Two forwards and a backward; `[pairs, layers, ...]` for z (heads), neuron and mlp_out."""
        other, _ = self._run(self.source, grad=False)
        own, logits = self._run(self.base, grad=True)
        wanted = [key for key in own if key[0] in SCORED]
        taken = torch.autograd.grad(self.metric(logits).sum(), [own[key] for key in wanted])
        return self._scores(other, own, dict(zip(wanted, taken, strict=True)))

    def grad_drop(self) -> dict[str, Tensor]:
        """One graph and a backward for each block, with the gradients at its two outputs set to zero."""
        other, _ = self._run(self.source, grad=False)
        own, logits = self._run(self.base, grad=True)
        score = self.metric(logits).sum()
        wanted = [key for key in own if key[0] in SCORED]
        total: dict[str, Tensor] = {}
        for layer in range(len(self.blocks)):
            handles = [own[kind, layer].register_hook(torch.zeros_like) for kind in ("attn_out", "mlp_out")]
            taken = torch.autograd.grad(score, [own[key] for key in wanted], retain_graph=True)
            for handle in handles:
                handle.remove()
            gradients = dict(zip(wanted, taken, strict=True))
            # The gradient that autograd hands out at a hooked tensor may be the one before its hook.
            gradients["mlp_out", layer] = torch.zeros_like(gradients["mlp_out", layer])
            for kind, found in self._scores(other, own, gradients).items():
                size = found.abs() / (len(self.blocks) - 1)
                total[kind] = total[kind] + size if kind in total else size
        return total

    @torch.no_grad()
    def sweep(self, tokens: int) -> Tensor:
        """The exact effect of every head, `[pairs, layers, heads]`, from a cache of the residual stream.

        Runs the blocks from the patched one on, with the heads swapped in the rows of that block, as many rows at once
        as give so many tokens.
        """
        kept, _ = self._run(self.source, grad=False)
        streams: list[Tensor] = []
        rotary: dict[str, Any] = {}

        def keep(_: nn.Module, args: tuple[Tensor, ...], keywords: dict[str, Any]) -> None:
            streams.append(args[0])
            rotary.update({name: keywords[name] for name in ("position_embeddings",) if name in keywords})

        handles = [block.register_forward_pre_hook(keep, with_kwargs=True) for block in self.blocks]
        logits = self.model(input_ids=self.base, use_cache=False, logits_to_keep=1).logits[:, -1]
        for handle in handles:
            handle.remove()
        before = self.metric(logits)
        pairs, width = self.base.shape
        effects = torch.empty(pairs, len(self.blocks), self.heads)
        pair = torch.arange(pairs).repeat_interleave(self.heads)
        head = torch.arange(self.heads).repeat(pairs)
        for layer, block in enumerate(self.blocks):
            source = kept["z", layer].unflatten(-1, (self.heads, -1))
            for rows in torch.arange(len(pair)).split(tokens // width):
                here, heads = pair[rows], head[rows]
                hidden = streams[layer][here]
                with self._swapped(block, source[here, :, heads], heads):
                    for above in self.blocks[layer:]:
                        hidden = above(hidden, **rotary)
                logits = self.model.lm_head(self.norm(hidden[:, -1]))
                effects[here, layer, heads] = self.metric(logits, here) - before[here]
        return effects

    @torch.no_grad()
    def effect(self, layer: int, head: int, columns: slice) -> Tensor:
        """The exact effect of one head at some columns by a whole forward, `[pairs]`: what sweeps are checked with."""
        kept, before = self._run(self.source, grad=False)[0], self._run(self.base, grad=False)[1]
        source = kept["z", layer].unflatten(-1, (self.heads, -1))[:, :, head]
        with self._swapped(self.blocks[layer], source, torch.full((len(source),), head), columns):
            logits = self.model(input_ids=self.base, use_cache=False, logits_to_keep=1).logits[:, -1]
        return self.metric(logits) - self.metric(before)

    @contextlib.contextmanager
    def _swapped(
        self, block: nn.Module, new: Tensor, heads: Tensor, columns: slice = slice(None)
    ) -> Iterator[None]:
        def swap(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            z = args[0].unflatten(-1, (self.heads, -1)).clone()
            z[torch.arange(len(z)), columns, heads] = new[:, columns]
            return (z.flatten(-2),)

        handle = block.get_submodule(self.out).register_forward_pre_hook(swap)
        try:
            yield
        finally:
            handle.remove()

    def _run(self, ids: Tensor, grad: bool) -> tuple[Kept, Tensor]:
        kept: Kept = {}

        def given(kind: str, layer: int) -> Callable[..., None]:
            return lambda _, args: kept.__setitem__((kind, layer), args[0])

        def made(kind: str, layer: int) -> Callable[..., None]:
            return lambda _, args, output: kept.__setitem__((kind, layer), output)

        handles = []
        for layer, block in enumerate(self.blocks):
            out = block.get_submodule(self.out)
            handles.append(out.register_forward_pre_hook(given("z", layer)))
            handles.append(out.register_forward_hook(made("attn_out", layer)))
            down = block.get_submodule(self.down)
            handles.append(down.register_forward_pre_hook(given("neuron", layer)))
            handles.append(block.get_submodule(self.mlp).register_forward_hook(made("mlp_out", layer)))
        if grad:
            handles.append(
                self.embed.register_forward_hook(lambda _, args, output: output.requires_grad_(True))
            )
        with torch.set_grad_enabled(grad):
            logits = self.model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1]
        for handle in handles:
            handle.remove()
        return kept, logits

    def _scores(self, other: Kept, own: Kept, gradients: Kept) -> dict[str, Tensor]:
        found: dict[str, list[Tensor]] = {kind: [] for kind in SCORED}
        for (kind, layer), gradient in gradients.items():
            product = (other[kind, layer] - own[kind, layer].detach()) * gradient
            if kind == "z":
                score = product.unflatten(-1, (self.heads, -1)).sum((1, 3))
            else:
                score = product.sum(1) if kind == "neuron" else product.sum((1, 2))
            found[kind].append(score)
        return {kind: torch.stack(layers, dim=1) for kind, layers in found.items()}
