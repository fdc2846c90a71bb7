"""The pages of edges, paths, circuits and hypotheses, and their files; `page.write_report` finds the one to write."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from patchkit.report import _edge_sections as from_edges
from patchkit.report import _edge_words as edge_words
from patchkit.report import _study_sections as from_study
from patchkit.report._canvas import to_png
from patchkit.report._document import document, write_files
from patchkit.report._edge_plots import concentration_figure, edges_figure, layer_maps, pictured, shares
from patchkit.report._html import arrows, escape, paragraph
from patchkit.report._matrix_plot import matrix_figure
from patchkit.report._words import state
from patchkit.results.edge_scores import EdgeScores
from patchkit.results.manifest import MANIFEST, Manifest, read_manifest

EDGES_PICTURES = ("circuit.png", "layers.png", "concentration.png")


def write_edges_report(directory: Path | str) -> Path:
    """Writes report.html, circuit.png, layers.png and concentration.png from the files of an `edges` run.

    Returns report.html's path. A picture there is nothing for is not written, and one left by an earlier report removed.
    Raises InputError for missing or malformed files and RunError when writing fails.
    """
    directory = Path(directory)
    scores = EdgeScores.load(directory)
    page = edges_page(scores, _manifest(directory), place=directory.name)
    drawn = {}
    if not pictured(scores).is_empty:
        drawn["circuit.png"] = to_png(edges_figure(scores))
    if len(shares(scores)) > 1:
        maps, rows = layer_maps(scores)
        drawn["layers.png"] = to_png(matrix_figure(maps, rows, down="layer of sender"))
        drawn["concentration.png"] = to_png(concentration_figure(scores))
    return write_files(directory, page, drawn, EDGES_PICTURES)


def edges_page(scores: EdgeScores, manifest: Manifest | None = None, place: str = "DIR") -> str:
    """The page of edges as HTML, from the scores alone; `place` is how commands call the run's directory."""
    sections = [
        from_edges.picture(scores),
        from_edges.maps(scores),
        from_edges.concentration(scores),
        from_edges.table(scores),
        from_edges.positions(scores),
        from_edges.notes(scores),
        from_edges.onwards(scores, manifest, place),
        from_edges.reading(scores, manifest),
        from_study.again(None, manifest, place, counted="pairs"),
    ]
    model = f" in {manifest.model.id}" if manifest is not None and manifest.model is not None else ""
    title = f"Which edges matter{model}: {edge_words.method_name(scores)}"
    warned = [*edge_words.warnings(scores), state(manifest)]
    return document(
        title, _lead(title, edge_words.headline(scores), warned, from_edges.tiles(scores)), sections
    )


def _lead(title: str, headline: str, warned: Sequence[str], tiles: str) -> str:
    """What stands on top: the title, the answer in a sentence, what limits it, and the main numbers."""
    said = "".join(paragraph(text, "warn") for text in warned if text)
    return f'<h1>{escape(title)}</h1><p class="headline">{arrows(headline)}</p>{said}{tiles}'


def _manifest(directory: Path) -> Manifest | None:
    return read_manifest(directory) if (directory / MANIFEST).exists() else None


WRITERS: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "edges.json": ("`patchkit edges`", write_edges_report),
}
