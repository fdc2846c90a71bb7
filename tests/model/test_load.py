"""`load`: every way in gives the same numbers, and every way to go wrong is one clear line."""

from __future__ import annotations

import json
import shutil
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from nnsight.modeling.transformers import TransformersModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig

from patchkit import zoo
from patchkit.data.batch import Batch
from patchkit.errors import InputError
from patchkit.model import PatchModel, Site, sites_of
from patchkit.tracing import capture
from patchkit.zoo.load import load
from tests.comparisons import PROMPTS, agree, check_gradients, check_patches, check_reads, kinds_of, pair
from tests.families import build
from tests.toy_tokenizers import words

KINDS = ("q", "z", "resid_mid", "neuron")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory without a tokenizer."""
    directory = tmp_path_factory.mktemp("plain")
    build("llama-gqa").save_pretrained(directory)
    return directory


@pytest.fixture
def copy(plain: Path, tmp_path: Path) -> Path:
    """One that a test may damage."""
    return Path(shutil.copytree(plain, tmp_path / "model"))


def logits(model: PatchModel) -> torch.Tensor:
    return capture(model, Batch.from_ids(PROMPTS, pad_id=model.pad_id), []).logits


# Every way in.


def test_a_directory(plain: Path) -> None:
    for source in (plain, str(plain)):
        model = load(source)
        assert model.name == str(plain) and model.tokenizer is None and model.pad_id == 0
        assert not model.hf.training and not any(p.requires_grad for p in model.hf.parameters())
        assert model.dtype == torch.float32 and model.embed_device.type == "cpu" and not model.lazy
        check_reads(model, build("llama-gqa"), KINDS)


def test_a_directory_with_a_tokenizer(copy: Path) -> None:
    words(f"w{i}" for i in range(34)).save_pretrained(copy)
    model = load(copy)
    assert model.tokenizer is not None
    assert model.tokenizer("w0 w3")["input_ids"] == [1, 3, 6]
    assert model.pad_id == model.tokenizer.pad_token_id == 0
    check_reads(model, build("llama-gqa"), KINDS)


def test_a_tokenizer_that_is_given_comes_before_the_directorys_own(copy: Path) -> None:
    words(f"w{i}" for i in range(34)).save_pretrained(copy)
    given = words(f"v{i}" for i in range(34))
    assert load(copy, tokenizer=given).tokenizer is given


def test_weights_in_several_files(tmp_path: Path) -> None:
    build("phi3-fused-gqa").save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    check_reads(load(tmp_path), build("phi3-fused-gqa"), KINDS)


@pytest.mark.parametrize(
    ("dtype", "expected", "gap"),
    [
        ("float64", torch.float64, 1e-5),
        (torch.float64, torch.float64, 1e-5),
        ("float32", torch.float32, 1e-6),
        ("auto", torch.float32, 1e-6),
        ("float16", torch.float16, 2e-2),
        ("bfloat16", torch.bfloat16, 1.5e-1),
    ],
)
def test_dtypes(plain: Path, dtype: Any, expected: torch.dtype, gap: float) -> None:
    model = load(plain, dtype=dtype)
    assert model.dtype == expected
    batch = Batch.from_ids(PROMPTS)
    run = capture(model, batch, [Site("z", 0)])
    assert run.values[Site("z", 0)].dtype == expected
    exact = capture(pair("llama-gqa")[0], batch, [Site("z", 0)])
    agree(run.values[Site("z", 0)].float(), exact.values[Site("z", 0)], "z", gap)


@pytest.mark.parametrize("family", ["llama-gqa", "gemma2-post-norms-softcap", "gpt2"])
def test_a_bfloat16_model_is_read_as_a_bfloat16_model(family: str) -> None:
    """Against the oracle in the same precision, so only the order of sums differs."""
    model, twin = pair(family, torch.bfloat16)
    check_reads(model, twin, kinds_of(family), tolerance=0.1)
    for value in capture(
        model, Batch.from_ids(PROMPTS), [Site("q", 1), Site("resid_mid", 2)]
    ).values.values():
        assert value.dtype == torch.bfloat16


def test_the_checkpoints_own_dtype_is_kept(tmp_path: Path) -> None:
    build("llama-gqa", dtype=torch.bfloat16).save_pretrained(tmp_path)
    assert load(tmp_path).dtype == torch.bfloat16
    assert load(tmp_path, dtype="float32").dtype == torch.float32


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementations(plain: Path, implementation: str) -> None:
    model = load(plain, attn_implementation=implementation)
    assert model.config._attn_implementation == implementation
    check_reads(model, build("llama-gqa"), KINDS)
    check_patches(model, build("llama-gqa"), KINDS)


def test_a_module_and_an_nnsight_model(plain: Path) -> None:
    module = build("llama-gqa")
    model = load(module)
    assert model.hf is module and model.name == "LlamaForCausalLM"
    check_reads(model, build("llama-gqa"), KINDS)
    tokenizer = words(f"w{i}" for i in range(34))
    lm = TransformersModel(build("llama-gqa"), task="text-generation", tokenizer=tokenizer)
    wrapped = load(lm)
    assert wrapped.lm is lm and wrapped.tokenizer is tokenizer
    check_reads(wrapped, build("llama-gqa"), KINDS)


def test_an_nnsight_model_that_has_no_weights_yet_gets_them(plain: Path) -> None:
    tokenizer = words(f"w{i}" for i in range(34))
    lm = TransformersModel(str(plain), task="text-generation", tokenizer=tokenizer)
    assert next(lm._module.parameters()).is_meta
    model = load(lm)
    assert not next(model.hf.parameters()).is_meta
    check_reads(model, build("llama-gqa"), KINDS)


@pytest.mark.parametrize("name", zoo.names())
def test_an_embedded_name(name: str) -> None:
    model = load(name)
    assert model.name == name and model.tokenizer is not None and model.dtype == torch.float32
    assert "PatchModel('" + name in repr(model) and f"{model.dims.n_layers} layers" in repr(model)


def test_one_fingerprint_however_it_was_opened(plain: Path, copy: Path) -> None:
    first = load(plain).fingerprint()
    assert len(first) == 32
    assert {
        load(copy).fingerprint(),
        load(build("llama-gqa")).fingerprint(),
        load(plain, lazy=True).fingerprint(),
    } == {first}
    others = {load(plain, dtype="bfloat16").fingerprint(), load(build("mistral-window")).fingerprint()}
    assert first not in others and len(others) == 2


# Meta weights.


def test_lazy_has_sizes_and_sites_but_does_not_run(plain: Path) -> None:
    model = load(plain, lazy=True, dtype="bfloat16", attn_implementation="eager")
    assert model.lazy and all(parameter.is_meta for parameter in model.hf.parameters())
    assert model.dtype == torch.bfloat16 and model.config._attn_implementation == "eager"
    assert model.dims == load(plain).dims
    with pytest.raises(InputError, match="was loaded with lazy=True and has no weights"):
        capture(model, Batch.from_ids(PROMPTS), [Site("z", 0)])


def test_a_13b_config_without_weights_needs_no_memory(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=40,
        num_attention_heads=40,
        architectures=["LlamaForCausalLM"],
        dtype="float16",
    )
    config.save_pretrained(tmp_path)
    tracemalloc.start()
    began = time.process_time()
    model = load(tmp_path, lazy=True)
    seconds, (_, peak) = time.process_time() - began, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(parameter.numel() for parameter in model.hf.parameters()) == 13_015_864_320
    dims = model.dims
    assert (dims.n_layers, dims.n_heads, dims.d_head, dims.d_model, dims.d_mlp) == (40, 40, 128, 5120, 13824)
    # The components of the published study.
    assert len(sites_of("z", dims)) * dims.n_heads + len(sites_of("mlp_out", dims)) == 1640
    assert model.w_o(39).shape == (40, 128, 5120) and model.w_o(39).is_meta
    assert peak < 200e6 and seconds < 60


# Spread over devices by accelerate: on a machine without a GPU, "disk" stands for the second one.

SPREAD = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.layers.2": "cpu",
    "model.norm": "cpu",
    "lm_head": "cpu",
}


def check_everything(model: PatchModel) -> None:
    twin, kinds = build("llama-gqa"), kinds_of("llama-gqa")
    check_reads(model, twin, kinds)
    check_gradients(model, twin, kinds)
    check_patches(model, twin, kinds)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_device_maps_that_keep_everything_here(plain: Path, device_map: Any) -> None:
    check_reads(load(plain, device_map=device_map), build("llama-gqa"), KINDS)


def test_one_layer_on_disk(plain: Path) -> None:
    model = load(plain, device_map=SPREAD)
    assert all(parameter.is_meta for parameter in model.block_module(1).parameters())
    assert not model.w_o(1).is_meta and torch.equal(model.w_o(1), pair("llama-gqa")[0].w_o(1))
    check_everything(model)


def test_a_module_that_the_user_spread_comes_back_as_it_was(tmp_path: Path) -> None:
    module = build("gpt2")
    places = {name: "cpu" for name in ("transformer.wte", "transformer.wpe", "transformer.ln_f", "lm_head")}
    places |= {"transformer.h.0": "cpu", "transformer.h.1": "disk", "transformer.h.2": "cpu"}
    dispatch_model(module, places, main_device="cpu", offload_dir=tmp_path)  # pyright: ignore
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        before = module(input_ids=ids).logits
    forwards = {name: vars(part).get("forward") for name, part in module.named_modules()}
    assert any(forwards.values())
    model = load(module)
    check_reads(model, build("gpt2"), kinds_of("gpt2"))
    check_patches(model, build("gpt2"), kinds_of("gpt2"))
    assert model.b_o(1) is not None and torch.equal(model.b_o(1), pair("gpt2")[0].b_o(1))  # pyright: ignore
    model.release()
    assert all(vars(part).get("forward") is forwards[name] for name, part in module.named_modules())
    with torch.no_grad():
        assert torch.equal(module(input_ids=ids).logits, before)


def test_an_offloaded_embedding_is_refused(plain: Path) -> None:
    message = "the token embedding.* is offloaded; keep 'model.embed_tokens' first and on a device"
    with pytest.raises(InputError, match=message):
        load(plain, device_map=SPREAD | {"model.embed_tokens": "disk"})
    module = build("llama-gqa")
    cpu_offload(module, execution_device=torch.device("cpu"))
    with pytest.raises(InputError, match=message):
        load(module)


def test_a_module_stays_on_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """nnsight builds a pipeline, and a pipeline moves a model to the first GPU unless it is told where to be."""
    module = build("llama-gqa")
    monkeypatch.setattr("transformers.pipelines.base.is_torch_cuda_available", lambda: True)
    monkeypatch.setattr(type(module), "to", lambda *_: pytest.fail("the model was moved"))
    assert load(module).embed_device.type == "cpu"


# Every way to go wrong.


def damaged(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        weights = load_file(directory / "model.safetensors")
        change(weights)
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})

    return damage


def in_config(text: str | dict[str, Any]) -> Callable[[Path], Any]:
    text = text if isinstance(text, str) else json.dumps(text)
    return lambda directory: (directory / "config.json").write_text(text)


DOWN = "model.layers.1.mlp.down_proj.weight"
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda at: (at / "config.json").unlink(), "no config.json in this directory"),
    "config that is no JSON": (
        in_config("{model"),
        "config.json could not be read: .* is not a valid JSON file",
    ),
    "config without a family": (in_config("{}"), "config.json could not be read: .*model_type"),
    "family that nobody knows": (in_config({"model_type": "zzz"}), "config.json could not be read: .*zzz"),
    "family outside the table": (
        in_config({"model_type": "opt"}),
        "model family 'opt' .* is not in the architecture table",
    ),
    "no weights": (
        lambda at: (at / "model.safetensors").unlink(),
        "weights of .* could not be loaded: .*model.safetensors",
    ),
    "weights that are none": (
        lambda at: (at / "model.safetensors").write_bytes(b"nothing"),
        "weights of .* could not be loaded: .*header",
    ),
    "weights cut short": (
        lambda at: (at / "model.safetensors").write_bytes((at / "model.safetensors").read_bytes()[:-100]),
        "weights of .* could not be loaded",
    ),
    "a missing weight": (damaged(lambda w: w.pop(DOWN)), f"are incomplete: 1 missing, the first is '{DOWN}'"),
    "a weight of another shape": (
        damaged(lambda w: w.update({DOWN: w[DOWN][:5].contiguous()})),
        "weights of .* could not be loaded",
    ),
    "weights that are not numbers": (
        damaged(lambda w: w[DOWN].fill_(torch.nan)),
        "gives NaN or infinite logits",
    ),
    "tokenizer that is none": (
        lambda at: (at / "tokenizer.json").write_text("{"),
        "the tokenizer of .* could not be read: .* Give one with tokenizer=",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_directory_is_named_with_what_is_wrong(copy: Path, case: str) -> None:
    change, message = DAMAGE[case]
    change(copy)
    with pytest.raises(InputError, match=message) as caught:
        load(copy)
    if case != "family outside the table":
        assert str(copy) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/no/such/model", "/no/such/model: no such directory"),
        ("./model", "./model: no such directory"),
        ("a/b/c", "a/b/c: no such directory"),
        ("~/no-such-model", r"/no-such-model: no such directory"),
        ("", "the model's name is empty"),
        (
            "some-org/some-model",
            "model 'some-org/some-model' could not be opened: it is not an embedded name",
        ),
        (
            "varbind-lama",
            "model 'varbind-lama' could not be opened.*`patchkit models` lists the embedded names",
        ),
    ],
)
def test_a_name_that_leads_nowhere_is_refused_at_once(source: str, message: str) -> None:
    began = time.monotonic()
    with pytest.raises(InputError, match=message) as caught:
        load(source)
    assert "\n" not in str(caught.value) and time.monotonic() - began < 10


def test_a_file_is_not_a_directory(plain: Path) -> None:
    with pytest.raises(InputError, match="config.json is a file; expected the directory"):
        load(plain / "config.json")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"device": "cpu", "device_map": "auto"},
            "device='cpu' and device_map='auto' were both given; give one",
        ),
        ({"dtype": "int4"}, "dtype 'int4' is not known; expected one of: auto, float32"),
        ({"device": "nowhere"}, "device 'nowhere' cannot be used"),
        ({"device": "cuda:7"}, "device 'cuda:7' cannot be used"),
        ({"device_map": "nowhere"}, "could not be loaded: .*device_map.*nowhere"),
        (
            {"attn_implementation": "best"},
            'could not be loaded: .*attn_implementation="best". is not supported',
        ),
    ],
)
def test_options_that_cannot_be_followed(plain: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load(plain, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"dtype": "bfloat16"}, "dtype"),
        ({"device": "cpu", "lazy": True}, "device, lazy"),
        ({"device_map": "auto", "revision": "main"}, "device_map, revision"),
    ],
)
def test_a_module_that_exists_is_not_converted(options: dict[str, Any], named: str) -> None:
    tokenizer = words(f"w{i}" for i in range(34))
    module = build("llama-gqa")
    for source in (
        module,
        TransformersModel(build("llama-gqa"), task="text-generation", tokenizer=tokenizer),
    ):
        with pytest.raises(InputError, match=f"{named} cannot be applied to a model that exists already"):
            load(source, **options)
    with pytest.raises(InputError, match="uses attention implementation 'sdpa' and is not modified"):
        load(module, attn_implementation="eager")
    assert module.config._attn_implementation == "sdpa"


def test_training_mode_is_refused_also_in_one_part_only() -> None:
    module = build("gpt2")
    module.transformer.h[1].attn.attn_dropout.train()  # pyright: ignore
    for source in (build("llama-gqa").train(), module):
        with pytest.raises(InputError, match="in training mode, where dropout makes runs differ; call .eval"):
            load(source)


def test_a_module_that_is_no_model_is_refused() -> None:
    with pytest.raises(
        InputError, match="Linear has no config; expected a Hugging Face causal language model"
    ):
        load(nn.Linear(2, 2))


def test_an_mlp_that_reads_other_tokens_is_refused() -> None:
    """A patched run restarts at its token, and would leave out what the tokens before it read of it."""
    model: Any = build("gpt2")
    for block in model.transformer.h:
        plain = block.mlp.forward
        block.mlp.forward = lambda x, plain=plain: plain(x + torch.cat([x[:, 1:], x[:, -1:]], 1))
    with pytest.raises(InputError, match="a run that restarts at .* ends differently from a whole one"):
        load(model)


def test_a_precision_that_overflows_is_refused(tmp_path: Path) -> None:
    """Eager attention in float64 adds the smallest float64 and takes the softmax in float32: padding becomes NaN."""
    model = build("gemma2-post-norms-softcap", dtype=torch.float64)
    model.set_attn_implementation("eager")
    with pytest.raises(
        InputError, match="gives NaN or infinite logits on a tiny left-padded input; try another dtype"
    ):
        load(model)


def test_the_handmade_model_takes_no_options_that_change_its_numbers() -> None:
    with pytest.raises(
        InputError, match="handmade-llama is built from its analytic weights, exact in float32 only"
    ):
        load("handmade-llama", dtype="bfloat16")
    with pytest.raises(InputError, match="it takes no lazy"):
        load("handmade-llama", lazy=True)
    with pytest.raises(InputError, match="device 'nowhere' cannot be used"):
        load("handmade-llama", device="nowhere")
