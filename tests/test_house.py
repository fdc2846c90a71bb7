"""Rules of the house that a linter cannot say: where traces are opened, and what is not written at all."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "patchkit"
SOURCES = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = sorted(path for room in ("scripts", "benchmarks") for path in (ROOT / room).glob("**/*.py"))
LONGEST = 350
TRACE_OPENERS = frozenset({"trace", "session", "invoke"})
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def calls(tree: ast.AST) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def dotted(node: ast.expr) -> str:
    """`torch.load` of the expression torch.load; the last attribute alone where it hangs on another call."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.lineno, node.module
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def opened_traces(tree: ast.AST, openers: frozenset[str] = TRACE_OPENERS) -> list[int]:
    return [
        call.lineno
        for call in calls(tree)
        if isinstance(call.func, ast.Attribute) and call.func.attr in openers
    ]


def prints(tree: ast.AST) -> list[int]:
    return [call.lineno for call in calls(tree) if dotted(call.func) == "print"]


def pickles(tree: ast.AST) -> list[int]:
    modules = [line for line, module in imported(tree) if module.split(".")[0] in PICKLES]
    options = [
        call.lineno
        for call in calls(tree)
        if any(word.arg == "allow_pickle" and not is_constant(word.value, False) for word in call.keywords)
        or dotted(call.func).rsplit(".", 1)[-1] in {"read_pickle", "to_pickle"}
    ]
    return modules + options


def unsafe_loads(tree: ast.AST) -> list[int]:
    aliases = {"torch.load"} | {"load" for _, module in imported(tree) if module == "torch.load"}
    return [
        call.lineno
        for call in calls(tree)
        if dotted(call.func) in aliases
        and not any(word.arg == "weights_only" and is_constant(word.value, True) for word in call.keywords)
    ]


def devices_written_out(tree: ast.AST) -> list[int]:
    """Calls that name a GPU themselves, instead of taking the device of the model or of an option."""
    given = [
        (call.lineno, value.value)
        for call in calls(tree)
        for value in [*call.args, *(word.value for word in call.keywords)]
        if isinstance(value, ast.Constant)
    ]
    return [line for line, value in given if isinstance(value, str) and value.split(":")[0] == "cuda"]


def is_constant(node: ast.expr, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def found(rule: Callable[[ast.AST], list[int]], files: list[Path]) -> list[str]:
    return [
        f"{name(path)}:{line}"
        for path in files
        for line in sorted(rule(ast.parse(path.read_text(encoding="utf-8"))))
    ]


def test_traces_are_opened_in_one_place() -> None:
    outside = [path for path in SOURCES if PACKAGE / "tracing" not in path.parents]
    commands = [path for path in outside if PACKAGE / "cli" in path.parents]
    assert found(opened_traces, [path for path in outside if path not in commands]) == []
    # In the command line's room `invoke` is what runs a command.
    assert found(lambda tree: opened_traces(tree, TRACE_OPENERS - {"invoke"}), commands) == []


def test_the_package_does_not_print() -> None:
    assert found(prints, SOURCES) == []


def test_nothing_is_pickled_but_between_processes_of_one_run() -> None:
    queue = [path for path in SOURCES if name(path) == "patchkit/runtime/queue.py"]
    assert len(found(pickles, queue)) == 1, "the exception is not needed any more"
    assert found(pickles, [path for path in SOURCES + SCRIPTS if path not in queue]) == []


def test_foreign_tensors_are_loaded_as_tensors_only() -> None:
    assert found(unsafe_loads, SOURCES + SCRIPTS) == []


def test_no_device_is_written_out() -> None:
    assert found(devices_written_out, SOURCES) == []


def test_files_hold_one_idea() -> None:
    lengths = {name(path): len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES + SCRIPTS}
    assert {file: length for file, length in lengths.items() if length > LONGEST} == {}


def test_files_open_with_what_they_are_for() -> None:
    undocumented = [
        name(path)
        for path in SOURCES + SCRIPTS
        if ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) is None
    ]
    assert undocumented == []


def test_test_files_have_different_names() -> None:
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize(
    ("rule", "source"),
    [
        (opened_traces, "with model.lm.trace(x):\n    pass"),
        (opened_traces, "with tracer.invoke(x):\n    pass"),
        (prints, "print('x')"),
        (pickles, "import pickle"),
        (pickles, "from dill import dumps"),
        (pickles, "np.load(path, allow_pickle=True)"),
        (pickles, "frame.to_pickle(path)"),
        (unsafe_loads, "torch.load(path)"),
        (unsafe_loads, "torch.load(path, weights_only=False)"),
        (unsafe_loads, "from torch import load\nload(path)"),
        (devices_written_out, "x.to('cuda:0')"),
    ],
)
def test_each_rule_catches_what_it_forbids(rule: Callable[[ast.AST], list[int]], source: str) -> None:
    assert rule(ast.parse(source))


@pytest.mark.parametrize(
    ("rule", "source"),
    [
        (opened_traces, "torch.trace"),
        (prints, "console.print('x')"),
        (pickles, "np.load(path, allow_pickle=False)"),
        (unsafe_loads, "torch.load(path, weights_only=True)"),
        (unsafe_loads, "yaml.load(path)"),
        (devices_written_out, "x.to(model.device)"),
    ],
)
def test_each_rule_lets_the_rest_pass(rule: Callable[[ast.AST], list[int]], source: str) -> None:
    assert not rule(ast.parse(source))
