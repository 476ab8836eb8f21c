"""Reads the fields of a model from a file: JSON, or the plain part of YAML that such a file needs.

Plain means: one `name: value` per line, values that are numbers, true, false or text, comments, and mappings one level
deeper by indentation. A parser of all of YAML could build objects, which nothing that moc reads may do.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from moc.errors import UsageError

__all__ = ["read_fields"]

LINE = re.compile(r"(?P<indent> *)(?P<name>[A-Za-z_]\w*):(?: +(?P<value>.*?))? *")
COMMENT = re.compile(r"(^|\s)#.*$")

Fields = dict[str, object]


def read_fields(path: str) -> Fields:
    """Return the mapping of a file; raises UsageError naming the file and the line."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        fields = json.loads(text) if path.endswith(".json") else _plain_yaml(text, path)
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"cannot read the model: file={path} reason={' '.join(str(error).split())}") from error
    if not isinstance(fields, dict):
        raise UsageError(f"a model file holds one mapping of fields: file={path} given={type(fields).__name__}")
    return fields


def _plain_yaml(text: str, path: str) -> Fields:
    fields: Fields = {}
    inner: Fields | None = None
    for number, line in enumerate(text.splitlines(), start=1):
        content = COMMENT.sub("", line).rstrip()
        if content in ("", "---"):
            continue
        match = LINE.fullmatch(content)
        target = inner if match and match["indent"] else fields
        if match is None or target is None or match["name"] in target:
            raise UsageError(
                f"cannot read a line of the model: file={path} line={number} given={line.strip()!r} "
                "allowed='name: value' once per name, one level of indentation, or JSON in a file *.json"
            )
        nested: Fields = {}
        target[match["name"]] = _scalar(match["value"]) if match["value"] else nested
        if target is fields:
            inner = None if match["value"] else nested
    return fields


def _scalar(text: str) -> object:
    if re.fullmatch(r"[+-]?\d{1,18}", text):
        return int(text)
    quoted = re.fullmatch(r"\"([^\"\\]*)\"|'([^'\\]*)'", text)
    if quoted:
        return quoted[1] if quoted[1] is not None else quoted[2]
    return {"true": True, "false": False}.get(text, text)
