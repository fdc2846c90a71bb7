"""Where each Hugging Face family keeps the things that patchkit reads and writes: a table, one entry a family.

A site is a place in an ordinary, unmodified HF forward. Families differ in the names of modules, in how the query, key
and value projections are packed, in whether a norm stands between a module's output and the residual stream, and in
whether the MLP runs beside the attention (parallel) or after it. Everything else is common: since transformers 5 every
attention module calls one `attention_interface(module, q, k, v, mask, ...)`, whose arguments are the queries, keys
and values as used by attention.

To add a family, register an entry; loading then validates it against the model's own numbers:

    from patchkit.model import Architecture, register_architecture
    register_architecture(Architecture(
        family="mymodel",                   # config.model_type
        layers="model.layers",              # the ModuleList of blocks
        embed="model.embed_tokens",
        final_norm="model.norm",
        attn="self_attn",                   # the rest are paths inside one block
        qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        out_proj="self_attn.o_proj",
        mid_input="post_attention_layernorm",
        mlp="mlp", neurons="mlp.down_proj",
    ))
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from patchkit.errors import InputError

Packing = Literal["separate", "stacked", "per_head"]


@dataclass(frozen=True)
class Architecture:
    """The paths of one family: of `layers`, `embed`, `final_norm`, `unembed` from the model, of the others from a block.

    Attributes:
        family: `config.model_type`.
        layers: the ModuleList of blocks.
        embed: the token embedding.
        final_norm: the norm before the unembedding.
        unembed: the unembedding.
        attn: the attention module.
        qkv: the projections: three paths (`packing="separate"`) or one fused path.
        packing: how a fused projection's output is laid out. `stacked`: all queries, then all keys, then all values;
            `per_head`: for each head its query, key and value.
        out_proj: W_O; its input is the concatenated per-head z.
        attn_norm: the norm that the attention reads the residual stream through; None where it reads it as it is.
        attn_out: the module whose output the attention adds to the residual stream (a post-norm where there is one).
        mid_input: the module whose input is the residual stream between attention and MLP. It must receive the very
            tensor that the block adds the MLP to, because `resid_mid` is written in place.
        mlp: the MLP module.
        neurons: the module whose input is the MLP's post-nonlinearity activation; None where there is no such module,
            as in a mixture of experts, and so no nodes of kind `neuron`.
        mlp_out: the module whose output the MLP adds to the residual stream.
        parallel_flag: name of the config attribute that says attention and MLP run in parallel, or a constant.
        norm_offset: what a norm adds to its weight before it scales with it (Gemma: 1).
        joint_qk_norm: whether queries and keys are normed over all heads at once, so that no head's are its own.
        position_embed: an embedding of positions that is added to the tokens', or None.
    """

    family: str
    layers: str
    embed: str
    final_norm: str
    attn: str
    qkv: tuple[str, ...]
    out_proj: str
    mid_input: str
    mlp: str
    neurons: str | None
    unembed: str = "lm_head"
    packing: Packing = "separate"
    attn_norm: str | None = "input_layernorm"
    attn_out: str | None = None
    mlp_out: str | None = None
    parallel_flag: str | bool = False
    norm_offset: float = 0.0
    joint_qk_norm: bool = False
    position_embed: str | None = None

    def __post_init__(self) -> None:
        expected = 3 if self.packing == "separate" else 1
        if len(self.qkv) != expected:
            raise InputError(
                f"architecture '{self.family}': packing '{self.packing}' needs {expected} path(s) in qkv, "
                f"found {len(self.qkv)}: {self.qkv}"
            )

    @property
    def attn_out_path(self) -> str:
        return self.attn_out or self.out_proj

    @property
    def mlp_out_path(self) -> str:
        return self.mlp_out or self.mlp

    @property
    def mlp_norm(self) -> str | None:
        """The norm that the MLP reads the residual stream through, or None."""
        return None if self.mid_input == self.mlp else self.mid_input

    def is_parallel(self, config: Any) -> bool:
        """Whether attention and MLP of a block read the same residual stream."""
        if isinstance(self.parallel_flag, bool):
            return self.parallel_flag
        return bool(getattr(config, self.parallel_flag))

    def model_paths(self) -> dict[str, str]:
        """What must exist on the model, by field."""
        return {
            "layers": self.layers,
            "embed": self.embed,
            "final_norm": self.final_norm,
            "unembed": self.unembed,
            **({} if self.position_embed is None else {"position_embed": self.position_embed}),
        }

    def block_paths(self) -> dict[str, str]:
        """What must exist on every block, by field."""
        paths = {f"qkv[{i}]": path for i, path in enumerate(self.qkv)}
        return paths | {
            "attn": self.attn,
            **({} if self.attn_norm is None else {"attn_norm": self.attn_norm}),
            "out_proj": self.out_proj,
            "attn_out": self.attn_out_path,
            "mid_input": self.mid_input,
            "mlp": self.mlp,
            **({} if self.neurons is None else {"neurons": self.neurons}),
            "mlp_out": self.mlp_out_path,
        }


_LLAMA = Architecture(
    family="llama",
    layers="model.layers",
    embed="model.embed_tokens",
    final_norm="model.norm",
    attn="self_attn",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    out_proj="self_attn.o_proj",
    mid_input="post_attention_layernorm",
    mlp="mlp",
    neurons="mlp.down_proj",
)

_GEMMA2 = replace(
    _LLAMA,
    family="gemma2",
    attn_out="post_attention_layernorm",
    mid_input="pre_feedforward_layernorm",
    mlp_out="post_feedforward_layernorm",
    norm_offset=1.0,
)

_TABLE: dict[str, Architecture] = {
    entry.family: entry
    for entry in (
        _LLAMA,
        replace(_LLAMA, family="mistral"),
        # Each token is sent to a few experts, whose weights are one tensor: no module's input holds the neurons.
        replace(_LLAMA, family="mixtral", neurons=None),
        replace(_LLAMA, family="qwen2"),
        replace(_LLAMA, family="qwen3"),
        replace(_LLAMA, family="phi3", qkv=("self_attn.qkv_proj",), packing="stacked"),
        _GEMMA2,
        replace(_GEMMA2, family="gemma3_text"),
        # Norms only after the modules: the MLP reads the residual stream itself.
        replace(
            _LLAMA,
            family="olmo2",
            attn_norm=None,
            joint_qk_norm=True,
            attn_out="post_attention_layernorm",
            mid_input="mlp",
            mlp_out="post_feedforward_layernorm",
        ),
        Architecture(
            family="gpt2",
            layers="transformer.h",
            embed="transformer.wte",
            final_norm="transformer.ln_f",
            position_embed="transformer.wpe",
            attn_norm="ln_1",
            attn="attn",
            qkv=("attn.c_attn",),
            packing="stacked",
            out_proj="attn.c_proj",
            mid_input="ln_2",
            mlp="mlp",
            neurons="mlp.c_proj",
        ),
        Architecture(
            family="gpt_neox",
            layers="gpt_neox.layers",
            embed="gpt_neox.embed_in",
            final_norm="gpt_neox.final_layer_norm",
            attn="attention",
            qkv=("attention.query_key_value",),
            packing="per_head",
            out_proj="attention.dense",
            mid_input="post_attention_layernorm",
            mlp="mlp",
            neurons="mlp.dense_4h_to_h",
            parallel_flag="use_parallel_residual",
        ),
    )
}


def register_architecture(entry: Architecture, *, replace_existing: bool = False) -> None:
    """Adds a family to the table.

    Raises:
        InputError: the family is there already and `replace_existing` is False.
    """
    if entry.family in _TABLE and not replace_existing:
        raise InputError(
            f"architecture '{entry.family}' is registered already; pass replace_existing=True to replace it"
        )
    _TABLE[entry.family] = entry


def unregister_architecture(family: str) -> None:
    """Takes a family out of the table; InputError if it is not there."""
    if _TABLE.pop(family, None) is None:
        raise InputError(f"architecture '{family}' is not registered; known: {', '.join(families())}")


def families() -> list[str]:
    """The registered families, by `config.model_type`."""
    return sorted(_TABLE)


def architecture_for(config: Any) -> Architecture:
    """The table's entry for an HF config.

    Raises:
        InputError: naming `config.model_type`, the families that are known, and how to add one.
    """
    family = getattr(config, "model_type", None)
    entry = _TABLE.get(family) if family else None
    if entry is None:
        raise InputError(
            f"model family '{family}' (config.model_type of {type(config).__name__}) is not in the architecture table. "
            f"Looked for one of: {', '.join(families())}. "
            "Add it in ten lines with patchkit.register_architecture(patchkit.Architecture(family=..., ...)); "
            "see the docstring of patchkit.model.architectures"
        )
    return entry
