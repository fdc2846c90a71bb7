"""What the edge methods are asked: where, in which direction, by which metric, and what edges carry when they are cut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from patchkit.errors import InputError
from patchkit.methods._node_options import DIRECTIONS
from patchkit.results.convention import Convention
from patchkit.runtime import MAX_BATCH_TOKENS

EDGE_ABLATIONS = ("resample", "mean", "mean-positional", "zero")


@dataclass(frozen=True)
class EdgeOptions:
    """Options of the edge methods, of path patching and of circuits.

    Attributes:
        positions: tokens at which an edge is cut: `all` (together), `last`, `each` (an effect a position), or a
            comma-separated list of spans and indices.
        direction: `noise` (base = clean prompt) or `denoise` (base = corrupt prompt).
        metric: `logit-diff`, `prob-diff`, `kl`, `target-logprob` or `module:function`.
        ablation: what a cut edge carries: `resample` the pair's other run, `mean` over prompts and positions of a
            reference set, `mean-positional` over its prompts, position by position, or `zero`.
        seed: of what is drawn at random.
        max_batch_tokens: padded tokens in one forward, which bounds the memory.
    """

    positions: str = "all"
    direction: Literal["noise", "denoise"] = "noise"
    metric: str = "logit-diff"
    ablation: Literal["resample", "mean", "mean-positional", "zero"] = "resample"
    seed: int = 0
    max_batch_tokens: int = MAX_BATCH_TOKENS

    def __post_init__(self) -> None:
        for name, value, known in (
            ("direction", self.direction, DIRECTIONS),
            ("ablation", self.ablation, EDGE_ABLATIONS),
        ):
            if value not in known:
                raise InputError(f"{name} '{value}' is not known; expected one of: {', '.join(known)}")

    @property
    def convention(self) -> Convention:
        """What a number that these options lead to means."""
        return Convention(
            metric=self.metric,
            direction=self.direction,
            ablation=self.ablation,
            positions=self.positions,
            patching="edge",
        )
