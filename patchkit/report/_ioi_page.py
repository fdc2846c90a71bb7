"""The page of the IOI study and its pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from patchkit.errors import InputError
from patchkit.report import _circuit_tests_sections as from_tests
from patchkit.report import _ioi_sections as from_ioi
from patchkit.report import _ioi_tables as tables
from patchkit.report._canvas import to_png
from patchkit.report._circuit_tests_plots import repair_figure
from patchkit.report._document import document, write_files
from patchkit.report._evaluation_sections import belief
from patchkit.report._html import arrows, paragraph
from patchkit.report._ioi_plots import attention_maps, stages_figure
from patchkit.report._matrix_plot import matrix_figure
from patchkit.report._words import state
from patchkit.results.ioi import IOI, IoiStudy
from patchkit.results.manifest import MANIFEST, Manifest, read_manifest

PICTURES = ("stages.png", "heads.png", "repair.png")


def write_ioi_report(directory: Path | str) -> Path:
    """Writes report.html and the pictures of an IOI study into its directory; returns report.html's path.

    Reads ioi.json, and manifest.json where it is. Raises InputError for malformed files and RunError when writing fails.
    """
    directory = Path(directory)
    study = IoiStudy.load(directory)
    manifest = read_manifest(directory) if (directory / MANIFEST).exists() else None
    page = ioi_page(study, manifest, place=directory.name)
    return write_files(directory, page, _pictures(study), PICTURES)


def ioi_page(study: IoiStudy, manifest: Manifest | None = None, place: str = "DIR") -> str:
    """The page as HTML, from the study alone; `place` is how commands call the run's directory.

    Raises InputError when the study names no heads, or an attention example does not fit its tokens.
    """
    check(study)
    sections = [
        from_ioi.question(study),
        from_ioi.found(study),
        from_ioi.picture(study),
        tables.classes(study),
        tables.heads(study),
        from_ioi.maps(study),
        from_ioi.attention(study),
        belief(study.evaluation),
        from_tests.completeness(study.evaluation),
        from_tests.minimality(study.evaluation),
        from_tests.random(study.evaluation),
        tables.protocols(study),
        from_tests.repair(study.evaluation),
        tables.comparison(study),
        from_ioi.notes(study),
        from_ioi.reading(study),
        from_ioi.again(study, manifest, place),
    ]
    title = f"How does {study.model} find the indirect object?"
    warned = "".join(paragraph(text, "warn") for text in (*from_ioi.warnings(study), state(manifest)) if text)
    lead = f'<h1>{arrows(title)}</h1><p class="headline">{arrows(from_ioi.headline(study))}</p>{warned}'
    return document(title, lead + from_ioi.tiles(study), sections)


def check(study: IoiStudy) -> None:
    """Refuses a study that names no heads, or whose attention does not fit its tokens (InputError naming the field)."""
    if not study.heads:
        raise InputError(f"{IOI}: field heads is empty, so there is nothing to show. Run the study again.")
    for place, example in enumerate(study.attention):
        if len(example.weights) != len(example.tokens) or not 0 <= example.query < len(example.tokens):
            raise InputError(
                f"{IOI}: field attention[{place}]: expected {len(example.tokens)} weights, one per token, and a query "
                f"among them, found {len(example.weights)} and query {example.query}. Run the study again."
            )


def _pictures(study: IoiStudy) -> dict[str, bytes]:
    layers = [str(layer) for layer in range(len(attention_maps(study)[0].cells))]
    drawn = {
        "heads.png": to_png(
            matrix_figure(
                attention_maps(study),
                layers,
                down="layer",
                outline="in the circuit",
                percent=True,
                widest=0.3,
            )
        )
    }
    if study.groups:
        drawn["stages.png"] = to_png(stages_figure(study))
    repair = study.evaluation.repair
    if repair is not None and repair.nodes:
        drawn["repair.png"] = to_png(repair_figure(repair, study.convention.metric, -1))
    return drawn


WRITERS: dict[str, tuple[str, Callable[[Path], Path]]] = {IOI: ("`patchkit study ioi`", write_ioi_report)}
