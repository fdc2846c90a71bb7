"""The command line: every command parses, calls one function and prints what it returns."""

from __future__ import annotations

from patchkit.cli import (
    catalogue,
    compare,
    doctor,
    edges,
    evaluate,
    generalise,
    masks,
    nodes,
    paths,
    plan,
    recommend,
    runs,
    study,
)
from patchkit.cli.app import app as app

app.command("demo")(study.demo)
app.command("models")(catalogue.models)
app.command("tasks")(catalogue.tasks)
app.command("pairs")(catalogue.pairs)
app.command("patch")(nodes.patch)
app.command("attribute")(nodes.attribute)
app.command("mask")(masks.mask)
app.command("edges")(edges.edges)
app.command("paths")(paths.paths)
app.command("evaluate")(evaluate.evaluate)
app.command("compare")(compare.compare)
app.command("generalise")(generalise.generalise)
app.command("plan", context_settings={"ignore_unknown_options": True, "allow_extra_args": True})(plan.plan)
app.command("recommend")(recommend.recommend)
app.command("study")(study.study)
app.command("report")(runs.report)
app.command("rerun")(runs.rerun)
app.command("doctor")(doctor.doctor)


def main() -> None:
    """Entry point of the console script; exits with 0 done, 1 failure, 2 bad input, 130 interrupted."""
    app(prog_name="patchkit")
