"""Memory of a plan: what a batch takes, in parts, and how weights and batches lie on devices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from accelerate import infer_auto_device_map
from accelerate.utils import compute_module_sizes

from patchkit.model import Dims, PatchModel
from patchkit.runtime.batch_memory import Shape, pass_bytes
from patchkit.runtime.program import Batched, Differentiating

#: Of a device's memory, what weights and batches may take together: the rest is fragments and what libraries hold.
USABLE = 0.9


@dataclass(frozen=True)
class Taken:
    """What one batch takes.

    Attributes:
        forwards: token-forwards.
        kept: bytes that the method keeps.
        passes: bytes of the largest forward, with its backward where one follows.
    """

    forwards: float
    kept: int
    passes: int

    @property
    def total(self) -> int:
        return self.kept + self.passes

    def with_kept(self, kept: int) -> Taken:
        return replace(self, kept=kept)


def batch_taken(program: Batched[Any], dims: Dims, items: Sequence[Any], *, open_only: bool = False) -> Taken:
    """One batch, in the parts that `batch_bytes` adds up."""
    cost = program.cost(dims, items)
    if cost.passes is not None:
        return Taken(cost.forwards, cost.bytes, cost.passes)
    shape = Shape.of([program.tokens(item) for item in items])
    backward = isinstance(program, Differentiating) and program.backward
    return Taken(cost.forwards, cost.bytes, pass_bytes(dims, shape, backward=backward))


def with_budget(program: Batched[Any], budget: int) -> Batched[Any]:
    """A Program that runs its own rows within this budget too, as the scheduler hands it on."""
    if not hasattr(program, "max_batch_tokens"):
        return program
    held: Any = program
    return replace(held, max_batch_tokens=min(held.max_batch_tokens, budget))


@dataclass(frozen=True)
class Spread:
    """Weights on the devices of one process.

    Attributes:
        weights: bytes on each.
    """

    weights: tuple[int, ...]

    @property
    def devices(self) -> int:
        return len(self.weights)

    def peak(self, taken: Taken) -> int:
        """Bytes at the most on the fullest device: what is kept, of every layer, lies where the layers are; the largest
        pass is of one layer, or of all where a backward follows, and counts whole."""
        return max(self.weights) + taken.kept // self.devices + taken.passes


def spread_weights(model: PatchModel, devices: int) -> Spread:
    """As accelerate spreads a model over so many equal devices (`device_map="auto"`): layer by layer, none split, each
    device filled to an equal share and a layer more at the most."""
    sizes = compute_module_sizes(model.hf)
    total = int(sizes[""])
    if devices == 1:
        return Spread((total,))
    names = [str(name) for name in type(model.hf)._no_split_modules or []]  # pyright: ignore[reportAttributeAccessIssue]
    layer = max(int(sizes[f"{model.arch.layers}.{number}"]) for number in range(model.dims.n_layers))
    allowed: dict[int | str, int | str] = {devices - 1: total}
    for device in range(devices - 1):
        allowed[device] = total // devices + layer
    where = infer_auto_device_map(model.hf, max_memory=allowed, no_split_module_classes=names)
    weights = [0] * devices
    placed: dict[str, Any] = dict(where)
    for name, device in placed.items():
        weights[int(device)] += int(sizes[name])
    return Spread(tuple(weights))
