"""The pages of a comparison of two models and of generalisation over prompts, and their files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from patchkit.errors import InputError
from patchkit.report import _comparison_sections as from_comparison
from patchkit.report import _generalisation_sections as from_generalisation
from patchkit.report import _study_sections as from_study
from patchkit.report._canvas import to_png
from patchkit.report._comparison_plots import across_maps, gap_figure
from patchkit.report._document import document, lead, write_files
from patchkit.report._generalisation_sections import generalisation_figure
from patchkit.report._matrix_plot import matrix_figure
from patchkit.report._words import state
from patchkit.results.comparison import COMPARISON, Comparison
from patchkit.results.generalisation import GENERALISATION, Generalisation
from patchkit.results.manifest import MANIFEST, Manifest, read_manifest


def write_comparison_report(directory: Path | str) -> Path:
    """Writes report.html, across.png and gap.png of a comparison; returns report.html's path.

    Raises InputError for missing or malformed files and RunError when writing fails.
    """
    directory = Path(directory)
    found = Comparison.load(directory)
    page = comparison_page(found, _manifest(directory), place=directory.name)
    maps, rows = across_maps(found)
    drawn = {
        "across.png": to_png(matrix_figure(maps, rows, down="layer")),
        "gap.png": to_png(gap_figure(found)),
    }
    return write_files(directory, page, drawn, ())


def comparison_page(found: Comparison, manifest: Manifest | None = None, place: str = "DIR") -> str:
    """The page of a comparison as HTML; `place` is how commands call the run's directory.

    Raises InputError when it lacks a model, circuits, or nodes that were put across.
    """
    for name, held in (
        ("models", len(found.models) == 2),
        ("circuits", found.circuits and found.overlaps),
        ("across", len(found.across) == 2 and all(each.nodes and each.groups for each in found.across)),
    ):
        if not held:
            raise InputError(f"{COMPARISON}: field {name} lacks one of the two models. Compare them again.")
    sections = [
        from_comparison.question(found),
        from_comparison.told(found),
        from_comparison.behaviour(found),
        from_comparison.circuits(found),
        from_comparison.overlaps(found),
        from_comparison.across(found),
        from_comparison.groups(found),
        from_comparison.desiderata(found),
        from_comparison.protocol(found),
        from_study.again(None, manifest, place, counted="pairs"),
    ]
    title = f"{found.models[0].model} and {found.models[1].model}: what changed, and where?"
    top = lead(title, from_comparison.headline(found), [state(manifest)], from_comparison.tiles(found))
    return document(title, top, sections)


def write_generalisation_report(directory: Path | str) -> Path:
    """Writes report.html and generalisation.png, of the largest size; returns report.html's path.

    Raises InputError for missing or malformed files and RunError when writing fails.
    """
    directory = Path(directory)
    found = Generalisation.load(directory)
    page = generalisation_page(found, _manifest(directory), place=directory.name)
    drawn = {"generalisation.png": to_png(generalisation_figure(found, found.sizes[-1]))}
    return write_files(directory, page, drawn, ())


def generalisation_page(found: Generalisation, manifest: Manifest | None = None, place: str = "DIR") -> str:
    """The page of generalisation as HTML; `place` is how commands call the run's directory.

    Raises InputError when it has no sets or sizes.
    """
    for name, held in (("sets", found.sets), ("sizes", found.sizes)):
        if not held:
            raise InputError(
                f"{GENERALISATION}: field {name} is empty, so there is nothing to show. Run it again."
            )
    sections = [
        from_generalisation.told(found),
        from_generalisation.matrices(found),
        from_generalisation.overlaps(found),
        from_generalisation.sets(found),
        from_generalisation.protocol(found),
        from_study.again(None, manifest, place, counted="pairs"),
    ]
    title = f"How far do circuits of {found.model} generalise?"
    top = lead(
        title, from_generalisation.headline(found), [state(manifest)], from_generalisation.tiles(found)
    )
    return document(title, top, sections)


def _manifest(directory: Path) -> Manifest | None:
    return read_manifest(directory) if (directory / MANIFEST).exists() else None


WRITERS: dict[str, tuple[str, Callable[[Path], Path]]] = {
    COMPARISON: ("`patchkit compare`", write_comparison_report),
    GENERALISATION: ("`patchkit generalise`", write_generalisation_report),
}
