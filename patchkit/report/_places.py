"""Where the components a mask names are among the tensors of its learned values."""

from __future__ import annotations

import re
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from patchkit.errors import InputError
from patchkit.results.mask import MaskResult

# The contract's short names, and what other kinds are called: their kind, layer and index.
_NAMES = (
    (re.compile(r"a(?P<layer>\d+)\.h(?P<index>\d+)"), ("head", "z")),
    (re.compile(r"m(?P<layer>\d+)\.n(?P<index>\d+)"), ("neuron",)),
    (re.compile(r"m(?P<layer>\d+)"), ("mlp", "mlp_out")),
    (re.compile(r"resid_post\.(?P<layer>\d+)"), ("layer", "resid_post")),
    (re.compile(r"(?P<kind>\w+)\.(?P<layer>\d+)(?:\.h(?P<index>\d+))?"), ()),
)

_TITLES = {
    "head": "heads",
    "z": "heads",
    "mlp": "MLP",
    "mlp_out": "MLP",
    "neuron": "neurons",
    "layer": "residual",
}


@dataclass(frozen=True)
class Place:
    """A component's cell: `kind` is a key of `MaskResult.values`; `index` is 0 for kinds with one component a layer."""

    kind: str
    layer: int
    index: int


def grid(values: Tensor) -> Float[Tensor, "layer index"]:
    """Learned values as layer x index; a tensor with one axis is one column."""
    return values[:, None] if values.ndim == 1 else values


def title_of(kind: str) -> str:
    """A kind as a person says it."""
    return _TITLES.get(kind, kind)


def locate(result: MaskResult, name: str) -> Place:
    """The cell of one component name (`a1.h3`, `m2`, `m2.n17`, `resid_post.3`, `q.1.h0`).

    InputError when no tensor of the mask has such a cell: names and tensors then come from different runs.
    """
    for pattern, kinds in _NAMES:
        if (found := pattern.fullmatch(name)) is None:
            continue
        parts = found.groupdict()
        layer, index = int(parts["layer"]), int(parts.get("index") or 0)
        for kind in kinds or (parts["kind"],):
            if kind in result.values:
                layers, width = grid(result.values[kind]).shape
                if layer < layers and index < width:
                    return Place(kind, layer, index)
    shapes = ", ".join(f"{kind} {list(values.shape)}" for kind, values in result.values.items()) or "none"
    raise InputError(
        f"mask.json names the component {name!r}, which has no learned value in mask.safetensors (it holds: "
        f"{shapes}). The two files are from different runs; write both again."
    )


def check(result: MaskResult) -> None:
    """Refuses a result whose parts do not belong together, before anything of a report is written (InputError)."""
    for kind, values in result.values.items():
        if values.ndim not in (1, 2):
            raise InputError(
                f"mask.safetensors: tensor {kind!r} has shape {list(values.shape)}; expected [layer] or [layer, index]. "
                "Write the mask again, one position at a time."
            )
    for name in [*result.chosen, *result.pruned]:
        locate(result, name)
    runs = len(result.seeds)
    if result.jaccard and [len(row) for row in result.jaccard] != [runs] * runs:
        shape = f"{len(result.jaccard)} rows of lengths {sorted({len(row) for row in result.jaccard})}"
        raise InputError(
            f"mask.json: field jaccard: expected {runs} x {runs}, one row per seed, found {shape}."
        )
    needed = ("chosen", "soft", "empty", "all", "complement", "random")
    if missing := [key for key in needed if key not in result.joint]:
        raise InputError(
            f"mask.json: field joint: expected {', '.join(needed)}; missing: {', '.join(missing)}. "
            "A score without its baselines is not reported; run the mask again."
        )
