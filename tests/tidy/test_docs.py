"""What the documents promise exists: tests that prove a row, files that a page names."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from moc.cli.main import VERBS

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
FAILURE_MODEL = (ROOT / "docs" / "failure-model.md").read_text()
NAMED = re.compile(r"`([^`]*test_[^`]*)`")


def _rows() -> list[tuple[str, str]]:
    """Return the first and the last cell of every row of the table of failures."""
    rows = [line.strip("|").split("|") for line in FAILURE_MODEL.splitlines() if line.startswith("| ")]
    return [
        (cells[0].strip(), cells[-1].strip()) for cells in rows if len(cells) == 4 and cells[0].strip() != "failure"
    ]


@cache
def _functions(path: Path) -> frozenset[str]:
    return frozenset(node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef))


@pytest.mark.parametrize(("failure", "proof"), _rows(), ids=[failure[:50] for failure, _ in _rows()])
def test_every_failure_is_proved_by_tests_that_exist(failure: str, proof: str) -> None:
    names = NAMED.findall(proof)

    assert names, f"{failure}: no test is named in {proof!r}"
    path = TESTS
    for name in names:
        file, _, function = name.partition("::")
        path = TESTS / file if file else path  # `::test_x` belongs to the file before it
        assert path.is_file(), f"{failure}: no such file {file}"
        assert not function or function.split("[")[0] in _functions(path), f"{failure}: no such test {name}"


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_every_test_that_a_page_names_exists(page: Path) -> None:
    path, missing = TESTS, []
    for name in NAMED.findall(page.read_text()):
        file, _, function = name.removeprefix("tests/").partition("::")
        if " " in name or not ("/" in file or function):
            continue  # a command, or a word of the text
        path = TESTS / file if file else path
        if not path.is_file() or (function and function.split("[")[0] not in _functions(path)):
            missing.append(name)

    assert missing == []


def test_the_table_of_failures_is_found() -> None:
    assert len(_rows()) > 30


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())

    missing = [target for target in targets if not (page.parent / target).exists()]

    assert missing == []


@pytest.mark.parametrize("page", ["README.md", "docs/operations.md"])
def test_every_verb_of_the_command_is_shown(page: str) -> None:
    text = (ROOT / page).read_text()

    missing = [verb for verb in VERBS if not re.search(rf"\bmoc {verb}\b", text)]

    assert missing == []


@pytest.mark.parametrize(("page", "form"), [("CONTRIBUTING.md", "moc/{}"), ("docs/architecture.md", "moc.{}")])
def test_every_module_has_its_place_in_the_tour_and_in_the_layers(page: str, form: str) -> None:
    text = (ROOT / page).read_text()
    text = re.sub(r"moc/\{([^}]*)\}", lambda match: " ".join(f"moc/{name}" for name in match[1].split(",")), text)
    modules = {
        path.stem for path in (ROOT / "moc").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }

    missing = [
        name for name in sorted(modules - {"__init__"}) if not re.search(rf"{re.escape(form.format(name))}(?!\w)", text)
    ]

    assert missing == []
