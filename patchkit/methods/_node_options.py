"""What the node methods are asked: which nodes, where, in which direction, by which metric, replaced by what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Int
from torch import Tensor

from patchkit.data import Metric, Pair, Places, read_places, resolve_metric
from patchkit.errors import InputError
from patchkit.model import NodeGrid, PatchModel, kinds_of
from patchkit.results.scores import Convention
from patchkit.runtime import MAX_BATCH_TOKENS

DIRECTIONS = ("noise", "denoise")
ABLATIONS = ("resample", "mean", "zero", "noise")


@dataclass(frozen=True)
class NodeOptions:
    """Options of `patch_nodes` and `attribute`.

    Attributes:
        nodes: node kinds (`z`, `mlp_out`, ...) and node names (`a1.h3`, `a1.h3@5`, `m2.n17`).
        positions: `last`, `all` (patched together), `each`, or a comma-separated list of spans and indices.
        direction: `noise` (base = clean prompt) or `denoise` (base = corrupt prompt).
        metric: `logit-diff`, `prob-diff`, `kl`, `target-logprob` or `module:function`.
        ablation: what is put in: `resample` the pair's other run, `mean` that over a reference set, `zero`, or `noise`
            (the run's own activation plus Gaussian noise).
        noise_scale: standard deviation of the noise, in units of the site's own over the prompt.
        group: neighbouring neurons that make one node.
        layers: keep the nodes of these layers only; None for all.
        seed: of the noise.
        max_batch_tokens: padded tokens in one forward, which bounds the memory.
    """

    nodes: tuple[str, ...] = ("z", "mlp_out")
    positions: str = "all"
    direction: Literal["noise", "denoise"] = "noise"
    metric: str = "logit-diff"
    ablation: Literal["resample", "mean", "zero", "noise"] = "resample"
    noise_scale: float = 1.0
    group: int = 1
    layers: tuple[int, ...] | None = None
    seed: int = 0
    max_batch_tokens: int = MAX_BATCH_TOKENS

    def __post_init__(self) -> None:
        for name, value, known in (
            ("direction", self.direction, DIRECTIONS),
            ("ablation", self.ablation, ABLATIONS),
        ):
            if value not in known:
                raise InputError(f"{name} '{value}' is not known; expected one of: {', '.join(known)}")
        if not self.noise_scale > 0:
            raise InputError(f"noise_scale must be above 0, found {self.noise_scale}")

    @property
    def convention(self) -> Convention:
        """What a number that these options lead to means."""
        return Convention(
            metric=self.metric, direction=self.direction, ablation=self.ablation, positions=self.positions
        )


@dataclass(frozen=True, eq=False)
class Asked:
    """Options read against a model and pairs: the grid, the nodes of it that were asked for, the tokens of places."""

    pairs: tuple[Pair, ...]
    options: NodeOptions
    grid: NodeGrid
    ids: Int[Tensor, " n"]
    places: Places
    metric: Metric


def ask(model: PatchModel, pairs: Sequence[Pair], options: NodeOptions) -> Asked:
    """Checks options against the model and the pairs.

    Raises:
        InputError: an unknown kind, node, metric or position, or pairs that do not align.
    """
    metric = resolve_metric(options.metric)
    kinds = kinds_of(options.nodes, model.dims)
    places = read_places(options.positions, pairs)
    grid = NodeGrid(model.dims, kinds, places.labels, places.placed, options.group)
    ids = grid.select(options.nodes, options.layers)
    return Asked(tuple(pairs), options, grid, ids, places, metric)
