"""A Hugging Face model in plain torch, with what the edge methods need of it: its modules, weights by head, and runs.

Numbering is that of `patchkit.model.edges.EdgeGraph`, with one key and one value receiver a KV head.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

#: (module, hook, whether it comes before the module's forward).
Hooks = list[tuple[nn.Module, Callable[..., Any], bool]]


@dataclass(frozen=True)
class Places:
    """Where the modules of a model type are."""

    blocks: str
    embed: str
    norm: str
    attention_norm: str
    projections: tuple[str, ...]
    out: str
    mlp_norm: str
    mlp: str


PLACES = {
    "gpt2": Places(
        "transformer.h",
        "transformer.wte",
        "transformer.ln_f",
        "ln_1",
        ("attn.c_attn",),
        "attn.c_proj",
        "ln_2",
        "mlp",
    ),
    "llama": Places(
        "model.layers",
        "model.embed_tokens",
        "model.norm",
        "input_layernorm",
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "self_attn.o_proj",
        "post_attention_layernorm",
        "mlp",
    ),
}


@dataclass
class Run:
    """What the senders of a run hold, and what its receivers read.

    Attributes:
        z, mlp: of each layer; `embed`, the token embedding.
        streams: by layer and then once more, what the norms before attention, MLP and logits are given.
        reads: what gradients are taken at: by layer the outputs of the projections, and that of the norm before the MLP.
    """

    embed: Tensor = field(default_factory=lambda: torch.empty(0))
    z: dict[int, Tensor] = field(default_factory=dict)
    mlp: dict[int, Tensor] = field(default_factory=dict)
    streams: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    reads: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    logits: Tensor = field(default_factory=lambda: torch.empty(0))


class PlainModel:
    """A model and one batch of prompt pairs of one length.

    Args:
        base, source: `[pairs, tokens]`; cut edges of `base` carry what `source` has.
        answer, wrong: `[pairs]`; the metric is the difference of their logits at the last token.
    """

    def __init__(self, model: Any, base: Tensor, source: Tensor, answer: Tensor, wrong: Tensor) -> None:
        self.model, self.base, self.source = model.requires_grad_(False), base, source
        self.answer, self.wrong = answer, wrong
        self.places = PLACES[model.config.model_type]
        self.blocks: nn.ModuleList = attrgetter(self.places.blocks)(model)
        self.embed: nn.Module = attrgetter(self.places.embed)(model)
        self.norm: nn.Module = attrgetter(self.places.norm)(model)
        config = model.config
        self.layers, self.d_model = len(self.blocks), int(config.hidden_size)
        self.heads = int(config.num_attention_heads)
        self.kv_heads: int = getattr(config, "num_key_value_heads", self.heads)
        #: What the blocks are called with beside the stream.
        self.rotary: dict[str, Any] = {}
        #: Senders, and receivers of a layer's attention.
        self.senders = 1 + self.layers * (self.heads + 1)
        self.readers = self.heads + 2 * self.kv_heads
        self.receivers = self.layers * (self.readers + 1) + 1
        #: Which of a layer's receivers each projection is of.
        self.slots: dict[str, slice] = {}
        d_head = self.out_weight(0).shape[1] // self.heads
        for name in self.places.projections:
            first = max((slot.stop for slot in self.slots.values()), default=0)
            wide = len(_weight(self.blocks[0].get_submodule(name))) // d_head
            self.slots[name] = slice(first, first + wide)

    def forward(self) -> None:
        """F: one forward over the base prompts as Hugging Face gives it, logits at every position."""
        with torch.no_grad():
            self.model(input_ids=self.base, use_cache=False)

    def metric(self, logits: Tensor) -> Tensor:
        """Of each row; rows are the pairs, over and over."""
        rows = torch.arange(len(logits))
        pairs = rows % len(self.answer)
        return logits[rows, self.answer[pairs]] - logits[rows, self.wrong[pairs]]

    def run(self, ids: Tensor, grad: bool = False, given: Tensor | None = None) -> Run:
        """A run over some prompts, `given` embeddings in place of theirs."""
        run = Run()

        def embedded(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            run.embed = output if given is None else given
            # A leaf, so that there is something to differentiate: parameters are frozen.
            return run.embed.detach().requires_grad_(grad)

        def keep(into: dict[Any, Tensor], place: Any) -> Callable[..., None]:
            return lambda _, args, *output: into.__setitem__(place, output[0] if output else args[0])

        def block_given(_: nn.Module, __: Any, keywords: dict[str, Any]) -> None:
            self.rotary = {name: keywords[name] for name in ("position_embeddings",) if name in keywords}

        hooks: Hooks = [(self.embed, embedded, False)]
        for layer, block in enumerate(self.blocks):
            get = block.get_submodule
            hooks.append((get(self.places.attention_norm), keep(run.streams, ("attention", layer)), True))
            for name in self.places.projections:
                hooks.append((get(name), keep(run.reads, (name, layer)), False))
            hooks.append((get(self.places.out), keep(run.z, layer), True))
            hooks.append((get(self.places.mlp_norm), keep(run.streams, ("mlp", layer)), True))
            hooks.append((get(self.places.mlp_norm), keep(run.reads, ("mlp", layer)), False))
            hooks.append((get(self.places.mlp), keep(run.mlp, layer), False))
        for into in (run.streams, run.reads):
            hooks.append((self.norm, keep(into, ("logits", self.layers)), True))
        extra = self.blocks[0].register_forward_pre_hook(block_given, with_kwargs=True)
        with hooked(hooks), torch.set_grad_enabled(grad):
            run.logits = self.model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1]
        extra.remove()
        return run

    def out_weight(self, layer: int) -> Tensor:
        return _weight(self.blocks[layer].get_submodule(self.places.out))

    def projections(self, block: nn.Module) -> Tensor:
        """Weights of all query, key and value heads: `[receivers, d_head, d_model]`."""
        parts = [_weight(block.get_submodule(name)) for name in self.places.projections]
        return torch.cat(parts).unflatten(0, (self.readers, -1))


def _weight(module: Any) -> Tensor:
    """`[out, in]`; GPT-2's Conv1D has it the other way round."""
    return module.weight if isinstance(module, nn.Linear) else module.weight.T


@contextlib.contextmanager
def hooked(hooks: Hooks) -> Iterator[None]:
    handles = [
        module.register_forward_pre_hook(hook) if before else module.register_forward_hook(hook)
        for module, hook, before in hooks
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
