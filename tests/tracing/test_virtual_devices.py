"""The virtual accelerators themselves: they refuse what GPUs refuse, allow what GPUs allow, and find forgotten moves."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from patchkit.data import Batch
from patchkit.methods import EdgeOptions, NodeOptions, attribute, attribute_edges, patch_nodes, run_circuits
from patchkit.model import EdgeGraph, PatchModel
from patchkit.results.circuit import Circuit
from tests import virtual_devices as virtual
from tests.comparisons import PROMPTS
from tests.node_oracle import LONG, SHORT
from tests.virtual_devices import ACCELERATORS, HOST, Devices, MixedDevices, spread_model, virtual_devices

#: Beside `make test`, in a lane of its own.
pytestmark = pytest.mark.slow

ONE, TWO, _ = ACCELERATORS


def on(device: torch.device, *shape: int) -> Tensor:
    return torch.ones(*shape, device=device)


def _assign_by_index() -> None:
    on(ONE, 4)[torch.tensor([1, 2])] = on(TWO, 2)


REFUSED: dict[str, Callable[[], object]] = {
    "a sum": lambda: on(ONE, 3) + on(TWO, 3),
    "with the host": lambda: on(ONE, 3) * torch.ones(3),
    "in place": lambda: on(ONE, 3).add_(on(TWO, 3)),
    "a product": lambda: on(ONE, 2, 3) @ on(TWO, 3, 2),
    "an einsum": lambda: torch.einsum("ij,jk->ik", on(ONE, 2, 3), on(TWO, 3, 2)),
    "a concatenation": lambda: torch.cat([on(ONE, 2), on(TWO, 2)]),
    "a stack with the host": lambda: torch.stack([on(ONE, 2), torch.ones(2)]),
    "a mask": lambda: on(ONE, 3).masked_fill(torch.tensor([True, False, True]), 0.0),
    "a choice": lambda: torch.where(on(ONE, 3) > 0, on(ONE, 3), on(TWO, 3)),
    "a gather": lambda: on(ONE, 3).gather(0, torch.tensor([0])),
    "an index of another device": lambda: on(ONE, 3)[torch.tensor([0], device=TWO)],
    "an index of a tensor of the host": lambda: torch.ones(3)[torch.tensor([0], device=ONE)],
    "values by index": _assign_by_index,
    "a comparison": lambda: torch.equal(on(ONE, 3), on(TWO, 3)),
    "a number of another accelerator": lambda: on(ONE, 3) + on(TWO, 3).sum(),
    "an embedding": lambda: torch.nn.functional.embedding(torch.tensor([1]), on(ONE, 3, 2)),
    "a repetition": lambda: on(ONE, 2).repeat_interleave(torch.tensor([1, 2])),
    "a norm of another device": lambda: torch.nn.functional.layer_norm(on(ONE, 3), (3,), on(TWO, 3)),
    "numpy": lambda: on(ONE, 3).numpy(),
    "random numbers of the host's": lambda: torch.rand(3, generator=torch.Generator(), device=ONE),
    "a gradient": lambda: on(ONE, 3).requires_grad_().exp().backward(on(TWO, 3)),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_gpus_refuse_is_refused(what: str) -> None:
    with virtual_devices(), pytest.raises((MixedDevices, RuntimeError)) as caught:
        REFUSED[what]()
    assert isinstance(caught.value, MixedDevices) or what == "a gradient"


def _slice() -> Tensor:
    target = on(ONE, 4)
    target[1:3] = on(TWO, 2)
    return target


ALLOWED: dict[str, tuple[Callable[[], Tensor], torch.device]] = {
    "a sum": (lambda: on(ONE, 3) + on(ONE, 3), ONE),
    "after a move": (lambda: on(ONE, 3) + on(TWO, 3).to(ONE), ONE),
    "a move to where another is": (lambda: on(ONE, 3).to(on(TWO, 1)), TWO),
    "a move with a dtype": (lambda: on(ONE, 3).to(TWO, torch.float64), TWO),
    "a dtype": (lambda: on(ONE, 3).to(torch.float64), ONE),
    "a move to where it is": (lambda: on(ONE, 3).to("cpu:1"), ONE),
    "to the host": (lambda: on(ONE, 3).cpu(), HOST),
    "a number of the host": (lambda: on(ONE, 3) * torch.tensor(2.0), ONE),
    "a Python number": (lambda: on(ONE, 3) * 2, ONE),
    "an index of the host": (lambda: on(ONE, 3)[torch.tensor([0, 2])], ONE),
    "a view": (lambda: on(ONE, 3, 4)[1:, None].transpose(0, 1), ONE),
    "a slice that is assigned": (_slice, ONE),
    "a new one like it": (lambda: torch.zeros_like(on(TWO, 3)), TWO),
    "a new one made of it": (lambda: on(TWO, 3).new_tensor([1.0]), TWO),
    "a new one like it elsewhere": (lambda: torch.zeros_like(on(TWO, 3), device=ONE), ONE),
    "a new one": (lambda: torch.arange(3), HOST),
    "numbers of a list": (lambda: torch.tensor([1, 2], device=TWO), TWO),
    "a tensor of another": (lambda: torch.as_tensor(on(ONE, 2), device=TWO), TWO),
    "a parameter": (lambda: torch.nn.Linear(2, 2).to("cpu:2").weight, TWO),
}


@pytest.mark.parametrize("what", ALLOWED)
def test_what_gpus_allow_is_allowed(what: str) -> None:
    make, device = ALLOWED[what]
    with virtual_devices():
        assert make().device == device


def test_moves_copy() -> None:
    with virtual_devices() as devices:
        here = on(ONE, 3)
        there = here.to(TWO)
        there += 1
        assert here.cpu().tolist() == [1, 1, 1] and there.cpu().tolist() == [2, 2, 2]
        assert devices.moves == [(ONE, TWO), (ONE, HOST), (TWO, HOST)]


@pytest.mark.parametrize("batched", [False, True])
def test_gradients_come_back_to_where_the_leaf_is(batched: bool) -> None:
    with virtual_devices():
        leaf = on(ONE, 3).requires_grad_()
        end = (leaf.exp().to(TWO) * on(TWO, 3))[torch.tensor([0, 1])]
        given = on(TWO, 4, 2) if batched else on(TWO, 2)
        (found,) = torch.autograd.grad(end, leaf, given, is_grads_batched=batched)
        assert found.device == ONE and found.shape == ((4, 3) if batched else (3,))
        expected = torch.tensor([2.718282, 2.718282, 0.0]).expand(found.shape)
        torch.testing.assert_close(found.cpu(), expected)
        assert (found + leaf).device == ONE


def test_what_is_gone_is_forgotten() -> None:
    with virtual_devices() as devices:
        kept = on(ONE, 3)
        for _ in range(20):
            on(TWO, 3).add(1)
        gc.collect()
        assert list(devices._of.values()).count(TWO) == 0 and kept.device == ONE


@pytest.fixture(scope="module")
def model() -> tuple[PatchModel, Devices]:
    with virtual_devices() as devices:
        return spread_model("llama-gqa"), devices


def test_a_spread_model_is_where_it_is_said_to_be(model: tuple[PatchModel, Devices]) -> None:
    opened, devices = model
    with virtual_devices(devices):
        assert [opened.layer_device(layer) for layer in range(3)] == list(ACCELERATORS)
        for layer, device in enumerate(ACCELERATORS):
            assert {each.device for each in opened.block_module(layer).parameters()} == {device}
        assert opened.embed_device == ONE
        hf: Any = opened.hf
        # accelerate's own hooks carry what a layer is given to it, and bring the end back to where the prompts are.
        ids = Batch.from_ids(PROMPTS, pad_id=0).to(ONE)
        with torch.no_grad():
            assert hf(input_ids=ids.input_ids, attention_mask=ids.attention_mask).logits.device == ONE
        with pytest.raises(MixedDevices):
            torch.nn.functional.linear(on(ONE, 2, 32), hf.model.layers[1].mlp.up_proj.weight)


Call = Callable[[PatchModel], object]
#: What moves tensors: a function of patchkit, and a method that needs it.
NEEDED: dict[str, Call] = {
    "canonical": lambda model: attribute_edges(model, [LONG, SHORT], EdgeOptions(), "eap"),
    "clean": lambda model: attribute_edges(model, [LONG, SHORT], EdgeOptions(), "eap"),
    "_by_place": lambda model: attribute(model, [LONG, SHORT], NodeOptions()),
    "apply": lambda model: patch_nodes(model, [LONG, SHORT], NodeOptions()),
    "_project": lambda model: run_circuits(model, [LONG], [_half(model)]),
}


def _half(model: PatchModel) -> Circuit:
    graph = EdgeGraph.of(model.dims)
    return Circuit(graph, graph.real & (torch.rand(graph.real.shape) < 0.5))


@pytest.mark.parametrize("function", NEEDED)
def test_a_move_that_is_forgotten_is_found(
    function: str, model: tuple[PatchModel, Devices], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, devices = model
    with virtual_devices(devices):
        NEEDED[function](opened)
    moved, forgotten = virtual._Questions._moved, 0

    def without(self: Any, tensor: Tensor, device: torch.device) -> Tensor:
        nonlocal forgotten
        asking: Any = sys._getframe(1)
        while asking.f_code.co_filename == virtual.__file__:
            asking = asking.f_back
        mine = "/patchkit/" in asking.f_code.co_filename and asking.f_code.co_name == function
        if mine and devices.of(tensor) != device:
            forgotten += 1
            return tensor
        return moved(self, tensor, device)

    monkeypatch.setattr(virtual._Questions, "_moved", without)
    with virtual_devices(devices), pytest.raises(MixedDevices):
        NEEDED[function](opened)
    assert forgotten
