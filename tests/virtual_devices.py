"""Accelerators that are not there: every tensor is said to be on a device, and what mixes two of them fails as on GPUs.

    with virtual_devices() as devices:
        model = spread("llama-gqa")       # accelerate's own hooks, a layer on each of three accelerators
        ...                               # any code: tensors report where they are, `.to` moves them

All memory is the CPU's, so numbers are real; what is virtual is a note, by storage, of the device that a tensor is said
to be on. Accelerators are `cpu:1`, `cpu:2`, ..., which torch lets one name; the host is `cpu`, where new tensors are. A
function mode answers `tensor.device` and does what is asked of `.to`, `.cpu` and `device=`; a dispatch mode sees every
operation of forward and backward, follows the notes through it, and refuses to mix, by CUDA's rules:

- operands are on one device, but for single numbers (0-dimensional) of the host;
- indices of the host may index any tensor;
- `copy_`, and so assignment to a slice, may come from anywhere;
- numpy and memory-mapped files see the host alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import dispatch_model
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from patchkit.model import PatchModel
from patchkit.zoo.load import load
from tests.families import build

HOST = torch.device("cpu")
ACCELERATORS = tuple(torch.device("cpu", number) for number in (1, 2, 3))

#: Where operations put things by position.
_INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put")
_ANYWHERE = ("copy_", "_local_scalar_dense", "set_", "resize_")


class MixedDevices(RuntimeError):
    """Tensors of two devices met; a GPU would refuse."""


class Devices:
    """Which device each storage is said to be on."""

    def __init__(self) -> None:
        self._of: dict[int, torch.device] = {}
        #: Storages that C++ made of nothing, as backward formulas do with zeros: on whatever device they are used.
        self._open: set[int] = set()
        #: Where the copy that is being made goes.
        self.target: torch.device | None = None
        #: Moves from device to device.
        self.moves: list[tuple[torch.device, torch.device]] = []
        #: Operations seen with operands of accelerators.
        self.operations = 0

    def of(self, tensor: Tensor) -> torch.device:
        """Where a tensor is said to be."""
        return self._of.get(_storage(tensor)[0], HOST)

    def is_open(self, tensor: Tensor) -> bool:
        return _storage(tensor)[0] in self._open

    def put(self, tensor: Tensor, device: torch.device | None) -> None:
        """Says where a tensor is; None: that this is not settled."""
        key, storage = _storage(tensor)
        if storage is None:
            return
        if key not in self._of and key not in self._open:
            weakref.finalize(storage, self._forget, key)
        self._of.pop(key, None)
        self._open.discard(key)
        if device is None:
            self._open.add(key)
        else:
            self._of[key] = device

    def _forget(self, key: int) -> None:
        self._of.pop(key, None)
        self._open.discard(key)

    def copy(self, tensor: Tensor, device: torch.device) -> Tensor:
        """A copy on a device, outside of any graph."""
        self.moves.append((self.of(tensor), device))
        before, self.target = self.target, device
        try:
            return tensor.clone()
        finally:
            self.target = before


def _storage(tensor: Tensor) -> tuple[int, torch.UntypedStorage | None]:
    functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    while functorch.is_batchedtensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    if tensor.is_meta:
        return 0, None
    storage = tensor.untyped_storage()
    return storage._cdata, storage


class _Move(torch.autograd.Function):
    """A copy to another device, whose gradient comes back to the first."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, device: torch.device, devices: Devices) -> Tensor:
        ctx.back, ctx.devices = devices.of(tensor), devices
        return devices.copy(tensor, device)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        before, ctx.devices.target = ctx.devices.target, ctx.back
        try:
            return gradients[0].clone(), None, None
        finally:
            ctx.devices.target = before


class _Operations(TorchDispatchMode):
    """Follows devices through operations, and refuses to mix them."""

    def __init__(self, devices: Devices) -> None:
        super().__init__()
        self.devices = devices

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        given = _tensors((args, kwargs))
        place = self._place(name, func, args, kwargs, given)
        target = self.devices.target if name == "clone" else None
        found = func(*args, **kwargs)
        held = {_storage(tensor)[0] for tensor in given}
        for tensor in _tensors(found):
            if _storage(tensor)[0] not in held:
                self.devices.put(tensor, target or place)
        return found

    def _place(
        self, name: str, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], given: Sequence[Tensor]
    ) -> torch.device | None:
        """The device of an operation's operands; None where there are none."""
        if name in _ANYWHERE:
            return self.devices.of(given[0])
        operands = given
        if name in _INDEXING:
            indices = _tensors(args[1])
            self._indices(func, args[0], indices)
            operands = [tensor for tensor in given if not any(tensor is index for index in indices)]
        settled = [tensor for tensor in operands if not self.devices.is_open(tensor) and not tensor.is_meta]
        # A number of the host goes with anything.
        places = {self.devices.of(tensor) for tensor in settled}
        strict = {
            place
            for tensor in settled
            for place in [self.devices.of(tensor)]
            if tensor.dim() or place != HOST
        }
        if len(strict) > 1:
            shapes = ", ".join(f"{tuple(tensor.shape)} on {self.devices.of(tensor)}" for tensor in operands)
            raise MixedDevices(f"{func}: expected all tensors on one device, found {shapes}")
        found = strict or places
        if strict - {HOST}:
            self.devices.operations += 1
        return next(iter(found)) if found else None

    def _indices(self, func: Any, indexed: Tensor, indices: Sequence[Tensor]) -> None:
        for index in indices:
            place, own = self.devices.of(index), self.devices.of(indexed)
            if place not in (HOST, own) and not self.devices.is_open(index):
                raise MixedDevices(
                    f"{func}: indices on {place} of a tensor on {own}; expected {own} or {HOST}"
                )


class _Questions(TorchFunctionMode):
    """Answers where a tensor is, and moves and makes tensors where Python asks for it."""

    def __init__(self, devices: Devices) -> None:
        super().__init__()
        self.devices = devices

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        devices = self.devices
        if func == Tensor.device.__get__:
            return args[0].device if args[0].is_meta else devices.of(args[0])
        if func is Tensor.to:
            return self._to(*args, **kwargs)
        if func is Tensor.cpu:
            return self._moved(args[0], HOST)
        if func in (Tensor.numpy, Tensor.__array__) and devices.of(args[0]) != HOST:
            raise MixedDevices(f"numpy cannot read a tensor on {devices.of(args[0])}; .cpu() it first")
        wanted = kwargs.get("device")
        if wanted is None or torch.device(wanted).type == "meta":
            found = func(*args, **kwargs)
            if func is Tensor.new_tensor:
                devices.put(found, devices.of(args[0]))
            elif not _tensors((args, kwargs)):
                # Made of no tensor, by Python: on the host. What C++ makes so in a backward stays open.
                for tensor in _tensors(found):
                    if devices.is_open(tensor):
                        devices.put(tensor, HOST)
            return found
        device = _settled(wanted)
        generator = kwargs.get("generator")
        if generator is not None and device != HOST:
            raise MixedDevices(f"{func}: a generator of {HOST} for numbers on {device}")
        if args and isinstance(args[0], Tensor) and func in (torch.as_tensor, torch.asarray, torch.tensor):
            kwargs["device"] = HOST
            return self._moved(func(*args, **kwargs), device)
        kwargs["device"] = HOST
        found = func(*args, **kwargs)
        for tensor in _tensors(found):
            devices.put(tensor, device)
        return found

    def _to(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        device = kwargs.pop("device", None)
        rest = []
        for each in args:
            if isinstance(each, torch.device | str):
                device = each
            elif isinstance(each, Tensor):
                device = self.devices.of(each)
                rest.append(each.dtype)
            elif isinstance(each, int) and not isinstance(each, bool):
                raise TypeError("virtual accelerators are named cpu:1, cpu:2, ..., not by number")
            elif each is not None:
                rest.append(each)
        if device is not None and torch.device(device).type == "meta":
            return tensor.to(device, *rest, **kwargs)
        if any(not isinstance(each, bool) for each in rest) or kwargs.keys() - {"non_blocking"}:
            tensor = tensor.to(*rest, **kwargs)
        return tensor if device is None else self._moved(tensor, _settled(device))

    def _moved(self, tensor: Tensor, device: torch.device) -> Tensor:
        if tensor.is_meta or self.devices.of(tensor) == device:
            return tensor
        if tensor.requires_grad and torch.is_grad_enabled():
            moved: Any = _Move.apply(tensor, device, self.devices)
            return moved
        return self.devices.copy(tensor, device)


def _settled(device: Any) -> torch.device:
    found = torch.device(device)
    return HOST if found.index in (None, 0) else found


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


@contextmanager
def virtual_devices(devices: Devices | None = None) -> Iterator[Devices]:
    """Inside, tensors are where they are said to be.

    Args:
        devices: of an earlier context, whose tensors are used again.
    """
    devices = devices or Devices()
    with _Operations(devices), _Questions(devices):
        yield devices


#: A device map's word for weights that stay on the host, and are brought to the main device when their layer runs.
OFFLOADED = "cpu"
#: Where layers 0, 1, 2 go.
ACROSS: Sequence[torch.device | str] = ACCELERATORS
WITH_OFFLOADED: Sequence[torch.device | str] = (ACCELERATORS[0], OFFLOADED, ACCELERATORS[1])


def spread(module: PreTrainedModel, layers: Sequence[torch.device | str] = ACROSS) -> PreTrainedModel:
    """The module as accelerate spreads it over GPUs: a layer on each device, the embeddings with the first of them, the
    final norm and the unembedding with the last, or the unembedding with the embedding that it is tied to."""
    base: Any = module.base_model
    prefix, first, last = module.base_model_prefix, str(layers[0]), str(layers[-1])
    device_map: dict[str, str | int | torch.device] = {}
    for name, part in base.named_children():
        if isinstance(part, nn.ModuleList):
            device_map |= {f"{prefix}.{name}.{n}": str(layers[n % len(layers)]) for n in range(len(part))}
        else:
            device_map[f"{prefix}.{name}"] = last if name in ("norm", "ln_f", "final_layer_norm") else first
    tied = bool(module.config.tie_word_embeddings)
    for name, _ in module.named_children():
        if name != prefix:
            device_map[name] = first if tied else last
    skip: Any = getattr(module, "_skip_keys_device_placement", None)
    found: Any = dispatch_model(module, device_map, main_device=torch.device(first), skip_keys=skip)
    return found


def spread_model(family: str, layers: Sequence[torch.device | str] = ACROSS) -> PatchModel:
    """A tiny model of a family, spread, opened and validated by patchkit."""
    return load(spread(build(family), layers))
