"""What a matrix of generalisation shows, in words that its numbers choose."""

from __future__ import annotations

from patchkit.results.generalisation import Generalisation, SizeMatrix

#: What the circuit from all sets' scores is called.
TOGETHER = "all sets"
#: Circuits whose worst faithfulness differs by less generalise alike.
_ALIKE = 0.02


def findings(found: Generalisation) -> list[str]:
    """Sentences about the largest size."""
    matrix, names = found.sizes[-1], [each.name for each in found.sets]
    told: list[str] = []
    own, crossed = _cells(matrix, names, found)
    if own and crossed:
        name, onto, worst = min(crossed, key=lambda cell: cell[2])
        told.append(
            f"Circuits of {matrix.requested} edges have faithfulness {_two(_mean(own))} on their own set's held-out "
            f"prompts and {_two(_mean(crossed))} on the others' (means). The furthest fall is that of {name} on {onto}: "
            f"{_two(worst)}."
        )
        told.append(_best(matrix, names, found))
    told.append(_together(matrix, found))
    told.append(_random(matrix, found))
    shared = [
        (ours.circuit, theirs.circuit, cell.jaccard)
        for row, ours in enumerate(matrix.rows)
        for column, theirs in enumerate(matrix.rows[:row])
        if (cell := matrix.overlaps[row][column]).jaccard is not None
        and TOGETHER not in (ours.circuit, theirs.circuit)
    ]
    if shared:
        least, most = min(shared, key=_jaccard), max(shared, key=_jaccard)
        told.append(
            f"{most[0]} and {most[1]} share most of their edges (Jaccard {most[2]:.2f}), {least[0]} and {least[1]} "
            f"fewest ({least[2]:.2f})."
        )
    return [said for said in told if said]


def notes(found: Generalisation) -> list[str]:
    """What a reader must know: sets on which no share can be given, circuits that are empty."""
    told = [
        f"On {each.name} clean prompts ({each.clean:+.3f}) and corrupt ones ({each.corrupt:+.3f}) differ by no more than "
        "chance: faithfulness there says nothing."
        for each in found.sets
        if not each.defined
    ]
    for matrix in found.sizes:
        empty = [row.circuit for row in matrix.rows if row.runs and row.runs[0].empty]
        if empty:
            told.append(
                f"With {matrix.requested} edges asked for nothing is left after pruning of {', '.join(empty)}: the "
                "numbers of that row are those of the corrupt prompts."
            )
    return told


def _cells(
    matrix: SizeMatrix, names: list[str], found: Generalisation
) -> tuple[list[tuple[str, str, float]], list[tuple[str, str, float]]]:
    """(on the circuit's own set, on the others), of cells that mean something."""
    own, crossed = [], []
    for row in matrix.rows:
        for place, (name, run) in enumerate(zip(names, row.runs, strict=True)):
            if row.kind == "set" and run.faithfulness is not None and found.sets[place].defined:
                (own if name == row.circuit else crossed).append((row.circuit, name, run.faithfulness))
    return own, crossed


def _mean(cells: list[tuple[str, str, float]]) -> float:
    return sum(value for _, _, value in cells) / len(cells)


def _best(matrix: SizeMatrix, names: list[str], found: Generalisation) -> str:
    """Which set's circuit does best on what it was not found on, at its worst."""
    _, crossed = _cells(matrix, names, found)
    worst = {
        name: min(value for circuit, _, value in crossed if circuit == name)
        for name in dict.fromkeys(circuit for circuit, _, _ in crossed)
    }
    name, last = (choose(worst, key=lambda each: worst[each]) for choose in (max, min))
    if worst[name] - worst[last] < _ALIKE:
        return f"All generalise alike: at least {_two(worst[last])} on every other set."
    return (
        f"The circuit of {name} generalises best, with at least {_two(worst[name])} on every other set; that of "
        f"{last} least ({_two(worst[last])})."
    )


def _together(matrix: SizeMatrix, found: Generalisation) -> str:
    (row,) = [each for each in matrix.rows if each.kind == "together"]
    values = [
        run.faithfulness
        for run, each in zip(row.runs, found.sets, strict=True)
        if run.faithfulness is not None and each.defined
    ]
    if not values:
        return ""
    return f"The circuit from all sets together has {_two(min(values))} to {_two(max(values))}."


def _random(matrix: SizeMatrix, found: Generalisation) -> str:
    if matrix.random is None:
        return ""
    values = [
        value
        for cell, each in zip(matrix.random.faithfulness, found.sets, strict=True)
        for value in cell
        if value is not None and each.defined
    ]
    if not values:
        return ""
    return f"Random circuits of as many edges have {_two(min(values))} to {_two(max(values))}."


def _jaccard(shared: tuple[str, str, float | None]) -> float:
    return shared[2] or 0.0


def _two(value: float) -> str:
    """Two decimals, and no minus before zero."""
    return f"{round(value, 2) + 0.0:.2f}"
