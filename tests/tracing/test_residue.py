"""Nothing stays behind: no hook, no flag, no tensor, also after an error in the middle of a trace."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from nnsight.modeling.transformers import TransformersModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from patchkit.data.batch import Batch, positions
from patchkit.errors import InputError
from patchkit.model import PatchModel, Site
from patchkit.tracing import (
    Blend,
    Patch,
    attention_from,
    blended_logits,
    capture,
    capture_gradients,
    compute_prefix,
    run_patched,
)
from patchkit.zoo.load import load
from tests.comparisons import PROMPTS, agree, metric, shuffled_sites
from tests.families import FAMILIES, build
from tests.toy_tokenizers import words

#: Beside `make test`, in a lane of its own.
pytestmark = pytest.mark.slow

KINDS = ("q_proj", "q", "k", "z", "resid_mid", "neuron", "resid_post")
_HOOKS = [name for name in vars(nn.Module()) if "hooks" in name]


def everything(model: PatchModel) -> None:
    """One trace of every kind."""
    batch = Batch.from_ids(PROMPTS, pad_id=model.pad_id)
    kinds = [kind for kind in KINDS if not (kind == "resid_mid" and model.dims.parallel)]
    sites = shuffled_sites(model, kinds)
    last = positions(batch, -1)
    values = capture(model, batch, sites, columns=last).values
    capture_gradients(model, batch, sites, metric)
    attention_from(model, batch, [0, 2], last)
    site = Site("z", 1)
    run_patched(model, batch, [Patch(site, values[site], torch.arange(3), last)])
    keep = torch.full((model.dims.n_heads,), 0.5, requires_grad=True)
    for run in (batch, compute_prefix(model, batch)):
        logits = blended_logits(model, run, [Blend(site, keep, values[site])], last)
        torch.autograd.grad(metric(logits).sum(), [keep])


def hooks(module: nn.Module) -> dict[str, int]:
    return {
        f"{path} {name}": len(getattr(part, name))
        for path, part in module.named_modules()
        for name in _HOOKS
        if getattr(part, name)
    }


def states(module: nn.Module) -> dict[str, dict[str, Any]]:
    """Every attribute of every submodule: same names, and the same objects behind them."""
    return {
        path: {
            # The tables of parameters, buffers, children and hooks by their entries, the rest as it is.
            name: dict(value) if isinstance(value, dict) else value
            for name, value in vars(part).items()
        }
        for path, part in module.named_modules()
    }


def assert_same_states(now: dict[str, dict[str, Any]], before: dict[str, dict[str, Any]]) -> None:
    assert now.keys() == before.keys()
    for path, attributes in before.items():
        assert now[path].keys() == attributes.keys(), path
        for name, value in attributes.items():
            if isinstance(value, dict):
                assert now[path][name].keys() == value.keys(), (path, name)
                assert all(now[path][name][key] is item for key, item in value.items()), (path, name)
            else:
                assert now[path][name] is value or now[path][name] == value, (path, name)


@pytest.fixture(params=["llama-gqa", "gemma2-post-norms-softcap", "gpt2", "neox-parallel", "phi3-fused-gqa"])
def hf(request: pytest.FixtureRequest) -> Iterator[PreTrainedModel]:
    yield build(request.param)


def test_every_family_is_released_without_a_trace() -> None:
    for family in FAMILIES:
        module = build(family)
        before = states(module)
        load(module).release()
        assert_same_states(states(module), before)


def test_runs_leave_no_hooks_and_release_leaves_the_module_as_it_was(hf: PreTrainedModel) -> None:
    before, weights = states(hf), {name: value.clone() for name, value in hf.state_dict().items()}
    config, generation = hf.config.to_dict(), hf.generation_config.to_dict()  # pyright: ignore
    ids = torch.tensor([PROMPTS[0]])
    expected = hf(input_ids=ids).logits.detach()
    model = load(hf)
    everything(model)
    assert hooks(hf) == {}
    # Outside a trace the wrapped module is the module it was.
    assert torch.equal(hf(input_ids=ids).logits, expected)
    with pytest.raises(AssertionError):
        assert_same_states(states(hf), before)
    model.release()
    assert_same_states(states(hf), before)
    assert all(torch.equal(hf.state_dict()[name], value) for name, value in weights.items())
    assert hf.config.to_dict() == config and hf.generation_config.to_dict() == generation  # pyright: ignore
    assert torch.equal(hf(input_ids=ids).logits, expected)
    # Released twice, opened again: fine.
    model.release()
    again = load(hf)
    everything(again)
    again.release()
    assert_same_states(states(hf), before)


def test_requires_grad_flags_and_gradients_are_left_alone(hf: PreTrainedModel) -> None:
    """A borrowed module keeps its own flags, whatever they are, and no parameter gets a gradient."""
    for place, parameter in enumerate(hf.parameters()):
        parameter.requires_grad_(place % 3 != 0)
    flags = [parameter.requires_grad for parameter in hf.parameters()]
    model = load(hf)
    assert [parameter.requires_grad for parameter in hf.parameters()] == flags
    everything(model)
    assert [parameter.requires_grad for parameter in hf.parameters()] == flags
    assert all(parameter.grad is None for parameter in hf.parameters())


def test_gradients_do_not_depend_on_the_flags() -> None:
    batch = Batch.from_ids(PROMPTS)
    sites = [Site("z", 0), Site("resid_pre", 0), Site("mlp_out", 2)]
    found = []
    for flag in (True, False):
        model = load(build("llama-gqa").requires_grad_(flag))
        with torch.no_grad():
            found.append(capture_gradients(model, batch, sites, metric).gradients)
    for site in sites:
        assert found[0][site].abs().max() > 0
        assert torch.equal(found[0][site], found[1][site])


class Unexpected(Exception):
    pass


def failing(logits: Tensor) -> Tensor:
    raise Unexpected("in the metric")


def test_an_error_in_the_metric_leaves_everything_clean(hf: PreTrainedModel) -> None:
    flags = [parameter.requires_grad for parameter in hf.parameters()]
    before = states(hf)
    model = load(hf)
    batch = Batch.from_ids(PROMPTS, pad_id=model.pad_id)
    sites = [Site("q", 1), Site("z", 0)]
    expected = capture_gradients(model, batch, sites, metric)
    for bad, error, message in (
        (failing, Unexpected, "in the metric"),
        (lambda logits: logits, InputError, r"the metric gave shape \(3, 37\), expected .*\(3,\)"),
        (lambda logits: logits.sum(), InputError, r"the metric gave shape \(\)"),
        (lambda logits: logits[:, 99], IndexError, "out of bounds"),
    ):
        with pytest.raises(error, match=message):
            capture_gradients(model, batch, sites, bad)
        assert hooks(hf) == {}
        assert [parameter.requires_grad for parameter in hf.parameters()] == flags
        again = capture_gradients(model, batch, sites, metric)
        assert torch.equal(again.metric, expected.metric)
        assert all(torch.equal(again.gradients[site], expected.gradients[site]) for site in sites)
    model.release()
    assert_same_states(states(hf), before)


def test_an_error_in_the_middle_of_the_forward_leaves_everything_clean() -> None:
    """An id outside the vocabulary fails inside the embedding, with the trace open."""
    hf = build("llama-gqa")
    model = load(hf)
    good, bad = Batch.from_ids(PROMPTS), Batch.from_ids([[1, 2, 99]])
    expected = capture(model, good, [Site("q", 1)])
    with pytest.raises(IndexError):
        capture(model, bad, [Site("q", 1)])
    assert hooks(hf) == {}
    again = capture(model, good, [Site("q", 1)])
    assert torch.equal(again.values[Site("q", 1)], expected.values[Site("q", 1)])


def tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


def resident_bytes() -> int:
    """Of this process; 0 where the system does not say."""
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * 4096 if status.exists() else 0


def test_memory_is_flat_over_200_traces() -> None:
    model = load(build("llama-gqa"))
    batch = Batch.from_ids(PROMPTS * 20, pad_id=model.pad_id)
    sites = shuffled_sites(model, ["q", "z", "neuron", "resid_post"])
    last = positions(batch, -1)
    site = Site("z", 1)
    alternate = capture(model, batch, [site], columns=last).values[site]
    keep = torch.full((4,), 0.5, requires_grad=True)
    prefix = compute_prefix(model, batch)

    def round_of_traces() -> None:
        capture(model, batch, sites)
        capture_gradients(model, batch, sites, metric)
        run_patched(model, batch, [Patch(site, alternate, torch.arange(60), last)])
        logits = blended_logits(model, prefix, [Blend(site, keep, alternate)], last)
        torch.autograd.grad(metric(logits).sum(), [keep])

    for _ in range(5):
        round_of_traces()
    alive, resident = tensors(), resident_bytes()
    for _ in range(50):
        round_of_traces()
    assert tensors() <= alive
    # Were one round's activations kept each time, it would be over 100 MB.
    assert resident_bytes() - resident < 30e6


def test_results_are_freed_and_the_model_too() -> None:
    hf = build("llama-gqa")
    model = load(hf)
    result = capture(model, Batch.from_ids(PROMPTS), [Site("resid_post", 2)])
    value = weakref.ref(result.values[Site("resid_post", 2)])
    del result
    gc.collect()
    assert value() is None
    wrapper, module = weakref.ref(model), weakref.ref(hf)
    del model
    gc.collect()
    assert wrapper() is None and module() is hf
    del hf
    gc.collect()
    assert module() is None


def test_two_wrappers_of_one_module_do_not_disturb_each_other() -> None:
    hf = build("llama-gqa")
    before = states(hf)
    first, second = load(hf), load(hf)
    batch, site = Batch.from_ids(PROMPTS), Site("q", 1)
    expected = capture(first, batch, [site]).values[site]
    assert torch.equal(capture(second, batch, [site]).values[site], expected)
    second.release()
    assert torch.equal(capture(first, batch, [site]).values[site], expected)
    first.release()
    assert_same_states(states(hf), before)


def test_the_earlier_of_two_wrappers_may_be_released_first() -> None:
    hf = build("llama-gqa")
    before = states(hf)
    first, second = load(hf), load(hf)
    batch, site = Batch.from_ids(PROMPTS), Site("q", 1)
    first.release()
    assert capture(second, batch, [site]).values[site].abs().max() > 0
    second.release()
    assert_same_states(states(hf), before)


def test_an_nnsight_model_stays_traceable_after_release() -> None:
    tokenizer = words(f"w{i}" for i in range(34))
    lm = TransformersModel(build("llama-gqa"), task="text-generation", tokenizer=tokenizer)
    model = load(lm)
    assert model.lm is lm and model.tokenizer is tokenizer
    model.release()
    ids = torch.tensor([PROMPTS[0]])
    with lm.trace(input_ids=ids, attention_mask=torch.ones_like(ids)):
        read = lm.model.layers[1].output.save()
    with torch.no_grad():
        expected = build("llama-gqa").model(input_ids=ids, output_hidden_states=True).hidden_states[2]
    agree(read.detach(), expected, "resid_post.1 by nnsight alone")


def test_a_forward_of_the_modules_own_runs_and_is_put_back() -> None:
    """As accelerate has, and users who patch by hand."""
    hf = build("llama-gqa")
    mlp: Any = hf.get_submodule("model.layers.1.mlp")
    original, calls = mlp.forward, []

    def noted(x: Tensor) -> Tensor:
        calls.append(x.shape)
        return original(x)

    mlp.forward = noted
    model = load(hf)
    calls.clear()
    capture(model, Batch.from_ids(PROMPTS), [Site("mlp_out", 1)])
    assert calls == [(3, 10, 32)]
    model.release()
    assert mlp.forward is noted


def test_the_users_tokenizer_is_left_alone() -> None:
    tokenizer = words(f"w{i}" for i in range(34))
    tokenizer.padding_side, tokenizer.pad_token, tokenizer.eos_token = "right", None, "<s>"
    before = (tokenizer.padding_side, tokenizer.pad_token, tokenizer.eos_token, dict(tokenizer.init_kwargs))
    model = load(build("llama-gqa"), tokenizer=tokenizer)
    everything(model)
    assert model.tokenizer is tokenizer
    assert (
        tokenizer.padding_side,
        tokenizer.pad_token,
        tokenizer.eos_token,
        dict(tokenizer.init_kwargs),
    ) == before
