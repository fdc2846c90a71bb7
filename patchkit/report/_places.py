"""Where the components a mask names are among the tensors of its learned values."""

from __future__ import annotations

import re
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from patchkit.errors import InputError
from patchkit.results.mask import MaskResult

_NAME = re.compile(r"^(?P<stem>[A-Za-z_]*?)(?P<layer>\d+)(?:\.(?P<sub>[hn])(?P<index>\d+))?(?:[<@].*)?$")


@dataclass(frozen=True)
class Place:
    """A component's cell: `kind` is a key of `MaskResult.values`; `index` is 0 for kinds with one value per layer."""

    kind: str
    layer: int
    index: int


def grid(values: Tensor) -> Float[Tensor, "layer index"]:
    """Learned values as layer x index, kinds with one value per layer as one column."""
    return values[:, None] if values.ndim == 1 else values


def title_of(kind: str) -> str:
    """A kind as a person says it."""
    return {"head": "heads", "z": "heads", "mlp": "MLP", "mlp_out": "MLP", "neuron": "neurons"}.get(
        kind, kind
    )


def locate(result: MaskResult, name: str) -> Place:
    """The cell of one component name (`a1.h3`, `m2`, `m2.n17`, a layer).

    InputError when no tensor of the mask has such a cell: names and tensors then come from different runs.
    """
    found = _NAME.match(name)
    if found is not None:
        layer, index = int(found["layer"]), int(found["index"] or 0)
        for kind in _kinds_for(result, found["stem"], found["sub"]):
            layers, width = grid(result.values[kind]).shape
            if layer < layers and index < width:
                return Place(kind, layer, index)
    shapes = ", ".join(f"{kind} {list(values.shape)}" for kind, values in result.values.items()) or "none"
    raise InputError(
        f"mask.json names the component {name!r}, which has no learned value in mask.safetensors (it holds: {shapes}). "
        "The two files are from different runs; write both again."
    )


def _kinds_for(result: MaskResult, stem: str, sub: str | None) -> list[str]:
    """Kinds whose components are named like this, the likeliest first."""
    if sub == "n":
        return [kind for kind, values in result.values.items() if "neuron" in kind and values.ndim == 2]
    if sub == "h":
        return [kind for kind, values in result.values.items() if "neuron" not in kind and values.ndim == 2]
    columns = [kind for kind, values in result.values.items() if values.ndim == 1]
    return sorted(columns, key=lambda kind: kind.startswith("mlp") != (stem == "m"))


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
