"""`report` and `rerun`: what can be done with the directory of a run."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from patchkit.cli.console import give, plain_table, results, say
from patchkit.cli.options import (
    Backend,
    GpusPerReplica,
    Host,
    NumProcesses,
    Quiet,
    RemoteConcurrency,
    options_of,
)
from patchkit.errors import InputError, RunError
from patchkit.reading import exists

# Of click, which newer versions of typer carry inside.
_UsageError: Any = typer.BadParameter.__base__
Directory = Annotated[Path, typer.Argument(help="The --out directory of a run.", metavar="DIR")]


def report(directory: Directory, quiet: Quiet = False) -> None:
    """Write the report of a run again, from its files alone."""
    from patchkit.report import write_report

    page = write_report(directory)
    say("The report:", quiet)
    give(str(page))


def rerun(
    ctx: typer.Context,
    directory: Directory,
    out: Annotated[
        Path | None, typer.Option("--out", help="Directory for the new run; default: DIR with -rerun added.")
    ] = None,
    tolerance: Annotated[
        float, typer.Option("--tolerance", min=0, help="Largest difference that passes for the same number.")
    ] = 1e-5,
    backend: Backend = None,
    num_processes: NumProcesses = None,
    gpus_per_replica: GpusPerReplica = None,
    host: Host = None,
    remote_concurrency: RemoteConcurrency = None,
    quiet: Quiet = False,
) -> None:
    """Run the command of a manifest again into a new directory, and compare the numbers."""
    from patchkit.results.compare import compare_runs
    from patchkit.results.manifest import MANIFEST, file_sha256, package_versions, read_manifest

    manifest = read_manifest(directory)
    if manifest.status != "done":
        raise InputError(
            f"{directory}: this run is {manifest.status}, so there are no numbers to compare with; "
            "finish it first, with its own command and --resume."
        )
    first = directory.resolve()
    second = (out or first.with_name(f"{first.name}-rerun")).resolve()
    for option, file in manifest.inputs.items():
        if not exists(Path(file.path)):
            raise InputError(f"{file.path} (--{option} of the run in {directory}) is not there any more.")
        if file_sha256(file.path) != file.sha256:
            raise InputError(
                f"{file.path} (--{option}) has changed since the run in {directory}; "
                "put the old content back, or give a new run its own command."
            )
    here = package_versions()
    changed = [
        f"{name} {old} then, {here.get(name)} now"
        for name, old in manifest.versions.items()
        if here.get(name) != old
    ]
    if changed:
        say(f"Other versions, so numbers may differ: {'; '.join(changed)}", quiet)
    group: Any = ctx.find_root().command
    command = group.get_command(ctx, manifest.command)
    if command is None:
        raise InputError(f"{directory}: made by `patchkit {manifest.command}`, which this version lacks.")
    here_options = {
        "--backend": backend,
        "--num-processes": num_processes,
        "--gpus-per-replica": gpus_per_replica,
        "--host": host,
        "--remote-concurrency": remote_concurrency,
    }
    here_arguments = ["--quiet"] if quiet else []
    for option, value in here_options.items():
        here_arguments += [] if value is None else [option, str(value)]
    options = {**manifest.options, **{option: file.path for option, file in manifest.inputs.items()}}
    if backend == "ndif":
        # Where the first run's model was put here says nothing of one that stays on its host.
        options.pop("device_map", None)
    with _working_directory(Path(manifest.directory)):
        arguments = ["--out", str(second), *here_arguments, *command_arguments(command, options)]
        try:
            again = command.make_context(manifest.command, arguments, parent=ctx.find_root())
        except _UsageError as error:
            raise InputError(
                f"{directory}: the options in its {MANIFEST} are none of `patchkit {manifest.command}`: "
                f"{error.format_message()} Give a new run its own command."
            ) from error
        with again as inner:
            check_options(directory, options, options_of(inner))
            command.invoke(inner)
    differences = compare_runs(first, second)
    table = plain_table("numbers", "largest difference")
    for tensor, difference in differences.items():
        table.add_row(tensor, f"{difference:.3g}")
    results().print(table)
    give(str(second))
    worst = max(differences.values(), default=0.0)
    if not worst <= tolerance:
        raise RunError(f"{second}: the numbers differ from {first} by up to {worst:.3g}, over {tolerance:g}.")
    say(f"The numbers are the same: they differ by at most {worst:.3g}, and {tolerance:g} is allowed.", quiet)


def command_arguments(command: Any, options: dict[str, Any]) -> list[str]:
    """The command line that gives a command these options, but for those that say where it runs.

    InputError for an option it does not know.
    """
    from patchkit.results.manifest import PLACE_OPTIONS

    known = {parameter.name: parameter for parameter in command.params}
    unknown = sorted(options.keys() - known.keys())
    if unknown:
        raise InputError(
            f"`patchkit {command.name}` has no option --{unknown[0].replace('_', '-')} in this version; "
            "install the version that the manifest names."
        )
    named: list[str] = []
    placed: list[str] = []
    for name, value in options.items():
        parameter = known[name]
        if value is None or name in PLACE_OPTIONS:
            continue
        if parameter.param_type_name == "argument":
            placed += [str(item) for item in (value if isinstance(value, list) else [value])]
        elif isinstance(value, bool):
            spelled = parameter.opts if value else parameter.secondary_opts
            named += spelled[:1]
        else:
            for item in value if isinstance(value, list) else [value]:
                named += [parameter.opts[0], str(item)]
    return [*named, *(["--", *placed] if placed else [])]


def check_options(directory: Path, wanted: Mapping[str, Any], read: Mapping[str, Any]) -> None:
    """Raises InputError where an option of a manifest is not read as what stands there, such as 3 for a list of 3."""
    from patchkit.results.manifest import PLACE_OPTIONS, plain

    for name, value in wanted.items():
        found = plain(read[name])
        if name not in PLACE_OPTIONS and (found != value or type(found) is not type(value)):
            raise InputError(
                f"{directory}: --{name.replace('_', '-')} in its manifest: expected {found!r} or another value of that "
                f"kind, found {value!r}. Give a new run its own command."
            )


@contextmanager
def _working_directory(path: Path) -> Iterator[None]:
    """Relative paths in the options mean what they meant then, as long as that directory exists."""
    before = Path.cwd()
    os.chdir(path if path.is_dir() else before)
    try:
        yield
    finally:
        os.chdir(before)
