"""The pages of edges, paths, circuits and hypotheses, and their files; `page.write_report` finds the one to write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from patchkit.errors import InputError
from patchkit.report import _circuit_tests_sections as from_tests
from patchkit.report import _circuits_sections as from_circuits
from patchkit.report import _edge_sections as from_edges
from patchkit.report import _edge_words as edge_words
from patchkit.report import _evaluation_sections as from_evaluation
from patchkit.report import _evaluation_words as evaluation_words
from patchkit.report import _paths_sections as from_paths
from patchkit.report import _scrub_sections as from_scrubbing
from patchkit.report import _study_sections as from_study
from patchkit.report._canvas import to_png
from patchkit.report._circuits_plots import areas_figure, methods_figure
from patchkit.report._document import document, lead, write_files
from patchkit.report._edge_plots import concentration_figure, edges_figure, layer_maps, pictured, shares
from patchkit.report._evaluation_plots import curve_figure, faithfulness_figure
from patchkit.report._evaluation_words import main_run
from patchkit.report._matrix_plot import matrix_figure
from patchkit.report._paths_plot import paths_figure
from patchkit.report._scrub_plot import recovered_figure
from patchkit.report._words import state
from patchkit.results.circuit_study import CIRCUITS, CircuitStudy
from patchkit.results.edge_scores import EdgeScores
from patchkit.results.evaluation import EVALUATION, Evaluation
from patchkit.results.manifest import MANIFEST, Manifest, read_manifest
from patchkit.results.paths import PATHS, PathResult
from patchkit.results.scrubbing import SCRUBBING, Scrubbing

CIRCUITS_PICTURES = ("circuits.png", "areas.png")
EVALUATION_PICTURES = ("faithfulness.png", "curve.png")
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
    held = shares(scores)
    if len(held) > 1:
        maps, rows = layer_maps(scores)
        drawn["layers.png"] = to_png(matrix_figure(maps, rows, down="layer of sender"))
        drawn["concentration.png"] = to_png(concentration_figure(scores, held))
    return write_files(directory, page, drawn, EDGES_PICTURES)


def edges_page(scores: EdgeScores, manifest: Manifest | None = None, place: str = "DIR") -> str:
    """The page of edges as HTML, from the scores alone; `place` is how commands call the run's directory."""
    held = shares(scores)
    sections = [
        from_edges.picture(scores),
        from_edges.maps(scores),
        from_edges.concentration(scores, held),
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
        title, lead(title, edge_words.headline(scores), warned, from_edges.tiles(scores, held)), sections
    )


def write_evaluation_report(directory: Path | str) -> Path:
    """Writes report.html, faithfulness.png and, where there are curves, curve.png from an evaluation; returns the page.

    Raises InputError for missing or malformed files and RunError when writing fails.
    """
    directory = Path(directory)
    found = Evaluation.load(directory)
    page = evaluation_page(found, _manifest(directory), place=directory.name)
    drawn = {}
    if main_run(found) is not None:
        drawn["faithfulness.png"] = to_png(faithfulness_figure(found))
    if found.curves:
        drawn["curve.png"] = to_png(curve_figure(found.curves))
    return write_files(directory, page, drawn, EVALUATION_PICTURES)


def evaluation_page(found: Evaluation, manifest: Manifest | None = None, place: str = "DIR") -> str:
    """The page of an evaluation as HTML; `place` is how commands call the run's directory."""
    sections = [
        from_evaluation.belief(found),
        from_evaluation.sizes(found),
        from_evaluation.curves(found),
        from_tests.random(found),
        from_tests.completeness(found),
        from_tests.minimality(found),
        from_tests.overlaps(found),
        from_tests.stability(found),
        from_tests.repair(found),
        from_evaluation.notes(found),
        from_evaluation.protocol(found, manifest),
        from_study.again(None, manifest, place, counted="pairs"),
    ]
    title = f"Is the circuit enough? {found.model}: {evaluation_words.method_name(found)}"
    warned = [*evaluation_words.warnings(found), state(manifest)]
    top = lead(title, evaluation_words.headline(found), warned, from_evaluation.tiles(found))
    return document(title, top, sections)


def write_paths_report(directory: Path | str) -> Path:
    """Writes report.html and, where a sender has an effect, paths.png from a `paths` run; returns report.html's path.

    Raises InputError for missing or malformed files and RunError when writing fails.
    """
    directory = Path(directory)
    found = PathResult.load(directory)
    page = paths_page(found, _manifest(directory), place=directory.name)
    drawn = {"paths.png": to_png(paths_figure(found))} if found.stages else {}
    return write_files(directory, page, drawn, ("paths.png",))


def paths_page(found: PathResult, manifest: Manifest | None = None, place: str = "DIR") -> str:
    """The page of path patching as HTML; `place` is how commands call the run's directory."""
    sections = [
        from_paths.picture(found),
        *from_paths.stages(found),
        from_paths.notes(found),
        from_paths.reading(found, manifest),
        from_study.again(None, manifest, place, counted="pairs"),
    ]
    title = f"Path patching in {found.model}"
    warned = [*from_paths.warnings(found), state(manifest)]
    return document(title, lead(title, from_paths.headline(found), warned, from_paths.tiles(found)), sections)


def write_scrubbing_report(directory: Path | str) -> Path:
    """Writes report.html and scrubbing.png of scrubbed hypotheses; returns report.html's path.

    Raises InputError for missing or malformed files and RunError when writing fails.
    """
    directory = Path(directory)
    found = Scrubbing.load(directory)
    page = scrubbing_page(found, _manifest(directory), place=directory.name)
    return write_files(directory, page, {"scrubbing.png": to_png(recovered_figure(found))}, ())


def scrubbing_page(found: Scrubbing, manifest: Manifest | None = None, place: str = "DIR") -> str:
    """The page of causal scrubbing as HTML; `place` is how commands call the run's directory.

    Raises InputError when no hypothesis was scrubbed.
    """
    if not found.results:
        raise InputError(
            "scrubbing.json: field results is empty, so there is nothing to show. Scrub a hypothesis."
        )
    sections = [
        from_scrubbing.question(found),
        from_scrubbing.recovered(found),
        from_scrubbing.findings(found),
        from_scrubbing.nodes(found),
        from_scrubbing.notes(found),
        from_scrubbing.reading(found, manifest),
        from_scrubbing.again(found, manifest, place),
    ]
    title = f"Causal scrubbing of {found.results[0].model}"
    warned = [*from_scrubbing.warnings(found), state(manifest)]
    top = lead(title, from_scrubbing.headline(found), warned, from_scrubbing.tiles(found))
    return document(title, top, sections)


def write_circuits_report(directory: Path | str) -> Path:
    """Writes report.html, circuits.png and, where there are curves, areas.png of a study of circuits; returns the page.

    Raises InputError for missing or malformed files and RunError when writing fails.
    """
    directory = Path(directory)
    study = CircuitStudy.load(directory)
    page = circuits_page(study, _manifest(directory), place=directory.name)
    drawn = {"circuits.png": to_png(methods_figure(study))}
    if any(row.curves for row in study.methods):
        drawn["areas.png"] = to_png(areas_figure(study))
    return write_files(directory, page, drawn, CIRCUITS_PICTURES)


def circuits_page(study: CircuitStudy, manifest: Manifest | None = None, place: str = "DIR") -> str:
    """The page of a study of circuits as HTML; `place` is how commands call the run's directory.

    Raises InputError when the study has no methods.
    """
    if not study.methods:
        raise InputError(
            "circuits.json: field methods is empty, so there is nothing to show. Run the study again."
        )
    sections = [
        from_circuits.question(study),
        from_circuits.table(study),
        from_circuits.faithfulness(study),
        from_circuits.areas(study),
        from_circuits.overlaps(study),
        from_circuits.findings(study),
        from_circuits.reading(study),
        from_circuits.again(study, manifest, place),
    ]
    title = f"Which scores find a faithful circuit? {study.model}, {study.task}"
    top = lead(title, from_circuits.headline(study), [state(manifest)], from_circuits.tiles(study))
    return document(title, top, sections)


def _manifest(directory: Path) -> Manifest | None:
    return read_manifest(directory) if (directory / MANIFEST).exists() else None


WRITERS: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "edges.json": ("`patchkit edges`", write_edges_report),
    EVALUATION: ("`patchkit evaluate`", write_evaluation_report),
    PATHS: ("`patchkit paths`", write_paths_report),
    SCRUBBING: ("`patchkit study scrubbing`", write_scrubbing_report),
    CIRCUITS: ("`patchkit study circuits`", write_circuits_report),
}
