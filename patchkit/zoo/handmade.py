"""A Llama whose weights are written by hand: no training, and a circuit that is known exactly.

The prompt binds letters to digits and ends with one of the letters; the answer is its digit plus one,
modulo 8:

    a = 3 , b = 7 , c = 0 , b        -> 0

How it computes that, in three layers of four heads (head size 32, width 128):

- `a0.h1` looks two tokens back, so that at every digit it writes which letter the digit belongs to;
- `a1.h2` compares the last token's letter with those, and copies the digit it finds to the last position;
- `m2` adds one modulo 8; the unembedding reads only what it writes.
- `a0.h0`, `a1.h0` and `a2.h3` write and read a part of the residual stream that never reaches the logits.

Two facts make exact weights possible. RMSNorm with `rms_norm_eps = 2**40` and weight `2**20` is the float32
identity: x * rsqrt(mean(x^2) + 2^40) * 2^20 = x while mean(x^2) is far below 2^40 * 2^-24. And `rope_theta
= 1e30` leaves all rotary pairs but the first ones static, while pair 0 turns one radian a position: a query
turned back by `offset` radians makes a head that looks `offset` tokens back. Exact in float32, for prompts
of up to about 40 tokens.

`sharpness` scales the lookup's attention scores. At 3000 the softmax is saturated and its gradient
vanishes, so that attribution patching sees nothing where the exact effect is large; at 8 it does not
saturate.
"""

import math
import random
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from patchkit.data.words import word_tokenizer
from patchkit.errors import InputError
from patchkit.zoo.cards import ModelCard

KEYS: tuple[str, ...] = tuple("abcdefgh")
VALUES: tuple[str, ...] = tuple("01234567")
WORDS: tuple[str, ...] = ("<pad>", "<s>", "<unk>", *KEYS, *VALUES, "=", ",")
TOKEN_IDS: dict[str, int] = {word: index for index, word in enumerate(WORDS)}

SATURATED, GRADED = 3000.0, 8.0
TRUE_NODES: tuple[str, ...] = ("input", "a0.h1", "a1.h2", "m2", "logits")
# The edges that carry what differs between prompts. Queries, keys and the gate of m2 also read a constant from
# the input; it is the same for every token, so putting in another prompt's changes nothing.
TRUE_EDGES: tuple[str, ...] = (
    "input->a0.h1<v>",
    "a0.h1->a1.h2<k>",
    "input->a1.h2<q>",
    "input->a1.h2<v>",
    "a1.h2->m2",
    "m2->logits",
)
DISTRACTOR_NODES: tuple[str, ...] = ("a0.h0", "a1.h0", "a2.h3")
DISTRACTOR_EDGES: tuple[str, ...] = (
    "input->a0.h0<v>",
    "input->a1.h0<v>",
    "a0.h0->a2.h3<v>",
    "a1.h0->a2.h3<v>",
)

# Where things live in the residual stream.
TOKEN, OWNER, FOUND, ONE, JUNK, RESULT = 0, 32, 64, 96, 97, 116
LAYERS, HEADS, HEAD_SIZE, WIDTH = 3, 4, 32, 128
OFFSET_SHARPNESS, VALUE_TO_NAME = 3000.0, 2
# Rotary pairs are (i, i + 16) within a head; from 9 on they turn less than 1e-16 radians a position.
STATIC_DIMS: tuple[int, ...] = (*range(9, 16), *range(25, 32))


@dataclass(frozen=True)
class HandmadePrompt:
    """Bindings in order and the letter asked for."""

    keys: tuple[str, ...]
    values: tuple[int, ...]
    query: str

    @property
    def answer(self) -> str:
        """The digit of the queried letter plus one, modulo 8."""
        return VALUES[(self.values[self.keys.index(self.query)] + 1) % len(VALUES)]

    @property
    def text(self) -> str:
        return " , ".join([*(f"{k} = {v}" for k, v in zip(self.keys, self.values, strict=True)), self.query])


def sample_prompts(n: int, seed: int, n_bindings: int = 4) -> list[HandmadePrompt]:
    """`n` random prompts of the same length: distinct letters, any digits 0..7, one letter asked for."""
    if not 1 <= n_bindings <= len(KEYS):
        raise InputError(f"n_bindings is {n_bindings}; the model has {len(KEYS)} letters")
    rng = random.Random(seed)
    prompts = []
    for _ in range(n):
        keys = tuple(rng.sample(KEYS, n_bindings))
        values = tuple(rng.randrange(len(VALUES)) for _ in keys)
        prompts.append(HandmadePrompt(keys, values, rng.choice(keys)))
    return prompts


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, `<s>` put first, `<pad>` on the left."""
    return word_tokenizer(WORDS, pad="<pad>", bos="<s>", unk="<unk>")


def config() -> LlamaConfig:
    """The shape of the model, with the norm that is the identity and the nearly static rotary embedding."""
    return LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        rms_norm_eps=float(2**40),
        rope_parameters={"rope_type": "default", "rope_theta": 1e30},
        max_position_embeddings=64,
        tie_word_embeddings=False,
        pad_token_id=TOKEN_IDS["<pad>"],
        bos_token_id=TOKEN_IDS["<s>"],
        eos_token_id=None,
    )


class _Head:
    """Single entries of one head's four projections, addressed by (residual dimension, head dimension)."""

    def __init__(self, model: LlamaForCausalLM, layer: int, head: int):
        weights = [
            model.get_parameter(f"model.layers.{layer}.self_attn.{kind}_proj.weight") for kind in "qkvo"
        ]
        rows = slice(head * HEAD_SIZE, (head + 1) * HEAD_SIZE)
        self.q: Float[Tensor, "d_head d_model"] = weights[0][rows]
        self.k: Float[Tensor, "d_head d_model"] = weights[1][rows]
        self.v: Float[Tensor, "d_head d_model"] = weights[2][rows]
        self.o: Float[Tensor, "d_model d_head"] = weights[3][:, rows]

    def copy(self, reads: int, writes: int, slot: int) -> None:
        """Move residual dimension `reads` of the attended token to `writes` through head dimension `slot`."""
        self.v[slot, reads] = 1.0
        self.o[writes, slot] = 1.0


def build(sharpness: float = GRADED) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The model, in float32 and without gradients, and its tokenizer. `sharpness` scales the
    lookup's scores.
    """
    if not sharpness > 0:
        raise InputError(f"sharpness is {sharpness}; the lookup needs a positive scale, such as 8 or 3000")
    model = LlamaForCausalLM(config()).eval().requires_grad_(False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(2.0**20 if "norm" in name else 0.0)
        embedding = model.get_parameter("model.embed_tokens.weight")
        for index in range(len(WORDS)):
            embedding[index, TOKEN + index] = 1.0
            embedding[index, ONE] = 1.0
        _write_owner_head(_Head(model, 0, 1))
        _write_lookup_head(_Head(model, 1, 2), sharpness)
        _write_distractors(model)
        _write_successor(model)
    return model, build_tokenizer()


def _write_owner_head(head: _Head) -> None:
    """Looks two back: key at angle s, query at angle t - 2, so the score is cos(t - 2 - s), largest at s =
    t - 2.
    """
    head.k[0, ONE] = 1.0
    head.q[0, ONE] = OFFSET_SHARPNESS * math.cos(-VALUE_TO_NAME)
    head.q[16, ONE] = OFFSET_SHARPNESS * math.sin(-VALUE_TO_NAME)
    for slot, key in enumerate(KEYS):
        head.copy(TOKEN + TOKEN_IDS[key], OWNER + TOKEN_IDS[key], slot)


def _write_lookup_head(head: _Head, sharpness: float) -> None:
    """Query: the letter here. Key: the letter that owns the digit there. Value: the digit there."""
    for slot, key in zip(STATIC_DIMS, KEYS, strict=False):
        head.q[slot, TOKEN + TOKEN_IDS[key]] = sharpness
        head.k[slot, OWNER + TOKEN_IDS[key]] = 1.0
    for slot, value in enumerate(VALUES):
        head.copy(TOKEN + TOKEN_IDS[value], FOUND + TOKEN_IDS[value], slot)


def _write_distractors(model: LlamaForCausalLM) -> None:
    """Uniform attention that writes how often each letter occurs, and a head that moves this to where
    nothing reads.
    """
    for layer in (0, 1):
        head = _Head(model, layer, 0)
        for slot, key in enumerate(KEYS):
            head.copy(TOKEN + TOKEN_IDS[key], JUNK + slot, slot)
    dead_end = _Head(model, 2, 3)
    for slot in range(len(KEYS)):
        dead_end.copy(JUNK + slot, JUNK + len(KEYS) + slot, slot)


def _write_successor(model: LlamaForCausalLM) -> None:
    """v -> v + 1 modulo 8, exactly: the gate is silu(32) = 32 in float32 and the up-projection
    holds v / 32.
    """
    gate, up, down = (
        model.get_parameter(f"model.layers.2.mlp.{kind}_proj.weight") for kind in ("gate", "up", "down")
    )
    unembedding = model.get_parameter("lm_head.weight")
    for index, value in enumerate(VALUES):
        gate[index, ONE] = 32.0
        up[index, FOUND + TOKEN_IDS[value]] = 1 / 32
        down[RESULT + (index + 1) % len(VALUES), index] = 1.0
        unembedding[TOKEN_IDS[value], RESULT + index] = 10.0


def card(name: str, sharpness: float) -> ModelCard:
    """What the model is; its accuracy is 1 by construction and held to by the tests."""
    shape = config()
    return ModelCard(
        name=name,
        architecture="LlamaForCausalLM",
        layers=LAYERS,
        heads=HEADS,
        kv_heads=HEADS,
        d_model=WIDTH,
        d_mlp=shape.intermediate_size,
        vocab_size=len(WORDS),
        parameters=sum(parameter.numel() for parameter in LlamaForCausalLM(shape).parameters()),
        bytes=0,
        task="the digit bound to the last letter, plus one modulo 8: `a = 3 , b = 7 , b` -> `0`",
        shows=f"a circuit known exactly: {', '.join(TRUE_EDGES)}; lookup sharpness {sharpness:g}",
        does_not_show="anything about trained models: nothing is learned, superposed or redundant in it",
        prompts_per_cell=200,
        accuracy={"symbol": {"successor": 1.0}},
        measurements={"sharpness": sharpness},
    )
