"""The stub that mypy reads names the same functions and parameters as the extension module."""

import ast
from pathlib import Path

import pytest

import moc
from moc import _native

STUB = ast.parse((Path(moc.__file__).parent / "_native.pyi").read_text(encoding="utf-8"))
FUNCTIONS = {node.name: node for node in STUB.body if isinstance(node, ast.FunctionDef)}


def shape(function: ast.FunctionDef) -> tuple[list[str], list[str], int]:
    arguments = function.args
    required = len(arguments.args) - len(arguments.defaults)
    return [arg.arg for arg in arguments.args], [arg.arg for arg in arguments.kwonlyargs], required


def test_stub_lists_all_functions() -> None:
    found = {name for name in dir(_native) if callable(getattr(_native, name)) and not name.startswith("__")}

    assert set(FUNCTIONS) == found


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_stub_has_the_parameters_of_the_function(name: str) -> None:
    # The extension writes each signature, in Python's notation, as the first line of the docstring.
    signature = getattr(_native, name).__doc__.splitlines()[0]
    (actual,) = ast.parse(f"def {signature}: ...").body

    assert isinstance(actual, ast.FunctionDef)
    assert shape(FUNCTIONS[name]) == shape(actual)
