"""Pictures of the attribution-recall study: what each method has paid until the true top nodes are verified."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from patchkit.report._canvas import figure_of, label, log_axis, quiet_axes, style
from patchkit.report._palette import LIGHT, series
from patchkit.results.recall import RecallSetting, RecallStudy

_DASHES = ("-", "--", "-.", ":")
# Settings beside each other in the picture of all.
_COLUMNS = 2


def method_names(study: RecallStudy) -> list[str]:
    """Every method of the study, in the order in which they first come: each keeps its line in all pictures."""
    return list(dict.fromkeys(method.name for setting in study.settings for method in setting.methods))


@style()
def setting_figure(setting: RecallSetting, methods: Sequence[str]) -> Figure:
    """One setting: cost against rank on logarithmic axes, one line a method, and the oracle's diagonal."""
    figure = figure_of(4.9, 3.5 + 0.17 * -(-(len(setting.methods) + 1) // 2))
    axes = figure.subplots()
    _curves(axes, setting, methods)
    # Below the axes: lines that start high on the left leave no free corner inside.
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, handlelength=2.8)
    return figure


@style()
def recall_figure(study: RecallStudy) -> Figure:
    """Every setting in one picture."""
    rows = max(1, -(-len(study.settings) // _COLUMNS))
    figure = figure_of(5.4 * _COLUMNS, 4.3 * rows)
    panels = figure.subplots(rows, _COLUMNS, squeeze=False).flatten()
    for axes, setting in zip(panels, study.settings, strict=False):
        _curves(axes, setting, method_names(study))
        axes.set_title(label(setting.name, 64))
        axes.legend(loc="upper left", handlelength=2.8, fontsize=7.5)
    for axes in panels[len(study.settings) :]:
        axes.set_visible(False)
    return figure


def _curves(axes: Axes, setting: RecallSetting, methods: Sequence[str]) -> None:
    longest = max((method.ranks[-1] for method in setting.methods if method.ranks), default=1)
    most = max((max(method.cost) for method in setting.methods if method.cost), default=1.0)
    for method in setting.ranking():
        place = methods.index(method.name)
        role, marker = series(place)
        axes.plot(
            method.ranks,
            method.cost,
            color=LIGHT[role],
            ls=_DASHES[place % len(_DASHES)],
            marker=marker,
            markevery=(place * 3 % 25, 25),
            ms=4,
            # What the study is about, before the searches it is compared with.
            lw=2.0 if method.name.startswith("atp") else 1.1,
            label=f"{label(method.name, 18)}, {method.aggregate:.2f}",
        )
    axes.plot(
        [1, longest], [1, longest], color=LIGHT["soft"], lw=1, ls=(0, (1, 2)), label="oracle, 1.00", zorder=1
    )
    log_axis(axes, "x")
    log_axis(axes, "y")
    axes.set_xlim(0.9, 1.2 * longest)
    axes.set_ylim(0.8, 1.6 * max(most, longest))
    axes.set_xlabel("true top nodes verified")
    axes.set_ylabel("forwards per pair")
    quiet_axes(axes, "both")
