"""The pictures: what stands where, by pixels and by the numbers in the artists."""

from __future__ import annotations

import io
import subprocess
import sys
from itertools import combinations
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from PIL import Image

from patchkit.errors import InputError
from patchkit.report import plots
from patchkit.report._palette import DARK, HEAT_MAX, LIGHT, rgb, series
from patchkit.report._places import Place, locate
from patchkit.results.study import AttentionExample


def pixels(figure: Figure, dpi: int = 160) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(plots.to_png(figure, dpi))).convert("RGB")).astype(int)


def at(figure: Figure, image: np.ndarray, axes: int, x: float, y: float, dpi: int = 160) -> np.ndarray:
    """The pixel at data coordinates."""
    figure.set_dpi(dpi)
    column, row = figure.axes[axes].transData.transform((x, y))
    return image[image.shape[0] - 1 - round(row), round(column)]


def xs(line: Line2D) -> list[float]:
    return np.asarray(line.get_xdata()).tolist()


def ys(line: Line2D) -> list[float]:
    return np.asarray(line.get_ydata()).tolist()


def test_no_picture_is_blank(make: Any) -> None:
    result, study = make.result(), make.study()
    figures = [
        plots.mask_figure(result),
        plots.path_figure(result),
        plots.size_figure(result),
        plots.accuracy_figure(result),
        plots.baselines_figure(result),
        plots.history_figure(result),
        plots.attention_figure(study.attention),
    ]
    for figure in figures:
        image = pixels(figure, 80)
        inked = (image.min(axis=2) < 200).mean()
        assert 0.004 < inked < 0.9
        # Something is drawn in every quarter of every picture's width.
        assert all((part.min(axis=2) < 230).any() for part in np.array_split(image, 4, axis=1))


def test_cells_stand_at_their_layer_and_head(make: Any) -> None:
    result = make.result(4, 8, chosen=["a1.h5", "m3"], pruned=[])
    result.values["head"][:] = 1.0
    result.values["mlp"][:] = 1.0
    result.values["head"][1, 5] = 0.0
    result.values["head"][2, 0] = 0.5
    result.values["mlp"][3] = 0.0
    figure = plots.mask_figure(result)
    image = pixels(figure)
    full = HEAT_MAX * np.array(rgb(LIGHT["heat"])) + (1 - HEAT_MAX) * 255
    half = HEAT_MAX / 2 * np.array(rgb(LIGHT["heat"])) + (1 - HEAT_MAX / 2) * 255
    # Off the middle of the cell, where the name and the value are written.
    seen = {
        (panel, layer, index): at(figure, image, panel, index - 0.38, layer)
        for panel, width in ((0, 8), (1, 1))
        for layer in range(4)
        for index in range(width)
    }
    expected = {(0, 1, 5): full, (1, 3, 0): full, (0, 2, 0): half}
    for place, colour in seen.items():
        assert np.abs(colour - expected.get(place, np.full(3, 255))).max() <= 2, place


def test_outline_and_name_for_each_chosen(make: Any) -> None:
    chosen = ["a0.h7", "a3.h0", "m2"]
    figure = plots.mask_figure(make.result(4, 8, chosen=chosen, pruned=[]))
    outlined = {
        patch.get_gid(): (panel, tuple(np.asarray(patch.get_center()).tolist()))
        for panel, axes in enumerate(figure.axes)
        for patch in axes.patches
        if isinstance(patch, Rectangle)
    }
    assert outlined == {"a0.h7": (0, (7.0, 0.0)), "a3.h0": (0, (0.0, 3.0)), "m2": (1, (0.0, 2.0))}
    written = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert [name for name in written if name in chosen] == chosen


def test_names_on_small_cells_do_not_overlap(make: Any) -> None:
    chosen = [
        "a15.h3",
        "a15.h4",
        "a16.h3",
        "a16.h4",
        "a20.h39",
        "a20.h38",
        "a30.h0",
        "a39.h39",
        "a0.h0",
        "m19",
        "m20",
    ]
    figure = plots.mask_figure(make.result(40, 40, chosen=chosen, pruned=[]))
    renderer = FigureCanvasAgg(figure).get_renderer()
    labels = {
        text.get_text(): text.get_window_extent(renderer)
        for text in figure.texts
        if text.get_text() in chosen
    }
    assert sorted(labels) == sorted(chosen)
    for (one, first), (two, second) in combinations(labels.items(), 2):
        assert not first.overlaps(second), (one, two)
    for box in labels.values():
        assert box.x0 >= 0 and box.x1 <= figure.bbox.x1


@pytest.mark.parametrize(
    ("shapes", "names"),
    [
        ({"head": (3, 4), "mlp": (3, 1)}, {"a2.h3": ("head", 2, 3), "m1": ("mlp", 1, 0)}),
        ({"z": (3, 1), "mlp_out": (3,)}, {"a2.h0": ("z", 2, 0), "m2": ("mlp_out", 2, 0)}),
        (
            {"layer": (3, 1), "attn_out": (3, 1)},
            {"resid_post.2": ("layer", 2, 0), "attn_out.1": ("attn_out", 1, 0)},
        ),
        ({"q": (3, 4), "k": (3, 2)}, {"q.1.h3": ("q", 1, 3), "k.0.h1": ("k", 0, 1)}),
    ],
)
def test_every_kind_of_component_is_found_and_drawn(
    make: Any, shapes: dict[str, Any], names: dict[str, Any]
) -> None:
    values = {kind: torch.ones(shape) for kind, shape in shapes.items()}
    result = make.result(chosen=[]).model_copy(update={"values": values, "chosen": list(names), "pruned": []})
    for name, place in names.items():
        assert locate(result, name) == Place(*place)
    figure = plots.mask_figure(result)
    plots.to_png(figure, 40)
    patches = [patch for axes in figure.axes for patch in axes.patches if isinstance(patch, Rectangle)]
    outlined = {patch.get_gid(): tuple(np.asarray(patch.get_center()).tolist()) for patch in patches}
    assert outlined == {name: (float(index), float(layer)) for name, (_, layer, index) in names.items()}


def test_neurons_are_dots_where_the_alternate_is_put_in(make: Any) -> None:
    values = torch.ones(3, 500)
    values[2, 417] = 0.0
    values[0, 3] = 0.4
    result = make.result(chosen=[]).model_copy(
        update={"values": {"neuron": values}, "chosen": ["m2.n417"], "pruned": []}
    )
    axes = plots.mask_figure(result).axes[0]
    assert np.asarray(axes.collections[0].get_offsets()).tolist() == [[3, 0], [417, 2]]
    circled = [line for line in axes.lines if line.get_marker() == "o"]
    assert [(xs(line)[0], ys(line)[0]) for line in circled] == [(417, 2)]


def test_path_panels_hold_the_path(make: Any) -> None:
    result = make.result()
    left, right = plots.path_figure(result).axes
    points = sorted(result.lambda_path, key=lambda point: point.lam)
    assert xs(left.lines[0]) == [point.lam for point in points]
    assert ys(left.lines[0]) == [point.size for point in points]
    assert ys(left.lines[1]) == pytest.approx([point.soft_size for point in points])
    by_size = sorted(points, key=lambda point: point.size)
    for line, scores in zip(right.lines, result.desiderata, strict=False):
        assert xs(line) == [point.size for point in by_size]
        assert ys(line) == pytest.approx([100 * point.test[scores.name] for point in by_size])
        assert line.get_linestyle() == ("-" if scores.trained else "--")
    assert ys(right.lines[5]) == pytest.approx([100 * point.joint for point in by_size])
    assert right.get_xlim()[0] == 0 and right.get_ylim() == (0, 100)


def test_wide_range_of_sizes_is_logarithmic_from_zero(make: Any) -> None:
    left, right = plots.path_figure(make.result(40, 40, chosen=["a3.h3"], pruned=[])).axes
    assert left.get_yscale() == right.get_xscale() == "symlog"
    assert left.get_ylim()[0] == right.get_xlim()[0] == 0


def test_baselines_show_each_random_set(make: Any) -> None:
    result = make.result()
    (axes,) = plots.baselines_figure(result).axes
    ticks = next(line for line in axes.lines if line.get_marker() == "|")
    assert xs(ticks) == pytest.approx([100 * value for value in result.random_joint])
    assert [text.get_text() for text in axes.texts] == ["97.7", "96.6", "0.4", "0.9", "0.4", "0.4"]


def test_history_skips_what_a_step_did_not_record(make: Any) -> None:
    result = make.result()
    assert plots.history_keys(result) == ["loss", "soft", "held-out joint"]
    loss, _, joint = plots.history_figure(result).axes
    assert len(xs(loss.lines[-1])) == 80
    assert xs(joint.lines[-1])[:9] == [20, 40, 60, 80, 100, 120, 140, 160, 180]
    again = [{"lambda": lam, "step": float(step), "loss": 1.0} for lam in (0.1, 0.3) for step in (5, 10, 20)]
    (axes,) = plots.history_figure(result.model_copy(update={"history": again})).axes
    stage, curve = axes.lines
    assert xs(curve) == [5, 10, 20, 25, 30, 40] and xs(stage) == [20, 20]


def test_attention_groups_heads_of_one_prompt(make: Any) -> None:
    tokens = ["<s>", "Ġcat", "値", "\n", "$a$"]
    examples = [
        AttentionExample(head="a0.h0", tokens=tokens, query=4, weights=[0.1, 0.2, 0.3, 0.4, 0.0]),
        AttentionExample(head="a1.h1", tokens=["x", "y"], query=1, weights=[0.5, 0.5]),
        AttentionExample(head="a2.h2", tokens=tokens, query=-1, weights=[0.0, 0.0, 0.0, 0.0, 1.0]),
    ]
    figure = plots.attention_figure(examples)
    plots.to_png(figure, 50)
    first, second = figure.axes
    assert np.asarray(first.images[0].get_array()).tolist() == [
        [0.1, 0.2, 0.3, 0.4, 0.0],
        [0.0, 0.0, 0.0, 0.0, 1.0],
    ]
    assert [label.get_text() for label in first.get_yticklabels()] == ["a0.h0", "a2.h2"]
    assert [label.get_text() for label in first.get_xticklabels()] == ["<s>", "cat", "値", "⏎", "$a$"]
    assert np.asarray(second.images[0].get_array()).tolist() == [[0.5, 0.5]]


def test_nothing_to_draw_is_an_error(make: Any) -> None:
    empty = make.result().model_copy(update={"lambda_path": [], "history": []})
    for draw in (plots.path_figure, plots.size_figure, plots.accuracy_figure, plots.history_figure):
        with pytest.raises(InputError, match="empty"):
            draw(empty)
    with pytest.raises(InputError, match="empty"):
        plots.attention_figure([])


def test_svg_follows_the_theme_and_leaves_labels_alone(make: Any) -> None:
    name = 'id="x" href="#y" #0072b2'
    result = make.result()
    scores = [result.desiderata[0].model_copy(update={"name": name})]
    named = result.model_copy(update={"desiderata": scores})
    svg = plots.to_svg(plots.accuracy_figure(named), 'what "it" shows', "p")
    assert 'aria-label="what &quot;it&quot; shows"' in svg
    assert name in svg.replace("&quot;", '"')
    tags = "".join(part.split(">")[0] for part in svg.split("<")[1:])
    assert "var(--s0)" in tags and not any(colour in tags for colour in LIGHT.values())
    assert svg == plots.to_svg(plots.accuracy_figure(named), 'what "it" shows', "p")


def test_drawing_changes_no_global_state(make: Any) -> None:
    before = dict(matplotlib.rcParams)
    plots.to_svg(plots.mask_figure(make.result()), "a mask", "p")
    assert dict(matplotlib.rcParams) == before
    code = "import sys, patchkit.report.page; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def luminance(colour: Any) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in np.asarray(colour) / 255]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def contrast(one: Any, two: Any) -> float:
    high, low = sorted((luminance(one), luminance(two)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_contrast(theme: Any) -> None:
    colour = {role: np.array(rgb(value)) for role, value in theme.items()}
    for role in ("ink", "soft", "chosen", "good", "s0"):
        assert contrast(colour[role], colour["panel"]) >= 4.5, role
        assert contrast(colour[role], colour["paper"]) >= 4.5, role
    for role in ("heat", "against"):
        cell = HEAT_MAX * colour[role] + (1 - HEAT_MAX) * colour["panel"]
        assert contrast(colour["ink"], cell) >= 4.5, role
    for index in range(6):
        assert contrast(colour[series(index)[0]], colour["panel"]) >= 3, index


def test_palette_is_invertible_and_series_stay_distinct() -> None:
    assert len(set(LIGHT.values())) == len(LIGHT) and LIGHT.keys() == DARK.keys()
    assert len({series(index) for index in range(36)}) == 36
