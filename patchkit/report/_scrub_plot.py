"""Pictures of causal scrubbing: what each hypothesis recovers, and how the scrubbed metric spreads over inputs."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from patchkit.report._canvas import figure_of, label, quiet_axes, style
from patchkit.report._html import percent
from patchkit.report._palette import LIGHT
from patchkit.results.scrubbing import Scrubbing, ScrubResult

_TALL = 0.34


@style()
def recovered_figure(found: Scrubbing) -> Figure:
    """Recovered share of each hypothesis as a bar with its interval; 100 % explains all, 0 % nothing."""
    figure = figure_of(5.6, 0.9 + _TALL * len(found.results))
    axes = figure.subplots()
    known = [result.recovered for result in found.results if result.recovered is not None]
    ends = [end for result in found.results if result.recovered_interval for end in result.recovered_interval]
    low, high = min([0.0, *known, *ends]), max([1.0, *known, *ends])
    for y, result in enumerate(found.results):
        if result.recovered is None:
            axes.annotate("undefined", (0, y), xytext=(4, 0), textcoords="offset points", va="center", size=8,
                          color=LIGHT["soft"])  # fmt: skip
            continue
        axes.barh(y, 100 * result.recovered, height=0.56, color=LIGHT["s0"], alpha=0.75, zorder=2)
        end = result.recovered
        if result.recovered_interval is not None:
            start, end = result.recovered_interval
            axes.plot([100 * start, 100 * end], [y, y], color=LIGHT["ink"], lw=1.4, zorder=3)
            for limit in (start, end):
                axes.plot(100 * limit, y, "|", color=LIGHT["ink"], ms=7, mew=1.4, zorder=3)
        at = 100 * max(end, result.recovered, 0.0)
        axes.annotate(
            percent(result.recovered),
            (at, y),
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            size=8.5,
            zorder=4,
            bbox={"boxstyle": "square,pad=0.08", "fc": LIGHT["panel"], "ec": "none", "alpha": 0.88},
        )
    axes.axvline(100, color=LIGHT["soft"], lw=1, ls="--", zorder=1)
    axes.axvline(0, color=LIGHT["line"], lw=0.9, zorder=1)
    axes.set_yticks(range(len(found.results)), [label(result.hypothesis, 26) for result in found.results])
    axes.set_ylim(len(found.results) - 0.4, -0.6)
    room = 100 * (high - low)
    axes.set_xlim(100 * low - 0.02 * room, 100 * high + 0.14 * room)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}".replace("-", "−")))
    axes.set_xlabel("recovered, % of the behaviour")
    axes.spines["left"].set_visible(False)
    quiet_axes(axes, "x")
    return figure


@style()
def spread_figure(found: Scrubbing) -> Figure:
    """The scrubbed metric over reference inputs, a box a hypothesis: 5, 25, 50, 75 and 95 %; crosses are the means."""
    figure = figure_of(5.6, 0.9 + _TALL * len(found.results))
    axes = figure.subplots()
    for y, result in enumerate(found.results):
        least, low, middle, high, most = result.quantiles
        axes.plot([least, most], [y, y], color=LIGHT["s5"], lw=1.2, zorder=2)
        axes.barh(y, high - low, left=low, height=0.5, color=LIGHT["s5"], alpha=0.45, zorder=2)
        axes.plot([middle, middle], [y - 0.25, y + 0.25], color=LIGHT["ink"], lw=1.6, zorder=3)
        axes.plot(result.scrubbed_metric, y, "x", color=LIGHT["chosen"], ms=6, mew=1.6, zorder=4)
    for value, dash, said in (
        (_mean(found, "model_metric"), "--", "model"),
        (_mean(found, "random_metric"), ":", "random"),
    ):
        axes.axvline(value, color=LIGHT["soft"], lw=1, ls=dash, zorder=1)
        axes.annotate(said, (value, 1), xycoords=("data", "axes fraction"), xytext=(0, 2), textcoords="offset points",
                      ha="center", size=8, color=LIGHT["soft"])  # fmt: skip
    axes.set_yticks(range(len(found.results)), [label(result.hypothesis, 26) for result in found.results])
    axes.set_ylim(len(found.results) - 0.4, -0.6)
    metrics = dict.fromkeys(result.convention.metric for result in found.results)
    axes.set_xlabel(f"scrubbed {label(', '.join(metrics), 24)} over inputs")
    axes.spines["left"].set_visible(False)
    quiet_axes(axes, "x")
    return figure


def one_scale(found: Scrubbing) -> bool:
    """Whether all hypotheses were scrubbed on one metric and the same inputs, so that one axis fits them all."""
    of: list[ScrubResult] = found.results
    return (
        len({(result.convention.metric, result.pool, tuple(i.id for i in result.inputs)) for result in of})
        == 1
    )


def _mean(found: Scrubbing, field: str) -> float:
    values = [getattr(result, field) for result in found.results]
    return sum(values) / len(values)
