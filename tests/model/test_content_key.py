"""A model's content key: of its values, not of its name, place or device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import dispatch_model
from transformers import LlamaConfig, LlamaForCausalLM

from patchkit import load
from patchkit.model import PatchModel
from tests.families import build

FAMILIES = ("llama-gqa", "gpt2", "neox-parallel", "phi3-fused-gqa")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("plain")
    build("llama-gqa").save_pretrained(directory)
    return directory


def test_models_differ() -> None:
    keys = {load(build(family)).content_key() for family in FAMILIES}
    assert len(keys) == len(FAMILIES) and all(len(key) == 32 and int(key, 16) >= 0 for key in keys)


@pytest.mark.parametrize("family", FAMILIES)
def test_another_training_stage_of_one_architecture_is_another_model(family: str) -> None:
    model = load(build(family))
    trained = build(family)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter += 1e-3 * torch.randn_like(parameter)
    later = load(trained)
    assert later.fingerprint() == model.fingerprint() and later.content_key() != model.content_key()


@pytest.mark.slow
def test_every_weight_has_a_part_in_it(plain: Path) -> None:
    own = load(plain).content_key()
    for name, _ in build("llama-gqa").named_parameters():
        module = build("llama-gqa")
        with torch.no_grad():
            # All of it: of a large weight only a sample is read.
            module.get_parameter(name).add_(0.25)
        assert load(module).content_key() != own, name


def test_one_head_of_a_large_weight_has_a_part_in_it() -> None:
    """Its columns are a small part of every row."""
    config = LlamaConfig(
        hidden_size=512, intermediate_size=64, num_hidden_layers=1, vocab_size=8, pad_token_id=0
    )
    model = load(LlamaForCausalLM(config).eval())
    keys = {model.content_key()}
    for head in range(32):
        with torch.no_grad():
            model.w_o(0)[head].zero_()
        keys.add(model.content_key())
    assert len(keys) == 33


def test_the_same_wherever_it_lies(plain: Path, tmp_path: Path) -> None:
    own = load(build("llama-gqa")).content_key()
    spread = {name: "cpu" for name in ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")}
    spread |= {f"model.layers.{layer}": "disk" if layer == 1 else "cpu" for layer in range(3)}
    offloaded = build("llama-gqa")
    dispatch_model(offloaded, spread, main_device="cpu", offload_dir=tmp_path)  # pyright: ignore
    for model in (
        load(plain),
        load(plain, device_map="cpu"),
        load(plain, attn_implementation="eager"),
        load(offloaded),
    ):
        assert model.content_key() == own, model.name
    assert load(plain, dtype="bfloat16").content_key() != own


def test_weights_that_are_not_there_are_no_weights_at_all(plain: Path) -> None:
    assert load(plain, lazy=True).content_key() != load(plain).content_key()


def test_a_module_that_is_trained_on_gets_another_key() -> None:
    module = build("llama-gqa")
    model = load(module.eval())
    before = model.content_key()
    assert model.content_key() == before
    with torch.no_grad():
        module.get_parameter("lm_head.weight").mul_(1.01)
    assert model.content_key() != before


def test_an_own_models_key_is_worked_out_once(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(plain)
    own = model.content_key()
    monkeypatch.setattr(PatchModel, "fingerprint", lambda _: pytest.fail("worked out again"))
    assert model.content_key() == own
