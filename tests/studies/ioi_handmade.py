"""A model that finds the indirect object by heads that are known, since they are written by hand.

Prompts are `Ann and Bob met , Bob gave to`: indirect objects begin with A, subjects with B, strangers with C. The norm is
the identity and rotary angles are nearly static, as in `patchkit.zoo.handmade`.

- `a0.h0` looks one token back; `a0.h1` at the same token's occurrences (the earlier and its own).
- `a1.h0` looks from a token at the one that followed its first occurrence (induction over `a0.h0`).
- `a1.h1` looks from `to` at the subjects and leaves a mark; the queries of layer 2 grow with it.
- `a2.h0` looks from `to` at the indirect object and copies it; `a2.h1` looks there too and writes against it.
- The other heads are zero, and the MLPs as good as that.
"""

from __future__ import annotations

import math
import random

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from patchkit.data import Pair
from patchkit.data.words import word_tokenizer

OBJECTS = tuple(f"A{letter}" for letter in "abcdef")
SUBJECTS = tuple(f"B{letter}" for letter in "abcdef")
STRANGERS = tuple(f"C{letter}" for letter in "abcdef")
FILLERS = ("and", "met", ",", "gave", "to", "late", "soon")
WORDS = ("<pad>", "<s>", "<unk>", *OBJECTS, *SUBJECTS, *STRANGERS, *FILLERS)
IDS = {word: number for number, word in enumerate(WORDS)}
SPOKEN = WORDS[3:]

TOKEN, BEFORE, ONE, MARK, OUT = 0, 32, 64, 65, 96
HEADS, SIZE, WIDTH = 4, 64, 256
STATIC = (*range(17, 32), *range(49, 64))
SHARP = 40.0

TRUE = {
    "name mover": ["a2.h0"],
    "negative name mover": ["a2.h1"],
    "S-inhibition": ["a1.h1"],
    "duplicate token": ["a0.h1"],
    "induction": ["a1.h0"],
    "previous token": ["a0.h0"],
    "backup": [],
}


class _Head:
    def __init__(self, model: LlamaForCausalLM, layer: int, head: int):
        rows = slice(head * SIZE, (head + 1) * SIZE)
        attention = model.model.layers[layer].self_attn
        self.q, self.k, self.v = (getattr(attention, f"{kind}_proj").weight[rows] for kind in "qkv")
        self.o = attention.o_proj.weight[:, rows]

    def match(self, query: int, key: int, words: tuple[str, ...] = SPOKEN, scale: float = SHARP) -> None:
        """Attends where the key's word is the query's."""
        for slot, word in zip(STATIC, words, strict=False):
            self.q[slot, query + IDS[word]] = scale
            self.k[slot, key + IDS[word]] = 1.0

    def seek(self, reads: int, words: tuple[str, ...], scale: float = SHARP) -> None:
        """Attends to some words, the more so the more the stream here holds in dimension `reads`."""
        self.q[STATIC[0], reads] = scale
        for word in words:
            self.k[STATIC[0], TOKEN + IDS[word]] = 1.0

    def copy(self, reads: int, writes: int, sign: float = 1.0) -> None:
        for slot, word in enumerate(SPOKEN):
            self.v[slot, reads + IDS[word]] = 1.0
            self.o[writes + IDS[word], slot] = sign


def build() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The model and its tokenizer."""
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=WIDTH,
        intermediate_size=4,
        num_hidden_layers=3,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        rms_norm_eps=float(2**40),
        rope_parameters={"rope_type": "default", "rope_theta": 1e30},
        max_position_embeddings=64,
        tie_word_embeddings=False,
        pad_token_id=IDS["<pad>"],
        bos_token_id=IDS["<s>"],
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(2.0**20 if "norm" in name else 0.0)
        for number in range(len(WORDS)):
            model.model.embed_tokens.weight[number, TOKEN + number] = 1.0
            model.model.embed_tokens.weight[number, ONE] = 1.0
            model.lm_head.weight[number, OUT + number] = 10.0
        for layer in model.model.layers:
            # Loading a model checks that its MLPs do something; these read and write where nobody else does.
            layer.mlp.gate_proj.weight[0, 250] = layer.mlp.up_proj.weight[0, 251] = 1.0
            layer.mlp.down_proj.weight[252, 0] = 1.0
        back = _Head(model, 0, 0)
        back.k[0, ONE] = 1.0
        back.q[0, ONE], back.q[32, ONE] = 3000 * math.cos(1), -3000 * math.sin(1)
        back.copy(TOKEN, BEFORE)
        twice = _Head(model, 0, 1)
        twice.match(TOKEN, TOKEN)
        after = _Head(model, 1, 0)
        after.match(TOKEN, BEFORE)
        inhibit = _Head(model, 1, 1)
        inhibit.seek(TOKEN + IDS["to"], SUBJECTS)
        for word in SUBJECTS:
            inhibit.v[0, TOKEN + IDS[word]] = 1.0
        inhibit.o[MARK, 0] = 1.0
        for head, sign in ((0, 1.0), (1, -0.25)):
            mover = _Head(model, 2, head)
            mover.seek(MARK, OBJECTS)
            mover.copy(TOKEN, OUT, sign)
    return model, word_tokenizer(WORDS, pad="<pad>", bos="<s>", unk="<unk>")


def prompts(n: int, seed: int) -> list[Pair]:
    """`Aa and Bb met , Bb gave to`, or `Bb and Aa met ...`; in the corrupt prompt a stranger is the subject."""
    rng = random.Random(seed)
    made = []
    for number in range(n):
        io, subject, stranger = rng.choice(OBJECTS), rng.choice(SUBJECTS), rng.choice(STRANGERS)
        first, second = (io, subject) if number % 2 == 0 else (subject, io)
        words = ["<s>", first, "and", second, "met", ",", subject, rng.choice(["gave", "late", "soon"]), "to"]
        corrupt = [stranger if word == subject else word for word in words]
        at = {"io": words.index(io), "s1": words.index(subject), "s2": 6, "last": 8}
        spans = {name: (place, place + 1) for name, place in at.items()}
        spans |= {"s1+1": (at["s1"] + 1, at["s1"] + 2), "clause": (1, 6)}
        made.append(
            Pair(
                tuple(IDS[word] for word in words),
                tuple(IDS[word] for word in corrupt),
                IDS[io],
                IDS[subject],
                spans=spans,
                id=str(number),
                meta={
                    "clean": " ".join(words),
                    "corrupt": " ".join(corrupt),
                    "answer": io,
                    "wrong": subject,
                    "order": ("ABBA", "BABA")[number % 2],
                    "template": 0,
                },
            )
        )
    return made
