"""The handmade Llama: answers worked out by hand, and the circuit that its weights are said to hold."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from patchkit.errors import InputError
from patchkit.zoo import handmade


def last_logits(sharpness: float, texts: list[str]) -> torch.Tensor:
    model, tokenizer = handmade.build(sharpness)
    with torch.no_grad():
        return model(torch.tensor(tokenizer(texts)["input_ids"])).logits[:, -1]


@pytest.mark.parametrize("sharpness", [handmade.GRADED, 40.0, handmade.SATURATED])
@pytest.mark.parametrize("n_bindings", [1, 4, 8])
def test_every_prompt_is_answered(sharpness: float, n_bindings: int) -> None:
    prompts = handmade.sample_prompts(200, seed=n_bindings, n_bindings=n_bindings)
    guesses = last_logits(sharpness, [prompt.text for prompt in prompts]).argmax(-1)
    assert [handmade.WORDS[i] for i in guesses] == [prompt.answer for prompt in prompts]


def test_answers_known_by_hand() -> None:
    texts = ["a = 3 , b = 7 , c = 0 , a", "a = 3 , b = 7 , c = 0 , b", "a = 3 , b = 7 , c = 0 , c"]
    guesses = last_logits(handmade.SATURATED, texts).argmax(-1)
    assert [handmade.WORDS[i] for i in guesses] == ["4", "0", "1"]


def test_saturated_lookup_gives_logits_known_by_hand() -> None:
    """The value is copied whole, so its successor's logit is 10 and every other one is 0."""
    logits = last_logits(handmade.SATURATED, ["h = 6 , e = 2 , h"])[0]
    expected = torch.zeros(len(handmade.WORDS))
    expected[handmade.TOKEN_IDS["7"]] = 10.0
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_graded_lookup_gives_logits_known_by_hand() -> None:
    """The score of the right digit is sharpness / sqrt(head size) above the other tokens' zero."""
    text = "h = 6 , e = 2 , h"
    weight = torch.tensor(handmade.GRADED / handmade.HEAD_SIZE**0.5).exp()
    others = len(text.split())  # with <s>, every token but the right digit: the word count itself
    logits = last_logits(handmade.GRADED, [text])[0]
    assert logits[handmade.TOKEN_IDS["7"]].item() == pytest.approx(
        10 * (weight / (weight + others)).item(), rel=1e-4
    )
    assert logits[handmade.TOKEN_IDS["3"]].item() == pytest.approx(10 / (weight + others).item(), rel=1e-4)


def test_the_norm_is_the_identity_in_float32() -> None:
    norm = handmade.build()[0].model.norm
    assert isinstance(norm, LlamaRMSNorm)
    x = torch.randn(64, handmade.WIDTH, generator=torch.Generator().manual_seed(0)) * 5
    assert torch.equal(norm(x), x)


def zeroed_head_change(layer: int, head: int) -> float:
    """The largest change of any last-token logit when one head's output is set to zero everywhere."""
    model, tokenizer = handmade.build(handmade.GRADED)
    ids = torch.tensor(tokenizer([p.text for p in handmade.sample_prompts(50, seed=3)])["input_ids"])
    size = handmade.HEAD_SIZE
    with torch.no_grad():
        base = model(ids).logits[:, -1]
        projection = model.get_parameter(f"model.layers.{layer}.self_attn.o_proj.weight")
        projection[:, head * size : (head + 1) * size] = 0
        return (model(ids).logits[:, -1] - base).abs().max().item()


def test_only_the_true_heads_matter() -> None:
    for layer in range(handmade.LAYERS):
        for head in range(handmade.HEADS):
            change = zeroed_head_change(layer, head)
            if f"a{layer}.h{head}" in handmade.TRUE_NODES:
                assert change > 0.5
            else:
                assert change == 0.0


def test_distractors_do_write_something() -> None:
    """They are distractors, not dead heads: each writes to the residual stream."""
    model, tokenizer = handmade.build()
    ids = torch.tensor(tokenizer([handmade.sample_prompts(1, seed=0)[0].text])["input_ids"])
    for node in handmade.DISTRACTOR_NODES:
        layer, head = int(node[1]), int(node[4])
        written: list[torch.Tensor] = []
        projection = model.get_submodule(f"model.layers.{layer}.self_attn.o_proj")

        def read(
            _module: torch.nn.Module, args: tuple[torch.Tensor], out: list[torch.Tensor] = written
        ) -> None:
            out.append(args[0])

        handle = projection.register_forward_pre_hook(read)
        model(ids)
        handle.remove()
        z = written[0].unflatten(-1, (handmade.HEADS, handmade.HEAD_SIZE))[0, -1, head]
        rows = slice(head * handmade.HEAD_SIZE, (head + 1) * handmade.HEAD_SIZE)
        assert (projection.get_parameter("weight")[:, rows] @ z).abs().max() > 0.1


def test_bad_arguments_are_said() -> None:
    with pytest.raises(InputError, match="sharpness is 0"):
        handmade.build(0.0)
    with pytest.raises(InputError, match="n_bindings is 9"):
        handmade.sample_prompts(1, seed=0, n_bindings=9)
