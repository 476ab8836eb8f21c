"""Style that is not checked is a wish: names, sizes, frozen surfaces, and what moc must never do."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import moc
from moc import errors
from moc.config import Config

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "moc").rglob("*.py"))
FUNCTION_LINES = 60
FILE_LINES = 400
BANNED_NAMES = re.compile(r"^(handle|process|do)_|(^|_)(utils|helpers|common|misc)($|_)")
PICKLING = {"pickle", "cPickle", "cloudpickle", "dill", "shelve", "marshal"}
EVALUATING = {"eval", "exec", "compile", "__import__", "input", "breakpoint"}
RUNNING = {"code", "codeop", "imp", "runpy", "xmlrpc", "yaml"}
MUTABLE = ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp
WALL_TIME = {"time", "time_ns", "now", "utcnow", "today", "gmtime", "localtime"}
KNOWS_THE_DATE = {  # to show it, or to compare it with when files were written
    "moc/cli/doctor.py",
    "moc/cli/gc.py",
    "moc/cli/ls.py",
    "moc/cli/show.py",
    "moc/doctor/collect.py",
    "moc/doctor/node.py",
    "moc/store/filesystem.py",
    "moc/store/s3.py",
    "moc/trace.py",
}
PICKLES_BY_DESIGN = {"moc/adapters/export/deepspeed.py", "moc/adapters/export/publish.py"}  # DeepSpeed's own format


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_fit_their_limits(path: Path) -> None:
    text = path.read_text()

    assert text.count("\n") <= FILE_LINES
    for function in functions(ast.parse(text)):
        length = (function.end_lineno or 0) - function.lineno + 1
        assert length <= FUNCTION_LINES, f"{function.name} has {length} lines"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_names_come_from_the_vocabulary(path: Path) -> None:
    names = [path.stem, *(function.name for function in functions(ast.parse(path.read_text())))]

    assert [name for name in names if BANNED_NAMES.search(name)] == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_is_pickled_outside_the_deepspeed_export(path: Path) -> None:
    if str(path.relative_to(ROOT)) in PICKLES_BY_DESIGN:
        return
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in PICKLING]
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PICKLING:
            found.append(str(node.module))
        # torch.load and torch.save pickle, and so do the collectives on objects.
        if isinstance(node, ast.Attribute) and (
            (node.attr in ("load", "save") and isinstance(node.value, ast.Name) and node.value.id == "torch")
            or re.fullmatch(r"(all_gather|gather|broadcast|scatter|send|recv)_object(_list)?", node.attr)
        ):
            found.append(ast.unparse(node))

    assert found == []


def test_wall_time_decides_nothing_but_the_age_of_files() -> None:
    """Clocks are set while jobs run: waits, silence, and who comes first go by monotonic time, or by no time at all."""
    found = {
        str(path.relative_to(ROOT))
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in ("time", "datetime", "date")
        and node.attr in WALL_TIME
    }

    assert found == KNOWS_THE_DATE


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_that_is_read_can_become_code(path: Path) -> None:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in EVALUATING:
            found.append(ast.unparse(node))
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in RUNNING]
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in RUNNING:
            found.append(str(node.module))
        # numpy's loader unpickles on request, a shell obeys what is in its arguments.
        for keyword in node.keywords if isinstance(node, ast.Call) else ():
            if keyword.arg in ("shell", "allow_pickle") and not (
                isinstance(keyword.value, ast.Constant) and keyword.value.value is False
            ):
                found.append(ast.unparse(node))

    assert found == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_modules_hold_no_mutable_state(path: Path) -> None:
    mutable = []
    for node in ast.parse(path.read_text()).body:
        value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
        targets = [*getattr(node, "targets", ()), *([node.target] if isinstance(node, ast.AnnAssign) else [])]
        for target in targets:
            # A constant in capitals is a table that nobody writes to.
            is_constant = isinstance(target, ast.Name) and (target.id.lstrip("_").isupper() or target.id == "__all__")
            if isinstance(value, MUTABLE) and not is_constant:
                mutable.append(ast.unparse(target))

    assert mutable == []


def test_public_names_are_frozen() -> None:
    assert moc.__all__ == ["CheckpointManager", "Config", "MocError", "__version__"]


def test_the_manager_keeps_its_public_methods() -> None:
    manager = moc.CheckpointManager

    public = sorted(name for name in vars(manager) if not name.startswith("_"))
    lines = inspect.getsource(sys.modules[manager.__module__]).count("\n")

    assert public == [
        "attach",
        "detach",
        "incarnation",
        "recovery",
        "register_routing",
        "run_id",
        "save",
        "status",
        "step",
    ]
    assert lines <= 250


def test_config_has_these_twelve_settings_and_no_more() -> None:
    names = [field.name for field in dataclasses.fields(Config)]

    assert names == [
        "snapshot_every",
        "persist_every",
        "k_snapshot",
        "k_persist",
        "mode",
        "versions",
        "replicas",
        "keep_last",
        "keep_every",
        "memory_budget_bytes",
        "timeout_s",
        "plt_limit",
    ]


def test_every_error_has_a_class_that_a_caller_can_act_on() -> None:
    groups = (
        errors.UsageError,
        errors.StorageError,
        errors.IntegrityError,
        errors.CoordinationError,
        errors.SaveFailedError,
        errors.NoCheckpointError,
        errors.InternalError,
    )

    for name in errors.__all__:
        error = getattr(errors, name)
        assert error is errors.MocError or issubclass(error, groups), name


def test_listing_a_local_repository_imports_no_torch() -> None:
    heavy = "{'torch', 'deepspeed', 's3fs', 'fsspec', 'aiohttp'}"
    code = f"import sys, moc.cli.main as m; m.main(['ls', '-r', 'absent']); print(sorted({heavy} & set(sys.modules)))"

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)

    assert done.stdout.strip().endswith("[]"), done.stdout + done.stderr
