"""Every span is documented, and every one is a place where a process is killed in a test, or has a reason not to be."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from tests.support.spans import AGENT, ELSEWHERE, FORCED, TRAINER

ROOT = Path(__file__).resolve().parents[2]
ROW = re.compile(r"(?m)^\| `(?P<span>[a-z_]+\.[a-z_]+)` \| (?P<process>[^|]+) \| (?P<covers>[^|]+) \|$")


def _spans_in_code() -> set[str]:
    found = set()
    for path in sorted((ROOT / "moc").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "span":
                first = node.args[0]
                assert isinstance(first, ast.Constant), f"a span's name is a literal: {path}:{node.lineno}"
                found.add(str(first.value))
    return found


def _spans_in_docs() -> list[str]:
    return [match["span"] for match in ROW.finditer((ROOT / "docs/operations.md").read_text())]


def test_the_table_of_spans_lists_those_of_the_code_and_no_others() -> None:
    documented = _spans_in_docs()

    assert sorted(documented) == sorted(set(documented))
    assert set(documented) == _spans_in_code()


def test_at_every_span_a_process_is_killed_in_a_test_or_there_is_a_reason_why_not() -> None:
    killed = {*TRAINER, *AGENT, *FORCED}

    assert killed | set(ELSEWHERE) == set(_spans_in_docs())
    assert not killed & set(ELSEWHERE)
