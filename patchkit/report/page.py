"""`report.html` of a run: one file that needs nothing else, with the pictures also as PNG beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from patchkit.errors import InputError
from patchkit.reading import exists, is_directory, names_in
from patchkit.report import _across_page as across_page
from patchkit.report import _edge_page as edge_page
from patchkit.report import _ioi_page as ioi_page
from patchkit.report import _mask_sections as from_mask
from patchkit.report import _recall_sections as from_recall
from patchkit.report import _scoreboard_page as scoreboard_page
from patchkit.report import _scores_sections as from_scores
from patchkit.report import _scores_words as scores_words
from patchkit.report import _study_sections as from_study
from patchkit.report import plots
from patchkit.report._calibration_plot import calibration_figure
from patchkit.report._document import document, write_files
from patchkit.report._html import escape, paragraph
from patchkit.report._places import check
from patchkit.report._recall_plots import recall_figure
from patchkit.report._scores_plots import scores_figure
from patchkit.report._tokens import check_study
from patchkit.report._words import headline, state, warning
from patchkit.results.manifest import MANIFEST, Manifest, read_manifest
from patchkit.results.mask import MaskResult
from patchkit.results.recall import RecallStudy
from patchkit.results.scores import Scores
from patchkit.results.study import VariableBindingStudy

PICTURES = ("mask.png", "path.png", "attention.png")
SCORES_PICTURES = ("scores.png", "calibration.png")


def write_report(directory: Path | str) -> Path:
    """Writes the report of whatever result `directory` holds and returns the path of `report.html`.

    Raises InputError naming what was expected when it holds no result.
    """
    directory = Path(directory)
    if not is_directory(directory):
        found = "a file" if directory.exists() else "nothing"
        raise InputError(
            f"{directory}: expected the directory of a finished run (its --out), found {found} there."
        )
    for header, (_, writer) in _writers().items():
        if exists(directory / header):
            return writer(directory)
    held = ", ".join(names_in(directory)[:6]) or "nothing"
    known = ", ".join(f"{header} (of {command})" for header, (command, _) in _writers().items())
    raise InputError(
        f"{directory}: expected one of {known}; the directory holds {held}. "
        "Give the --out directory of such a run, after it has finished."
    )


def _writers() -> dict[str, tuple[str, Callable[[Path], Path]]]:
    """File that a finished result has -> the commands that write it, and what writes its report."""
    return {
        "mask.json": ("`patchkit mask` and `patchkit demo`", write_mask_report),
        "scores.json": ("`patchkit patch` and `patchkit attribute`", write_scores_report),
        "recall.json": ("`patchkit study attribution-recall`", write_recall_report),
        **edge_page.WRITERS,
        **ioi_page.WRITERS,
        **scoreboard_page.WRITERS,
        **across_page.WRITERS,
    }


def write_mask_report(directory: Path | str) -> Path:
    """Writes report.html, mask.png, path.png and attention.png from the files of a mask run; returns report.html's path.

    Reads mask.json and mask.safetensors, and study.json and manifest.json where they are. A picture there is
    nothing for (no sparsity path, no attention) is not written, and one left by an earlier report is
    removed. Everything is read and drawn before the first file is written, each by rename. Raises InputError
    for missing, malformed or mismatched files and RunError when writing fails.
    """
    directory = Path(directory)
    result = MaskResult.load(directory)
    study = VariableBindingStudy.load(directory) if (directory / "study.json").exists() else None
    manifest = read_manifest(directory) if (directory / MANIFEST).exists() else None
    page = mask_page(result, study, manifest, place=directory.name)
    drawn = {"mask.png": plots.to_png(plots.mask_figure(result))}
    if result.lambda_path:
        drawn["path.png"] = plots.to_png(plots.path_figure(result))
    if study is not None and study.attention:
        drawn["attention.png"] = plots.to_png(plots.attention_figure(study.attention))
    return write_files(directory, page, drawn, PICTURES)


def write_scores_report(directory: Path | str) -> Path:
    """Writes report.html, scores.png and, where nodes were verified, calibration.png from the files of a `patch` or
    `attribute` run; returns report.html's path.

    Reads what `Scores.load` reads, and manifest.json where it is. Everything is read and drawn before the first file is
    written. Raises InputError for missing or malformed files and RunError when writing fails.
    """
    directory = Path(directory)
    scores = Scores.load(directory)
    manifest = read_manifest(directory) if (directory / MANIFEST).exists() else None
    page = scores_page(scores, manifest, place=directory.name)
    drawn = {"scores.png": plots.to_png(scores_figure(scores))}
    if scores.verification is not None:
        drawn["calibration.png"] = plots.to_png(calibration_figure(scores.verification))
    return write_files(directory, page, drawn, SCORES_PICTURES)


def write_recall_report(directory: Path | str) -> Path:
    """Writes report.html and recall.png of an attribution-recall study; returns report.html's path.

    Reads recall.json, and manifest.json where it is. Raises InputError for malformed files and RunError when writing
    fails.
    """
    directory = Path(directory)
    study = RecallStudy.load(directory)
    manifest = read_manifest(directory) if (directory / MANIFEST).exists() else None
    page = recall_page(study, manifest, place=directory.name)
    return write_files(directory, page, {"recall.png": plots.to_png(recall_figure(study))}, ())


def mask_page(
    result: MaskResult,
    study: VariableBindingStudy | None = None,
    manifest: Manifest | None = None,
    place: str = "DIR",
) -> str:
    """The page as HTML, from the result objects alone; `place` is how the run's directory is called in commands.

    Without a study the sections that need one are left out. Raises InputError when the parts do not fit
    together.
    """
    check(result)
    if study is not None:
        check_study(study)
    sections = [
        from_study.question(study, result) if study else "",
        from_mask.components(result),
        from_mask.desiderata(result),
        from_study.forms(study) if study else "",
        from_mask.path(result),
        from_mask.carried(result),
        from_study.attention(study) if study else "",
        from_mask.own_masks(result),
        from_mask.seeds(result),
        from_study.comparison(study) if study else "",
        from_mask.training(result),
        from_study.notes(result, study),
        from_study.reading(result, manifest),
        from_study.again(study, manifest, place),
    ]
    title = f"{'Variable binding' if study else 'Desiderata mask'} in {result.model}"
    return document(title, _lead(title, result, manifest), sections)


def scores_page(scores: Scores, manifest: Manifest | None = None, place: str = "DIR") -> str:
    """The page of node effects as HTML, from the scores alone; `place` is how commands call the run's directory."""
    sections = [
        from_scores.maps(scores),
        from_scores.table(scores),
        from_scores.verification(scores),
        from_scores.bound(scores),
        from_scores.notes(scores),
        from_scores.reading(scores, manifest),
        from_study.again(None, manifest, place, counted="pairs"),
    ]
    model = f" in {manifest.model.id}" if manifest is not None and manifest.model is not None else ""
    method = scores_words.method_name(scores)
    title = f"Which nodes matter{model}: {method}"
    warned = "".join(
        paragraph(text, "warn") for text in (scores_words.warning(scores), state(manifest)) if text
    )
    lead = (
        f'<h1>{escape(title)}</h1><p class="headline">{escape(scores_words.headline(scores))}</p>'
        f"{warned}{from_scores.tiles(scores)}"
    )
    return document(title, lead, sections)


def recall_page(study: RecallStudy, manifest: Manifest | None = None, place: str = "DIR") -> str:
    """The page of an attribution-recall study as HTML; `place` is how commands call the run's directory.

    Raises InputError when the study has no settings.
    """
    if not study.settings:
        raise InputError(
            "recall.json: field settings is empty, so there is nothing to show. Run the study again."
        )
    sections = [
        from_recall.aggregates(study),
        from_recall.curves(study),
        from_recall.rivals(study),
        from_recall.findings(study),
        from_recall.reading(study),
        from_recall.again(study, manifest, place),
    ]
    title = "How cheaply is each node that matters found?"
    ended = state(manifest)
    lead = (
        f'<h1>{escape(title)}</h1><p class="headline">{escape(from_recall.headline(study))}</p>'
        f"{paragraph(from_recall.beaten(study))}{paragraph(ended, 'warn') if ended else ''}"
    )
    return document(title, lead, sections)


def _lead(title: str, result: MaskResult, manifest: Manifest | None) -> str:
    warnings = "".join(paragraph(text, "warn") for text in (warning(result), state(manifest)) if text)
    return (
        f'<h1>{escape(title)}</h1><p class="headline">{escape(headline(result))}</p>'
        f"{warnings}{from_mask.tiles(result)}"
    )
