"""Compare two checkpoints: topology, versions, small state, and every tensor.

A and B are steps, STEP-ATTEMPTs or names, as for 'moc show'; B may be in
another repository (--other). Tensors are compared by their stored checksums,
so no data are read; where the shards are cut differently (other numbers of
ranks) that cannot tell, and --read-data does. It also counts the elements that
differ and gives the largest absolute difference.

JSON: {"a": NAME, "b": NAME, "is_equal": bool or null (unknown), "facts":
[{"name", "a", "b"}] that differ, "shared_objects": int, "shared_bytes": int,
"parts": {part: COUNTS}, "layers": {layer: COUNTS}, "tensors": [{"tensor",
"part", "dtype", "expert": [layer, index] or null, "verdict", "elements",
"differing", "max_abs"}] not equal, "state": [{"rank", "path", "a", "b"}] that
differ, "state_values": int, "experts": {"a": ROWS, "b": ROWS}, "staleness":
{"a": {...}, "b": {...}} as in 'moc show'} with NAME and ROWS as in 'moc show'
and COUNTS {"equal", "different", "unknown", "differing", "max_abs"}; null where
not computed

Exit codes: 0 compared (with --exit-code: 0 equal, 1 different or unknown), 3 no
such checkpoint, 4 a checkpoint is corrupt, 5 storage unavailable, 6 other
format.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable

from moc.cli.choose import choose, read_catalogue
from moc.cli.exits import FAILURE, OK
from moc.cli.experts import Steps, expert_map, experts_json, staleness_facts, staleness_json
from moc.cli.options import add_json, add_repository, opened
from moc.cli.output import describe_bytes, name_json, print_facts, print_json, print_map, print_table, progress_bar, say
from moc.diff import (
    DIFFERENT,
    EQUAL,
    UNKNOWN,
    CheckpointDiff,
    Side,
    TensorDiff,
    compare_checkpoints,
    layer_of,
    open_side,
    read_differences,
)
from moc.format.contents import expert_steps
from moc.repository import Repository

__all__ = ["configure", "run"]

SHOWN_VALUES = 20  # of the small state; --json has all
VALUE_COLUMNS = 27  # two of them and a path fit 80


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", metavar="A", help="step, STEP-ATTEMPT or name")
    parser.add_argument("b", metavar="B", help="the same")
    parser.add_argument("--other", metavar="URL", help="the repository of B (default: that of A)")
    parser.add_argument("--read-data", action="store_true", help="read what is not known to be equal")
    parser.add_argument("--tensors", action="store_true", help="list every tensor that is not equal")
    parser.add_argument("--exit-code", action="store_true", help="exit with 1 unless they are equal")
    add_repository(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(opened(args))
        other = argparse.Namespace(repo=args.repo if args.other is None else args.other)
        second = first if args.other is None else stack.enter_context(opened(other))
        a, b = _side(first, args.a), _side(second, args.b)
        diff = compare_checkpoints(a, b)
        if args.read_data:
            with progress_bar("diff", diff.unequal_bytes) as progress:
                diff = read_differences(diff, a, b, progress)
    if args.json:
        print_json(_to_json(diff, a, b))
    else:
        _print_diff(diff, with_tensors=args.tensors)
        for name, side in (("A", a), ("B", b)):
            _print_experts(name, side)
    return FAILURE if args.exit_code and not diff.is_equal else OK


def _side(repository: Repository, text: str) -> Side:
    return open_side(repository, repository.read_manifest(choose(read_catalogue(repository), text).name))


def _counts(tensors: list[TensorDiff]) -> dict[str, object]:
    read = [t.differing for t in tensors if t.differing is not None]
    apart = [t.max_abs for t in tensors if t.max_abs is not None]
    verdicts = [t.verdict for t in tensors]
    return {
        "equal": verdicts.count(EQUAL),
        "different": len(verdicts) - verdicts.count(EQUAL) - verdicts.count(UNKNOWN),
        "unknown": verdicts.count(UNKNOWN),
        "differing": sum(read) if read else None,
        "max_abs": max(apart, default=None),
    }


def _grouped(diff: CheckpointDiff, group: Callable[[TensorDiff], str]) -> dict[str, dict[str, object]]:
    members: dict[str, list[TensorDiff]] = {}
    for tensor in diff.tensors:
        members.setdefault(group(tensor), []).append(tensor)
    return {name: _counts(tensors) for name, tensors in members.items()}


def _steps(side: Side) -> Steps:
    return expert_steps(side.manifest, side.headers)


def _to_json(diff: CheckpointDiff, a: Side, b: Side) -> dict[str, object]:
    sides = {"a": (diff.a, _steps(a)), "b": (diff.b, _steps(b))}
    return {
        "a": name_json(diff.a.name),
        "b": name_json(diff.b.name),
        "is_equal": diff.is_equal,
        "facts": [{"name": name, "a": a, "b": b} for name, a, b in diff.facts],
        "shared_objects": diff.shared_objects,
        "shared_bytes": diff.shared_bytes,
        "parts": _grouped(diff, lambda tensor: tensor.part),
        "layers": _grouped(diff, layer_of),
        "tensors": [
            {
                "tensor": t.tensor,
                "part": t.part,
                "dtype": t.dtype,
                "expert": None if t.expert is None else list(t.expert),
                "verdict": t.verdict,
                "elements": t.elements,
                "differing": t.differing,
                "max_abs": t.max_abs,
            }
            for t in diff.tensors
            if t.verdict != EQUAL
        ],
        "state": [{"rank": s.rank, "path": s.path, "a": s.a, "b": s.b} for s in diff.state],
        "state_values": diff.state_values,
        "experts": {name: experts_json(steps) for name, (_, steps) in sides.items()},
        "staleness": {name: staleness_json(manifest, steps) for name, (manifest, steps) in sides.items()},
    }


def _print_diff(diff: CheckpointDiff, *, with_tensors: bool) -> None:
    verdict = {True: "equal", False: "different", None: "unknown: --read-data tells"}[diff.is_equal]
    shared = f"{diff.shared_objects} objects, {describe_bytes(diff.shared_bytes)}"
    facts = [("A", str(diff.a.name)), ("B", str(diff.b.name)), ("verdict", verdict), ("shared", shared)]
    facts += [(name, f"{_short(a)} | {_short(b)}") for name, a, b in diff.facts]
    facts.append(("state", f"{len(diff.state)} of {diff.state_values} values differ"))
    print_facts(facts)
    if diff.state:
        print()
        rows = [(str(s.rank), s.path, _short(s.a), _short(s.b)) for s in diff.state[:SHOWN_VALUES]]
        print_table(("RANK", "STATE", "A", "B"), rows, left=frozenset({"STATE", "A", "B"}))
        if len(diff.state) > SHOWN_VALUES:
            say(f"moc diff: {len(diff.state) - SHOWN_VALUES} more values of the state differ: --json lists all")
    _print_counts("PART", _grouped(diff, lambda tensor: tensor.part))
    _print_counts("LAYER", _grouped(diff, layer_of))
    if with_tensors:
        cells = [
            (f"{t.part}/{t.tensor}", t.verdict, str(t.elements), _known(t.differing), _number(t.max_abs))
            for t in diff.tensors
            if t.verdict != EQUAL
        ]
        if cells:
            print()
            print_table(("TENSOR", "IS", "ELEMENTS", "DIFFER", "MAX"), cells, left=frozenset({"TENSOR", "IS"}))


def _print_experts(name: str, side: Side) -> None:
    lines = expert_map(side.manifest, _steps(side))
    if lines:
        print()
        facts = staleness_facts(side.manifest, _steps(side))
        print_facts([("experts", f"of {name}, step {side.manifest.name.step}"), *facts])
        print_map(lines)


def _print_counts(title: str, groups: dict[str, dict[str, object]]) -> None:
    print()
    rows = [
        (
            name,
            *(str(counts[kind]) for kind in (EQUAL, DIFFERENT, UNKNOWN)),
            _known(counts["differing"]),
            _number(counts["max_abs"]),
        )
        for name, counts in groups.items()
    ]
    print_table((title, "EQUAL", "DIFFERENT", "UNKNOWN", "ELEMENTS", "MAX"), rows, left=frozenset({title}))


def _known(value: object) -> str:
    return "-" if value is None else str(value)


def _number(value: object) -> str:
    return "-" if value is None else f"{value:.3g}"


def _short(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"), default=str)
    return text if len(text) <= VALUE_COLUMNS else text[: VALUE_COLUMNS - 3] + "..."
