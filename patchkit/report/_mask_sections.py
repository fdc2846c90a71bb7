"""The sections of the page that a mask result alone can fill. Each returns HTML, empty when it has nothing to show."""

from __future__ import annotations

from collections.abc import Sequence

from patchkit.report import plots
from patchkit.report._html import count, escape, figure, names, paragraph, percent, section, unit
from patchkit.report._places import grid, locate
from patchkit.report._tables import (
    Cell,
    Table,
    head_cell,
    heat_cell,
    number_cell,
    random_cell,
    score_cell,
    text_cell,
)
from patchkit.results.mask import DesideratumScores, MaskResult

# Columns of the desiderata table: fields of SetScores, keys of MaskResult.joint.
_SETS = {
    "chosen": "chosen",
    "soft": "soft",
    "empty": "nothing",
    "all": "everything",
    "complement": "all others",
}


def tiles(result: MaskResult) -> str:
    """Joint scores of the chosen set and of what it is compared with, side by side."""
    joint = result.joint
    best = f", best {percent(max(result.random_joint))}" if result.random_joint else ""
    shown = [
        ("tile main", joint["chosen"], "chosen set"),
        ("tile", joint["complement"], "all the others"),
        ("tile", joint["random"], f"random sets{best}"),
        ("tile", joint["empty"], "nothing patched"),
        ("tile", joint["all"], "everything patched"),
        ("tile", joint["soft"], "soft mask, before rounding"),
    ]
    inside = "".join(
        f'<div class="{css}"><b>{unit(value)}</b><span>{what}</span></div>' for css, value, what in shown
    )
    return f'<div class="tiles" role="group" aria-label="Joint score on held-out triples">{inside}</div>'


def components(result: MaskResult) -> str:
    """The heat map of learned values and the chosen components by name."""
    chosen = ", ".join(result.chosen[:12]) + (" and more" if len(result.chosen) > 12 else "")
    alt = (
        f"Heat map of the learned mask values by layer. {len(result.chosen)} of {result.n_components} components are "
        f"outlined as chosen: {chosen or 'none'}."
    )
    caption = (
        "Each cell is a component; the stronger the tint, the more of the alternate prompt's activation is put in. "
        "Outlined: chosen, after rounding" + (" and pruning." if result.pruned else ".")
    )
    listed = (
        f"<p>Chosen ({count(len(result.chosen))} of {count(result.n_components)}): {names(result.chosen)}</p>"
    )
    if result.pruned:
        listed += f"<p>Dropped by pruning, because the scores hold without: {names(result.pruned)}</p>"
    picture = figure(plots.to_svg(plots.mask_figure(result), alt, "heat"), caption, wide=True)
    beside = f'<div class="beside">{picture}<div>{listed}</div></div>'
    return section("components", "Which components?", "Components", beside)


def path(result: MaskResult) -> str:
    """Size against lambda, accuracy against size, and the same numbers as a table."""
    if not result.lambda_path:
        return ""
    points = sorted(result.lambda_path, key=lambda point: point.lam)
    sizes = [point.size for point in points]
    size_alt = (
        f"Line chart: the chosen set goes from {sizes[0]} components at lambda {points[0].lam:g} "
        f"to {sizes[-1]} at lambda {points[-1].lam:g}."
    )
    best = max(points, key=lambda point: point.joint)
    accuracy_alt = (
        f"Line chart of held-out accuracy against size, one line per desideratum. The joint score is highest, "
        f"{percent(best.joint)} %, with {best.size} components."
    )
    asked = [scores.name for scores in result.desiderata]
    rows = [
        [
            number_cell(f"{point.lam:g}"),
            number_cell(count(point.size)),
            number_cell(f"{point.soft_size:.1f}"),
            *(score_cell(point.test.get(name)) for name in asked),
            score_cell(point.joint, "key"),
            number_cell(count(point.steps)),
        ]
        for point in points
    ]
    table = Table(
        "Each mask starts from the one before it. Scores in per cent of held-out triples.",
        ["lambda", "size", "soft size", *asked, "joint", "steps"],
        rows,
    )
    figures = figure(
        plots.to_svg(plots.size_figure(result), size_alt, "size"), "Size against the weight of the penalty."
    ) + figure(
        plots.to_svg(plots.accuracy_figure(result), accuracy_alt, "acc"),
        "What is lost by a smaller set, on held-out triples.",
    )
    numbers = f"<details><summary>The numbers</summary>{table.render()}</details>"
    return section("path", "How small can the set be?", "Size", f'<div class="pair">{figures}</div>', numbers)


def desiderata(result: MaskResult) -> str:
    """Every desideratum with every baseline, and the joint score below."""
    joint = result.joint
    total = [
        head_cell("joint", "minimum over trained"),
        text_cell(""),
        number_cell(""),
        number_cell(""),
        *(score_cell(joint[key], "key" if key == "chosen" else "") for key in _SETS),
        random_cell(result.random_joint),
    ]
    table = Table(
        "Per cent of held-out triples that meet each desideratum when the named set is patched. Random: mean over "
        "sets of the chosen size, and their range.",
        ["desideratum", "trained", "triples, train / test", "on train", *_SETS.values(), "random"],
        [_desideratum_row(scores) for scores in result.desiderata],
        total,
        groups=[("", 3), ("chosen set", 3), ("compared with", 4)],
    )
    gap = result.joint["chosen"] - result.joint["soft"]
    note = f"Rounding the mask to 0 and 1 changes the joint score by {percent(gap, sign=True)} points."
    alt = "Dot plot of joint scores in per cent: " + ", ".join(
        f"{key} {percent(result.joint[key])}"
        for key in ("chosen", "soft", "complement", "random", "all", "empty")
    )
    picture = figure(
        plots.to_svg(plots.baselines_figure(result), alt + ".", "base"),
        "Joint score of the chosen set beside the sets it must beat; ticks are single random sets.",
    )
    described = "".join(
        f"<li><strong>{escape(scores.name)}</strong> ({escape(scores.kind)}): {escape(scores.description)}</li>"
        for scores in result.desiderata
        if scores.description
    )
    words = f"<div>{f'<ul>{described}</ul>' if described else ''}{paragraph(note, 'note')}</div>"
    return section(
        "desiderata",
        "Does it hold on held-out prompts?",
        "Held-out scores",
        table.render(),
        f'<div class="pair">{picture}{words}</div>',
    )


def _desideratum_row(scores: DesideratumScores) -> Sequence[Cell]:
    return [
        head_cell(scores.name, scores.kind),
        text_cell("yes" if scores.trained else "no"),
        number_cell(f"{count(scores.n_train)} / {count(scores.n_test)}"),
        score_cell(scores.train_accuracy),
        *(score_cell(getattr(scores.test, key), "key" if key == "chosen" else "") for key in _SETS),
        random_cell(scores.test.random),
    ]


def carried(result: MaskResult) -> str:
    """What each component carries: alone, and missed from the chosen set."""
    if not result.carried:
        return ""
    asked = list(dict.fromkeys(name for entry in result.carried for name in [*entry.alone, *entry.missed]))
    rows = []
    for entry in result.carried:
        place = locate(result, entry.component)
        value = float(grid(result.values[place.kind])[place.layer, place.index])
        cells = [head_cell(entry.component), number_cell(f"{value:.2f}")]
        cells += [heat_cell(entry.alone.get(name)) for name in asked]
        cells += [heat_cell(entry.missed.get(name), sign=True) for name in asked]
        rows.append(cells)
    table = Table(
        "Alone: per cent of held-out triples whose answer changes when only this component is "
        "patched. Missed: points the chosen set loses without it (negative: it does better without).",
        ["component", "w", *asked, *asked],
        rows,
        groups=[("", 2), ("alone", len(asked)), ("missed", len(asked))],
    )
    return section("carries", "What each component carries", "What each carries", table.render())


def own_masks(result: MaskResult) -> str:
    """Masks trained on one desideratum alone, scored on all."""
    if not result.own_masks:
        return ""
    asked = list(dict.fromkeys(name for mask in result.own_masks for name in mask.test))
    rows = [
        [
            head_cell(mask.trained_on),
            number_cell(count(len(mask.chosen))),
            *(
                heat_cell(mask.test.get(name), mark="own" if name == mask.trained_on else "")
                for name in asked
            ),
            Cell(names(mask.chosen, 8)),
        ]
        for mask in result.own_masks
    ]
    table = Table(
        "A mask trained on the row's desideratum alone, in per cent of held-out triples of each column; its own column "
        "is outlined. A low cell says that the row's desideratum by itself would have picked a set that fails the other.",
        ["trained on", "size", *asked, "components"],
        rows,
    )
    return section("own", "Would one desideratum have been enough?", "One desideratum alone", table.render())


def seeds(result: MaskResult) -> str:
    """The masks of several training seeds, and how much they overlap."""
    if not result.seeds:
        return ""
    asked = list(dict.fromkeys(name for run in result.seeds for name in run.test))
    rows = [
        [
            head_cell(run.seed),
            number_cell(f"{run.lam:g}"),
            number_cell(count(len(run.chosen))),
            *(score_cell(run.test.get(name)) for name in asked),
            score_cell(run.joint, "key"),
            score_cell(run.complement_joint),
            random_cell(run.random_joint),
            number_cell(count(run.steps)),
            Cell(names(run.chosen, 8)),
        ]
        for run in result.seeds
    ]
    table = Table(
        "The same training from other seeds. Per cent of held-out triples.",
        [
            "seed",
            "lambda",
            "size",
            *asked,
            "joint",
            "all others, joint",
            "random, joint",
            "steps",
            "components",
        ],
        rows,
    )
    return section("seeds", "Do training seeds agree?", "Seeds", table.render(), _jaccard(result))


def _jaccard(result: MaskResult) -> str:
    if not result.jaccard:
        return ""
    numbers = [str(run.seed) for run in result.seeds]
    rows = [
        [head_cell(seed), *(Cell(f"{value:.2f}", heat=value, number=True) for value in row)]
        for seed, row in zip(numbers, result.jaccard, strict=True)
    ]
    caption = (
        "Jaccard overlap of the chosen sets: shared components over components in either; 1 is the same set."
    )
    return Table(caption, ["seed", *numbers], rows).render()


def training(result: MaskResult) -> str:
    """Curves of what was recorded while the mask was trained."""
    parts = []
    for place, key in enumerate(plots.history_keys(result)):
        kept = [entry[key] for entry in result.history if key in entry]
        alt = f"Line chart of {key} over {len(kept)} records, from {kept[0]:.3g} to {kept[-1]:.3g}."
        svg = plots.to_svg(plots.history_figure(result, [key]), alt, f"train{place}")
        parts.append(f'<figure class="fig">{svg}</figure>')
    ended = paragraph(f"Training ended: {result.stopped}", "note") if result.stopped else ""
    return (
        section(
            "training", "How training went", "Training", f'<div class="small">{"".join(parts)}</div>', ended
        )
        if parts
        else ""
    )
