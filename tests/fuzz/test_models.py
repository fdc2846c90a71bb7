"""Damaged model directories: whatever transformers makes of them, it is one line that names the directory."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from patchkit.errors import InputError
from patchkit.model import open_model
from patchkit.zoo.load import load
from tests.fuzz.damages import BINARY, SAFETENSORS
from tests.fuzz.specimens import MODEL, SHARDED, Specimen
from tests.fuzz.trial import Bench, unfit

#: Beside `make test`, in a lane of its own.
pytestmark = pytest.mark.slow

CASES = [
    (MODEL, "config.json"),
    (MODEL, "tokenizer.json"),
    (MODEL, "tokenizer_config.json"),
    (MODEL, "model.safetensors"),
    (SHARDED, "model.safetensors.index.json"),
]


@pytest.mark.parametrize(("specimen", "file"), CASES, ids=[file for _, file in CASES])
def test_each_file_of_a_model(specimen: Specimen, file: str, tmp_path: Path) -> None:
    bench, complaints = Bench(specimen, tmp_path), {}
    for damage in (*BINARY, *(SAFETENSORS if file.endswith(".safetensors") else ())):
        complaint = bench.complaint(file, damage.do)
        if complaint is not None:
            complaints[damage.name] = complaint
    assert complaints == {}


def config(**changed: Any) -> Callable[[Path], None]:
    return in_json("config.json", lambda data: data.update(changed))


def in_json(file: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def do(directory: Path) -> None:
        data = json.loads((directory / file).read_text())
        change(data)
        (directory / file).write_text(json.dumps(data))

    return do


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def do(directory: Path) -> None:
        file = directory / "model.safetensors"
        found = safetensors.torch.load(file.read_bytes())
        change(found)
        safetensors.torch.save_file(found, file, metadata={"format": "pt"})

    return do


HEAD = "model.layers.1.mlp.down_proj.weight"
OF_MODELS: dict[str, Callable[[Path], object]] = {
    "a family that nobody knows": config(model_type="zzz"),
    "a family of another kind": config(model_type="bert"),
    "a family that is a number": config(model_type=3),
    "no family": in_json("config.json", lambda data: data.pop("model_type")),
    "fewer layers in the config than weights": config(num_hidden_layers=1),
    "more layers in the config than weights": config(num_hidden_layers=3),
    "no layers in the config": config(num_hidden_layers=0),
    "layers in words": config(num_hidden_layers="two"),
    "layers that are a boolean": config(num_hidden_layers=True),
    "a width that is not that of the weights": config(hidden_size=32),
    "a width below zero": config(hidden_size=-16),
    "a fraction for a width": config(hidden_size=16.5),
    "no heads": config(num_attention_heads=0),
    "heads that do not divide the groups": config(num_key_value_heads=3),
    "a vocabulary that is not that of the weights": config(vocab_size=100),
    "an activation that nobody knows": config(hidden_act="zzz"),
    "a rotary type that nobody knows": config(rope_parameters={"rope_type": "zzz", "rope_theta": 10000.0}),
    "a type of weights that nobody knows": config(dtype="float31"),
    "a type of weights that is a number": config(dtype=32),
    "a norm that divides by NaN": config(rms_norm_eps=float("nan")),
    "weights of a module that are missing": weights(lambda found: found.pop(HEAD)),
    "weights of another shape": weights(lambda found: found.update({HEAD: found[HEAD][:-1].clone()})),
    "weights that are NaN": weights(lambda found: found[HEAD].fill_(float("nan"))),
    "weights that are infinite": weights(lambda found: found[HEAD].fill_(float("inf"))),
    "no weights": lambda directory: (directory / "model.safetensors").unlink(),
    "no config": lambda directory: (directory / "config.json").unlink(),
    "a tokenizer whose special token is missing": in_json(
        "tokenizer.json", lambda data: data["post_processor"]["special_tokens"].clear()
    ),
    "a tokenizer of a model that nobody knows": in_json(
        "tokenizer.json", lambda data: data["model"].update(type="zzz")
    ),
    "a vocabulary in words": in_json("tokenizer.json", lambda data: data["model"].update(vocab="Mary John")),
    "a length of prompts in words": in_json(
        "tokenizer_config.json", lambda data: data.update(model_max_length="long")
    ),
}
OF_SHARDS: dict[str, Callable[[Path], object]] = {
    "a shard that is missing": lambda directory: next(directory.glob("model-00002-*")).unlink(),
    "an index without its map": in_json(SHARDED.files[0], lambda data: data.pop("weight_map")),
    "an index whose map is a list": in_json(SHARDED.files[0], lambda data: data.update(weight_map=[])),
    "an index that names other shards": in_json(
        SHARDED.files[0], lambda data: data["weight_map"].update({HEAD: "elsewhere.safetensors"})
    ),
    "an index that names numbers": in_json(
        SHARDED.files[0], lambda data: data["weight_map"].update({HEAD: 3})
    ),
}
NAMES = (*OF_MODELS, *OF_SHARDS)


@pytest.fixture
def quiet() -> Iterator[None]:
    """Without what transformers and Rust say on stderr by themselves."""
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    yield
    os.dup2(saved, 2)
    os.close(saved)
    os.close(null)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("name", NAMES)
def test_a_directory_that_contradicts_itself(name: str, tmp_path: Path) -> None:
    sharded = name in OF_SHARDS
    (SHARDED if sharded else MODEL).make(tmp_path)
    (OF_SHARDS if sharded else OF_MODELS)[name](tmp_path)
    with pytest.raises(InputError) as caught:
        load(tmp_path)
    # Of a model that was read, its class or family is named.
    message = str(caught.value)
    assert (
        unfit(message, tmp_path) is None
        or message.isprintable()
        and ("Llama" in message or "bert" in message)
    )


@pytest.mark.parametrize(
    "name", ["", "m" * 5000, "a\0b", "./nowhere", "a/b/c/d", __file__, "-", "no such model"]
)
def test_names_of_no_model(name: str) -> None:
    with pytest.raises(InputError) as caught:
        open_model(name)
    assert str(caught.value).isprintable()
