"""Pictures of a mask result as matplotlib figures: `to_png` and `to_svg` turn them into files and page elements.

Every function takes a result object and returns a new `Figure`; nothing global is touched. Accuracies are
drawn in per cent of held-out triples.
"""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from patchkit.errors import InputError
from patchkit.report._canvas import figure_of, label, quiet_axes, style, to_png, to_svg
from patchkit.report._heat import mask_figure
from patchkit.report._palette import LIGHT, series
from patchkit.report._tokens import SMALLEST_SHOWN, AttentionGroup, attention_groups, shown_token
from patchkit.results.mask import LambdaPoint, MaskResult
from patchkit.results.study import AttentionExample

__all__ = [
    "accuracy_figure",
    "attention_figure",
    "baselines_figure",
    "history_figure",
    "history_keys",
    "mask_figure",
    "path_figure",
    "size_figure",
    "to_png",
    "to_svg",
]


@style()
def path_figure(result: MaskResult) -> Figure:
    """Two panels: size of the mask against lambda, and held-out accuracy against size."""
    points = _points(result)
    figure = figure_of(10.4, 3.6 + 0.2 * -(-(len(result.desiderata) + 2) // 4))
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.25))
    _size_panel(left, result, points)
    _accuracy_panel(right, result, points, legend_columns=4)
    return figure


@style()
def size_figure(result: MaskResult) -> Figure:
    """How many components the mask keeps patching as lambda grows: rounded (chosen) and soft (sum of 1 - w)."""
    figure = figure_of(4.4, 3.6)
    _size_panel(figure.subplots(), result, _points(result))
    return figure


@style()
def accuracy_figure(result: MaskResult) -> Figure:
    """Held-out accuracy per desideratum against the size of the rounded mask; dashed: not trained on."""
    figure = figure_of(4.6, 3.2 + 0.2 * (len(result.desiderata) + 2))
    _accuracy_panel(figure.subplots(), result, _points(result))
    return figure


@style()
def baselines_figure(result: MaskResult) -> Figure:
    """The joint score of the chosen set and of every set it is compared with; each random set is a dot."""
    rows = [
        ("chosen", result.joint["chosen"], "s0"),
        ("soft mask", result.joint["soft"], "s5"),
        ("all but chosen", result.joint["complement"], "s1"),
        (f"random ({len(result.random_joint)})", result.joint["random"], "s1"),
        ("everything", result.joint["all"], "s5"),
        ("nothing", result.joint["empty"], "s5"),
    ]
    figure = figure_of(4.6, 2.5)
    axes = figure.subplots()
    for y, (_, value, role) in enumerate(rows):
        axes.plot([0, 100 * value], [y, y], color=LIGHT["line"], lw=1.2, zorder=1)
        axes.plot(
            100 * value, y, "D" if role == "s0" else "o", color=LIGHT[role], ms=7, zorder=3, clip_on=False
        )
        axes.annotate(
            f"{100 * value:.1f}",
            (100 * value, y),
            xytext=(8, 0) if value < 0.88 else (-8, 0),
            textcoords="offset points",
            ha="left" if value < 0.88 else "right",
            va="center",
            size=8.5,
            zorder=4,
        )
    each = [100 * value for value in result.random_joint]
    axes.plot(each, [3.32] * len(each), "|", color=LIGHT["s1"], ms=6, zorder=2, clip_on=False)
    axes.set_yticks(range(len(rows)), [name for name, _, _ in rows])
    axes.tick_params(axis="y", pad=8)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, 100)
    axes.set_xlabel("joint score, % of held-out triples")
    axes.spines["left"].set_visible(False)
    quiet_axes(axes, "x")
    return figure


def history_keys(result: MaskResult) -> list[str]:
    """What was recorded during training, in the order it was written; `step` and `lambda` say when, not what."""
    return [
        key
        for key in dict.fromkeys(key for entry in result.history for key in entry)
        if key not in ("step", "lambda")
    ]


@style()
def history_figure(result: MaskResult, keys: Sequence[str] | None = None) -> Figure:
    """One small panel per recorded quantity against the training step (all of `history_keys` when None).

    Steps of the stages of a lambda path are counted on; a thin line marks where the next stage starts.
    """
    wanted = list(history_keys(result) if keys is None else keys)
    if not wanted:
        raise InputError("the mask has no training history to draw: mask.json field history is empty.")
    steps, starts = _counted_on(
        [entry.get("step", float(place)) for place, entry in enumerate(result.history)]
    )
    figure = figure_of(3.5 * len(wanted), 2.4)
    for axes, key in zip(figure.subplots(1, len(wanted), squeeze=False)[0], wanted, strict=True):
        kept = [(x, entry[key]) for x, entry in zip(steps, result.history, strict=True) if key in entry]
        for start in starts:
            axes.axvline(start, color=LIGHT["line"], lw=0.8, zorder=1)
        marker = "." if len(kept) < 40 else None
        axes.plot([x for x, _ in kept], [y for _, y in kept], color=LIGHT["s0"], marker=marker)
        axes.set_title(label(key.replace("_", " ")))
        axes.set_xlabel("step, over all lambdas" if starts else "step")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        quiet_axes(axes)
    return figure


def _counted_on(steps: Sequence[float]) -> tuple[list[float], list[float]]:
    """Steps that begin anew at every stage as one rising count, and where each later stage begins."""
    counted: list[float] = []
    starts: list[float] = []
    offset = 0.0
    for place, step in enumerate(steps):
        if place and step <= steps[place - 1]:
            offset = counted[-1]
            starts.append(offset)
        counted.append(offset + step)
    return counted, starts


@style()
def attention_figure(examples: Sequence[AttentionExample]) -> Figure:
    """Attention of each head from the marked token, one block of rows per prompt; darker is more, in per cent."""
    groups = attention_groups(examples)
    if not groups:
        raise InputError("there are no attention examples to draw: study.json field attention is empty.")
    heights = [0.9 + 0.3 * len(group.heads) for group in groups]
    longest = max(len(group.tokens) for group in groups)
    figure = figure_of(min(24.0, max(5.0, 1.4 + 0.3 * longest)), sum(heights))
    panels = figure.subplots(len(groups), 1, height_ratios=heights, squeeze=False)
    for axes, group in zip(panels[:, 0], groups, strict=True):
        _attention_panel(axes, group)
    return figure


def _attention_panel(axes: Axes, group: AttentionGroup) -> None:
    rows = [weights for _, weights in group.heads]
    axes.imshow(rows, aspect="auto", cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    for y, weights in enumerate(rows):
        for x, weight in enumerate(weights):
            if weight >= SMALLEST_SHOWN:
                color = LIGHT["panel"] if weight > 0.5 else LIGHT["ink"]
                axes.text(x, y, f"{100 * weight:.0f}", ha="center", va="center", size=7.0, color=color)
    axes.set_yticks(range(len(rows)), [label(head, 16) for head, _ in group.heads])
    axes.set_xticks(range(len(group.tokens)), [label(shown_token(token), 12) for token in group.tokens])
    axes.tick_params(axis="x", rotation=90)
    mark = axes.get_xticklabels()[group.query]
    mark.set_color(LIGHT["chosen"])
    mark.set_fontweight("bold")
    for spine in axes.spines.values():
        spine.set_visible(False)


def _points(result: MaskResult) -> list[LambdaPoint]:
    if not result.lambda_path:
        raise InputError("the mask has no sparsity path to draw: mask.json field lambda_path is empty.")
    return sorted(result.lambda_path, key=lambda point: point.lam)


def _size_panel(axes: Axes, result: MaskResult, points: Sequence[LambdaPoint]) -> None:
    lams = [point.lam for point in points]
    axes.plot(
        lams,
        [point.size for point in points],
        "o-",
        color=LIGHT["s0"],
        clip_on=False,
        label="chosen (rounded)",
    )
    axes.plot(
        lams, [point.soft_size for point in points], "s--", color=LIGHT["s5"], label="soft, sum of 1 − w"
    )
    positive = [lam for lam in lams if lam > 0]
    if positive and max(lams) > 20 * min(positive):
        if len(positive) < len(lams):
            axes.set_xscale("symlog", linthresh=min(positive))
        else:
            axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        if len(lams) <= 8:
            axes.xaxis.set_major_locator(FixedLocator(lams))
            axes.xaxis.set_minor_locator(NullLocator())
    _size_scale(axes, "y", [*(float(point.size) for point in points), *(point.soft_size for point in points)])
    axes.set_xlabel("lambda (weight of the sparsity penalty)")
    axes.set_ylabel(f"components of {result.n_components:,}")
    axes.legend(loc="best")
    quiet_axes(axes)


def _accuracy_panel(
    axes: Axes, result: MaskResult, points: Sequence[LambdaPoint], legend_columns: int = 1
) -> None:
    points = sorted(points, key=lambda point: (point.size, -point.lam))
    for place, scores in enumerate(result.desiderata):
        role, marker = series(place)
        kept = [(point.size, 100 * point.test[scores.name]) for point in points if scores.name in point.test]
        axes.plot(
            [size for size, _ in kept],
            [accuracy for _, accuracy in kept],
            marker=marker,
            ls="-" if scores.trained else "--",
            color=LIGHT[role],
            label=label(scores.name, 26) + ("" if scores.trained else " (not trained)"),
            clip_on=False,
        )
    axes.plot(
        [point.size for point in points],
        [100 * point.joint for point in points],
        color=LIGHT["ink"],
        lw=3.2,
        alpha=0.35,
        label="joint (trained)",
        zorder=1,
    )
    axes.axvline(
        len(result.chosen), color=LIGHT["chosen"], lw=1.2, ls=":", label=f"final mask: {len(result.chosen)}"
    )
    _size_scale(axes, "x", [float(len(result.chosen)), *(float(point.size) for point in points)])
    axes.set_ylim(0, 100)
    axes.set_xlabel("components patched")
    axes.set_ylabel("% of held-out triples")
    quiet_axes(axes)
    axes.figure.legend(  # below the axes: lines near 100 % leave no free corner inside
        *axes.get_legend_handles_labels(), loc="outside lower right", ncols=legend_columns, handlelength=2.6
    )


def _size_scale(axes: Axes, which: str, sizes: Sequence[float]) -> None:
    """Component counts: linear when few, logarithmic with a true zero when the path spans more than a factor of 30."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    positive = [size for size in sizes if size >= 1]
    if positive and max(positive) > 30 * min(positive):
        (axes.set_xscale if which == "x" else axes.set_yscale)("symlog", linthresh=1)
        (axes.set_xlim if which == "x" else axes.set_ylim)(0, 1.4 * max(positive))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    else:
        axis.set_major_locator(MaxNLocator(6, integer=True))
        (axes.set_xlim if which == "x" else axes.set_ylim)(0, max(1.0, *sizes) * 1.06)
