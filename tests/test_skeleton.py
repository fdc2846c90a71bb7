"""What pyproject.toml promises is what the code imports, what constraints.txt pins and what is installed."""

from __future__ import annotations

import ast
import re
import sys
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DEPENDENCIES: dict[str, Requirement] = {
    canonicalize_name(item.name): item for item in map(Requirement, PROJECT["dependencies"])
}
EXTRAS: dict[str, dict[str, Requirement]] = {
    extra: {canonicalize_name(item.name): item for item in map(Requirement, lines)}
    for extra, lines in PROJECT["optional-dependencies"].items()
}


def constraints() -> dict[str, Requirement]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    items = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(item.name): item for item in items}


def third_party(paths: list[Path]) -> set[str]:
    """Top-level modules that files import from outside the standard library and this repository."""
    beside = [path.stem for room in ("scripts", "benchmarks") for path in (ROOT / room).glob("*.py")]
    ours = {"patchkit", "tests", *beside}
    modules = set()
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                modules.add(node.module.split(".")[0])
    return {module for module in modules if module not in ours | set(sys.stdlib_module_names)}


def distributions(modules: set[str]) -> set[str]:
    known = packages_distributions()
    return {canonicalize_name(known.get(module, [module])[0]) for module in modules}


def server_packages() -> set[str]:
    files = [ROOT / "tests" / "remote" / "server" / name for name in ("requirements.txt", "apart.txt")]
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    return {canonicalize_name(Requirement(line).name) for line in lines if line and not line.startswith("#")}


def test_python_versions_agree() -> None:
    supported = SpecifierSet(PROJECT["requires-python"])
    named = {line.rsplit(" ", 1)[1] for line in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", line)}
    assert named == {minor for minor in (f"3.{n}" for n in range(8, 20)) if supported.contains(f"{minor}.0")}
    assert named == {"3.10", "3.11", "3.12", "3.13"}


def test_every_import_of_the_package_is_declared() -> None:
    used = distributions(third_party(sorted((ROOT / "patchkit").rglob("*.py"))))
    assert used - DEPENDENCIES.keys() == set()


def test_every_import_of_the_tests_and_scripts_is_declared() -> None:
    files = [path for room in ("tests", "scripts", "benchmarks") for path in (ROOT / room).rglob("*.py")]
    # What runs in the environment of NDIF's server is installed there, and nowhere else.
    there = [path for path in files if ROOT / "tests" / "remote" / "server" in path.parents]
    # A benchmark may import a peer.
    known = DEPENDENCIES.keys() | EXTRAS["dev"].keys() | EXTRAS["peers"].keys()
    assert distributions(third_party([path for path in files if path not in there])) - known == set()
    assert distributions(third_party(there)) - known - server_packages() == set()


def test_nnsight_is_pinned_to_the_series_whose_internals_are_used() -> None:
    assert str(DEPENDENCIES["nnsight"].specifier) in {"<0.9,>=0.8.1", ">=0.8.1,<0.9"}


@pytest.mark.parametrize("name", sorted(DEPENDENCIES.keys() | EXTRAS["dev"].keys()))
def test_constraints_pin_each_dependency_inside_its_range(name: str) -> None:
    requirement = DEPENDENCIES.get(name) or EXTRAS["dev"][name]
    if requirement.marker and not requirement.marker.evaluate():
        pytest.skip("not installed on this Python")
    pin = constraints()[name]
    (clause,) = pin.specifier
    assert clause.operator == "=="
    assert requirement.specifier.contains(clause.version)


def test_torch_is_pinned_plainly_and_as_the_makefile_installs_it() -> None:
    pin = str(constraints()["torch"])
    assert pin == "torch==2.13.0"
    assert f" {pin}\n" in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_ranges_have_both_ends() -> None:
    for requirement in DEPENDENCIES.values():
        operators = {clause.operator for clause in requirement.specifier}
        assert operators == {">=", "<"}, requirement


def test_the_installed_version_is_the_declared_one() -> None:
    assert version("patchkit") == PROJECT["version"]


def test_the_console_script_exists() -> None:
    module, function = PROJECT["scripts"]["patchkit"].split(":")
    imported = __import__(module, fromlist=[function])
    assert callable(getattr(imported, function))


@pytest.mark.parametrize(
    "file", ["README.md", "LICENSE", "CITATION.cff", "CONTRIBUTING.md", "CHANGELOG.md", "constraints.txt"]
)
def test_the_papers_of_the_project_are_there(file: str) -> None:
    assert (ROOT / file).stat().st_size > 100


def test_version_is_the_same_everywhere() -> None:
    number = PROJECT["version"]
    assert f"\nversion: {number}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"## {number}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_license_is_mit() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert text.startswith("MIT License") and "The patchkit authors" in text and PROJECT["license"] == "MIT"


@pytest.mark.parametrize("target", ["demo", "test", "test-slow", "test-remote", "lint", "bench", "clean"])
def test_the_makefile_has_its_targets(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


def test_ci_can_be_run() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    assert "set -euo pipefail" in script.read_text(encoding="utf-8")


def test_types_are_checked_in_every_room_but_the_command_line() -> None:
    options = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pytest"][
        "ini_options"
    ]
    (option,) = [item for item in options["addopts"] if item.startswith("--jaxtyping-packages=")]
    *packages, checker = option.partition("=")[2].split(",")
    rooms = {f"patchkit.{path.parent.name}" for path in (ROOT / "patchkit").glob("*/__init__.py")}
    assert rooms - set(packages) == {"patchkit.cli"} and checker == "beartype.beartype"
