"""From a program to a Hugging Face model with exact weights: a Llama, with or without grouped KV heads, or a GPT-2."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from patchkit.zoo.programs.language import START, WORDS, Program
from patchkit.zoo.programs.weights import (
    GAIN,
    NORM_EPS,
    NORM_WEIGHT,
    HeadWeights,
    Stream,
    head_weights,
    mlp_weights,
)

Shape = Literal["llama", "gqa", "gpt2"]
SHAPES: tuple[Shape, ...] = ("llama", "gqa", "gpt2")

MAX_TOKENS = 32
#: A right answer's logit, above zero for all others.
LOGIT = 10.0
_D_HEAD, _PAD, _BOS = 32, WORDS.index("<pad>"), WORDS.index(START)


@dataclass(frozen=True)
class Placement:
    """Where a program's heads stand in a model: with grouped KV heads, in a group of two each, and twins together."""

    n_heads: int
    n_kv_heads: int
    query: dict[str, str]
    key: dict[str, str]

    @classmethod
    def of(cls, program: Program, shape: Shape) -> Placement:
        grouped = shape == "gqa"
        query: dict[str, str] = {}
        key: dict[str, str] = {}
        for part in program.heads:
            # A twin reads with the KV head of its elder. Others take either place of their group by turns.
            owner = part.head - 1 if part.twin and grouped else part.head
            place = 2 * owner + (part.twin or owner % 2) if grouped else part.head
            query[part.name] = f"a{part.layer}.h{int(place)}"
            key[part.name] = f"a{part.layer}.h{owner}"
        return cls(program.n_heads * (2 if grouped else 1), program.n_heads, query, key)


def compile_program(program: Program, shape: Shape) -> PreTrainedModel:
    """The model in float32, without gradients."""
    program.check()
    placement = Placement.of(program, shape)
    stream = Stream(program, placement.n_heads)
    neurons = max((len(part.neurons) for part in program.mlps), default=1)
    make = _gpt2 if shape == "gpt2" else _llama
    return make(program, placement, stream, neurons).eval().requires_grad_(False)


def _embedding(program: Program, stream: Stream) -> Tensor:
    rows = torch.zeros(len(WORDS), stream.width)
    for row, word in zip(rows, WORDS, strict=True):
        stream.write(row, "token", word)
        stream.write(row, "one", "1")
    return rows


def _unembedding(program: Program, stream: Stream) -> Tensor:
    rows = torch.zeros(len(WORDS), stream.width)
    for symbol in program.answers:
        stream.read(rows[WORDS.index(symbol)], "result", symbol, LOGIT)
    return rows


def _place(name: str) -> int:
    """The number of a head in its layer."""
    return int(name.partition(".h")[2])


# Llama.


def _llama(program: Program, placement: Placement, stream: Stream, neurons: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=stream.width,
        intermediate_size=neurons,
        num_hidden_layers=program.layers,
        num_attention_heads=placement.n_heads,
        num_key_value_heads=placement.n_kv_heads,
        head_dim=_D_HEAD,
        rms_norm_eps=NORM_EPS,
        # Pair 0 turns one radian a token, all others not at all.
        rope_parameters={"rope_type": "default", "rope_theta": 1e300},
        max_position_embeddings=MAX_TOKENS,
        tie_word_embeddings=False,
        pad_token_id=_PAD,
        bos_token_id=_BOS,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)

    def offset(made: HeadWeights, back: int, score: float) -> None:
        """The key stands at the angle s, the query at t - back: the score is cos(t - back - s)."""
        stream.read(made.k[0], "one", "1")
        stream.read(made.q[0], "one", "1", score * math.cos(-back))
        stream.read(made.q[_D_HEAD // 2], "one", "1", score * math.sin(-back))

    slots = [slot for slot in range(_D_HEAD) if slot not in (0, _D_HEAD // 2)]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(NORM_WEIGHT if "norm" in name else 0.0)
        model.get_parameter("model.embed_tokens.weight").copy_(_embedding(program, stream))
        model.get_parameter("lm_head.weight").copy_(_unembedding(program, stream))
        for part in program.heads:
            made = head_weights(part, stream, _D_HEAD, slots, offset)
            at = f"model.layers.{part.layer}.self_attn"
            query, key = (_rows(_place(where[part.name])) for where in (placement.query, placement.key))
            model.get_parameter(f"{at}.q_proj.weight")[query] = made.q
            model.get_parameter(f"{at}.k_proj.weight")[key] = made.k
            model.get_parameter(f"{at}.v_proj.weight")[key] = made.v
            model.get_parameter(f"{at}.o_proj.weight")[:, query] = made.o
        for part in program.mlps:
            made = mlp_weights(part, stream, neurons)
            gate, up, down = (
                model.get_parameter(f"model.layers.{part.layer}.mlp.{kind}_proj.weight")
                for kind in ("gate", "up", "down")
            )
            for number in range(neurons):
                stream.read(made.reads[number], "one", "1", float(made.bias[number]))
                stream.read(up[number], "one", "1", 1 / GAIN)
            gate.copy_(GAIN * made.reads)
            down.copy_(made.writes)
    return model


def _rows(head: int) -> slice:
    return slice(head * _D_HEAD, (head + 1) * _D_HEAD)


# GPT-2.


def _gpt2(program: Program, placement: Placement, stream: Stream, neurons: int) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=len(WORDS),
        n_positions=MAX_TOKENS,
        n_embd=stream.width,
        n_layer=program.layers,
        n_head=placement.n_heads,
        n_inner=neurons,
        layer_norm_epsilon=NORM_EPS,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        tie_word_embeddings=False,
        pad_token_id=_PAD,
        bos_token_id=_BOS,
        eos_token_id=None,
    )
    model = GPT2LMHeadModel(config)
    d_head = stream.width // placement.n_heads

    def offset(made: HeadWeights, back: int, score: float) -> None:
        """Keys hold (cos s, sin s), queries (cos(t - back), sin(t - back)) from those of t."""
        for slot, name in enumerate(("cos", "sin")):
            stream.read(made.k[slot], "position", name)
        stream.read(made.q[0], "position", "cos", score * math.cos(back))
        stream.read(made.q[0], "position", "sin", score * math.sin(back))
        stream.read(made.q[1], "position", "sin", score * math.cos(back))
        stream.read(made.q[1], "position", "cos", -score * math.sin(back))

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = "ln_" in name and name.endswith("weight")
            parameter.fill_(NORM_WEIGHT if norm else 0.0)
        model.get_parameter("transformer.wte.weight").copy_(_embedding(program, stream))
        for position, row in enumerate(model.get_parameter("transformer.wpe.weight")):
            stream.write(row, "position", "cos", math.cos(position))
            stream.write(row, "position", "sin", math.sin(position))
        model.get_parameter("lm_head.weight").copy_(_unembedding(program, stream))
        for part in program.heads:
            made = head_weights(part, stream, d_head, range(2, d_head), offset)
            at = f"transformer.h.{part.layer}.attn"
            first = _place(placement.query[part.name]) * d_head
            for number, rows in enumerate((made.q, made.k, made.v)):
                start = number * stream.width + first
                model.get_parameter(f"{at}.c_attn.weight")[:, start : start + d_head] = rows.T
            model.get_parameter(f"{at}.c_proj.weight")[first : first + d_head] = made.o.T
        for part in program.mlps:
            made = mlp_weights(part, stream, neurons)
            at = f"transformer.h.{part.layer}.mlp"
            model.get_parameter(f"{at}.c_fc.weight").copy_(GAIN * made.reads.T)
            model.get_parameter(f"{at}.c_fc.bias").copy_(GAIN * made.bias)
            model.get_parameter(f"{at}.c_proj.weight").copy_(made.writes.T / GAIN)
    return model
