"""What a sweep over nodes returns: the effect of every node on every pair, with what the numbers mean.

The effect of a node is metric(base run with the source's activation put in) - metric(base run), exact or estimated;
higher metric = more of the behaviour, so with direction `noise` a node that helps has a negative effect.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from patchkit.errors import InputError
from patchkit.model.nodes import NodeGrid
from patchkit.results import _scores_files as files
from patchkit.results.convention import Convention as Convention
from patchkit.results.convention import check_same_convention as check_same_convention
from patchkit.results.formats import read_model, save_tensors, write_model
from patchkit.results.verification import Bound, Verification

if TYPE_CHECKING:
    import pandas as pd

# Bootstrap means that are in memory at once: nodes x draws.
_AT_ONCE = 1 << 22


@dataclass(frozen=True, eq=False)
class Scores:
    """Effects of nodes, pair by pair.

    Attributes:
        grid: which nodes, and how they are numbered.
        method: `exact`, `atp`, `atp-qk`, `atp-graddrop` or `atp-star`.
        convention: metric, direction, ablation and positions that the effects are of.
        pair_ids: of the pairs, in the order of the rows.
        effects: signed, on the CPU; NaN where a node was not asked for. Stored as float32; in memory float64 where the
            model computes so.
        magnitudes: |effects|, or GradDrop's mean of absolute values over its drops.
        base_metric: metric of each base run.
        source_metric: metric of each source run.
        cost: in forward-equivalents; 1 = one forward over every base prompt.
        layer_backwards: GradDrop's, per batch, beyond the ordinary backward.
        verification: what exact patching says about the estimates.
        bound: on the effects of the nodes that were not verified.
    """

    grid: NodeGrid
    method: str
    convention: Convention
    pair_ids: tuple[str, ...]
    effects: Float[Tensor, "pairs nodes"]
    magnitudes: Float[Tensor, "pairs nodes"]
    base_metric: Float[Tensor, " pairs"]
    source_metric: Float[Tensor, " pairs"]
    cost: float
    layer_backwards: int = 0
    verification: Verification | None = None
    bound: Bound | None = None

    def __post_init__(self) -> None:
        shape = (len(self.pair_ids), len(self.grid))
        for name, wanted in {
            "effects": shape,
            "magnitudes": shape,
            "base_metric": shape[:1],
            "source_metric": shape[:1],
        }.items():
            values = getattr(self, name)
            if tuple(values.shape) != wanted:
                raise InputError(
                    f"{name} of {shape[0]} pairs and {shape[1]} nodes: expected shape {list(wanted)}, "
                    f"found {list(values.shape)}"
                )
            kept = torch.float64 if values.dtype == torch.float64 else torch.float32
            object.__setattr__(self, name, values.detach().to("cpu", kept))
        if not shape[0]:
            raise InputError("scores need at least one pair, found none")

    @property
    def computed(self) -> Bool[Tensor, " nodes"]:
        """Which nodes were asked for: those with a number for every pair."""
        return ~self.effects.isnan().any(0)

    def mean(self, kind: str | None = None) -> Float[Tensor, "*axes"]:
        """Mean over pairs of the signed effect: flat, or one kind's tensor with the axes `grid.axes(kind)`.

        Raises:
            InputError: the grid has no such kind.
        """
        return self._of_kind(self.effects.mean(0, dtype=torch.float64).to(self.effects.dtype), kind)

    def mean_abs(self, kind: str | None = None) -> Float[Tensor, "*axes"]:
        """Mean over pairs of the magnitudes, the c(n) of the AtP* paper (arXiv 2403.00745): |.| inside the mean.

        Raises:
            InputError: the grid has no such kind.
        """
        return self._of_kind(self.magnitudes.mean(0, dtype=torch.float64).to(self.effects.dtype), kind)

    def _of_kind(self, flat: Float[Tensor, " nodes"], kind: str | None) -> Float[Tensor, "*axes"]:
        if kind is None:
            return flat
        if kind not in self.grid.kinds:
            raise InputError(f"node kind '{kind}': these scores have {', '.join(self.grid.kinds)}")
        return self.grid.split(flat)[kind]

    def order(self) -> Int[Tensor, " computed"]:
        """Numbers of the computed nodes by descending `mean_abs`; ties by number."""
        return self._ordered(self.mean_abs(), self.computed)

    @staticmethod
    def _ordered(keys: Float[Tensor, " nodes"], among: Bool[Tensor, " nodes"]) -> Int[Tensor, " some"]:
        numbers = among.nonzero()[:, 0]
        return numbers[torch.sort(keys[numbers], descending=True, stable=True).indices]

    def top(self, k: int, by: str = "abs") -> list[tuple[str, float, float]]:
        """The first `k` nodes as (name, mean, mean_abs).

        `by` is `abs` (largest mean_abs), `positive` or `negative` (those whose mean effect raises or lowers the
        metric most).

        Raises:
            InputError: `by` is something else.
        """
        if by not in ("abs", "positive", "negative"):
            raise InputError(f"top by '{by}': expected abs, positive or negative")
        mean, mean_abs, computed = self.mean(), self.mean_abs(), self.computed
        if by == "abs":
            numbers = self.order()
        else:
            keys = mean if by == "positive" else -mean
            numbers = self._ordered(keys, computed & (keys > 0))
        numbers = numbers[:k]
        values = (mean[numbers].tolist(), mean_abs[numbers].tolist())
        return list(zip(self.grid.names(numbers.tolist()), *values, strict=True))

    def interval(
        self,
        level: float = 0.95,
        draws: int = 1000,
        seed: int = 0,
        of: Int[Tensor, " some"] | None = None,
    ) -> tuple[Float[Tensor, " some"], Float[Tensor, " some"]]:
        """Percentile bootstrap over pairs of the signed mean: (low, high) of every node, or of the nodes `of`.

        A draw is the same sample of pairs for every node. NaN for nodes that were not computed, and for all when
        there is one pair, which says nothing about others.

        Raises:
            InputError: `level` outside (0, 1), or no draws.
        """
        if not 0 < level < 1 or draws < 1:
            raise InputError(
                f"bootstrap at level {level} with {draws} draws: expected 0 < level < 1 and a draw"
            )
        numbers = torch.arange(len(self.grid)) if of is None else of
        bounds = torch.full((2, len(numbers)), float("nan"))
        pairs = len(self.pair_ids)
        asked = self.computed[numbers].nonzero()[:, 0]
        if pairs == 1:
            return bounds[0], bounds[1]
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(pairs, (draws, pairs), generator=generator)
        weights = torch.zeros(pairs, draws, dtype=torch.float64)
        weights.scatter_add_(0, drawn.T, torch.full(drawn.T.shape, 1 / pairs, dtype=torch.float64))
        tails = [(1 - level) / 2, (1 + level) / 2]
        for chunk in asked.split(max(1, _AT_ONCE // draws)):
            means = self.effects[:, numbers[chunk]].double().T @ weights
            found = np.quantile(means.numpy(), tails, axis=1, overwrite_input=True)
            bounds[:, chunk] = torch.from_numpy(found).float()
        return bounds[0], bounds[1]

    def to_pandas(self) -> pd.DataFrame:
        """One row a computed node, by number: node, kind, layer, position (if placed), unit, effect, effect_abs."""
        import pandas as pd

        numbers = self.computed.nonzero()[:, 0]
        where = self.grid.locate(numbers)
        columns = {
            "node": self.grid.names(numbers.tolist()),
            "kind": np.array(self.grid.kinds)[where.kind.numpy()],
            "layer": where.layer.numpy(),
        }
        if self.grid.placed:
            columns["position"] = np.array(self.grid.places)[where.place.numpy()]
        columns |= {
            "unit": where.unit.numpy(),
            "effect": self.mean()[numbers].numpy(),
            "effect_abs": self.mean_abs()[numbers].numpy(),
        }
        return pd.DataFrame(columns, index=pd.Index(numbers.numpy(), name="number"))

    def save(self, directory: Path | str) -> None:
        """Writes the files of the contract; `scores.json` comes last, so a directory that has it is complete.

        Raises:
            RunError: the directory cannot be written to.
        """
        directory = Path(directory)
        save_tensors(directory / files.MEANS, self.grid.split(self.mean()))
        save_tensors(directory / files.MEANS_ABS, self.grid.split(self.mean_abs()))
        plain = torch.equal(self.magnitudes.nan_to_num(-1.0), self.effects.abs().nan_to_num(-1.0))
        numbers = files.PairNumbers(
            self.pair_ids,
            self.base_metric,
            self.source_metric,
            self.effects,
            None if plain else self.magnitudes,
        )
        files.write_pairs(directory / files.PAIRS, self.grid, numbers)
        for name, extra in ((files.VERIFICATION, self.verification), (files.BOUND, self.bound)):
            if extra is None:
                # What was verified for other scores says nothing about these.
                (directory / name).unlink(missing_ok=True)
            else:
                write_model(directory / name, extra)
        header = files.Header(
            method=self.method,
            convention=self.convention,
            grid=self.grid,
            pairs=len(self.pair_ids),
            cost=self.cost,
            layer_backwards=self.layer_backwards,
        )
        write_model(directory / files.HEADER, header)

    @staticmethod
    def load(directory: Path | str) -> Scores:
        """Reads what `save` wrote; the directory is all that is needed.

        Raises:
            InputError: a file is missing or malformed, or does not fit `scores.json`.
        """
        directory = Path(directory)
        header = files.read_header(directory / files.HEADER)
        for name in (files.MEANS, files.MEANS_ABS):
            files.check_means(directory / name, header.grid)
        pairs = files.read_pairs(directory / files.PAIRS, header.grid, header.pairs)
        verified, bound = directory / files.VERIFICATION, directory / files.BOUND
        return Scores(
            grid=header.grid,
            method=header.method,
            convention=header.convention,
            pair_ids=pairs.ids,
            effects=pairs.effects,
            magnitudes=pairs.effects.abs() if pairs.magnitudes is None else pairs.magnitudes,
            base_metric=pairs.base_metric,
            source_metric=pairs.source_metric,
            cost=header.cost,
            layer_backwards=header.layer_backwards,
            verification=read_model(verified, Verification) if verified.exists() else None,
            bound=read_model(bound, Bound) if bound.exists() else None,
        )
