"""Partial checkpoints in the verbs: which step every expert comes from, as rows for programs and a map for people."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moc.cli.experts import COLUMNS, LEVELS, LINES, expert_map, if_restored, staleness_facts, staleness_json
from moc.format.keys import CheckpointName
from moc.format.manifest import Manifest
from moc.format.stale import StaleExpert
from moc.routing import BEFORE_DROPS, Routing
from moc.state import Expert
from moc.store.local import LocalStore
from tests.cli.console import moc, moc_json
from tests.support.repository import build_partial_history, tensor_bytes

MAP = """\
    layer experts 0-3, and the routes lost if restored
        0 .321     6.2k
        1 1.32       5k
          . step 40, 1 step 28, 2 step 20, 3 step 10
"""
STEPS = {0: [40, 10, 20, 28], 1: [28, 40, 10, 20]}
NAME = CheckpointName(run="run-7", incarnation=1, step=1000, attempt="000000aa")


@pytest.fixture(scope="module")
def partial(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a repository of partial checkpoints whose newest is of step 40."""
    root = tmp_path_factory.mktemp("partial") / "repository"
    build_partial_history(LocalStore(root), last_step=40)
    return root


def test_show_restore_and_diff_draw_where_experts_come_from(partial: Path, tmp_path: Path) -> None:
    shown = moc("show", "-r", partial)
    restored = moc("restore", "-r", partial, "--to", tmp_path / "copy")
    compared = moc("diff", "10", "40", "-r", partial)

    for result in (shown, restored, compared):
        assert (result.returncode, result.stderr) == (0, "")
        assert MAP in result.stdout
        assert "6 of 8 experts, the oldest 30 steps, on average 15.5" in result.stdout
        assert "PLT" in result.stdout
        assert "12.5 %, 47.5 % if restored (routes counted: kept)" in result.stdout
        assert max(map(len, result.stdout.replace(str(tmp_path), "").splitlines())) <= COLUMNS
    assert compared.stdout.count("layer experts") == 1, "A is whole"
    assert moc("verify", "--read-data", "-r", tmp_path / "copy").returncode == 0


def test_rows_for_programs(partial: Path, tmp_path: Path) -> None:
    rows = [{"layer": layer, "steps": steps} for layer, steps in STEPS.items()]
    staleness = {
        "oldest_step": 10,
        "mean_steps_behind": 15.5,
        "plt": 0.125,
        "plt_if_restored": 0.475,
        "lost_if_restored": [6200, 5000],  # of 100 routes a step; the first expert has lost 2000 already
    }

    shown = moc_json("show", "-r", partial)
    whole = moc_json("show", "10", "-r", partial)
    restored = moc_json("restore", "-r", partial, "--to", tmp_path / "copy")
    compared = moc_json("diff", "10", "40", "-r", partial)
    listed = moc_json("ls", "-r", partial)["checkpoints"][-1]

    assert (shown["experts"], shown["staleness"]) == (rows, staleness)
    source = next(row for row in shown["stale_experts"] if row[:2] == [0, 1])
    assert source[2:] == [10, f"000001-run-7/000000000010-{source[3][-8:]}", 1000]
    assert (restored["experts"], restored["staleness"], restored["plt"]) == (rows, staleness, 0.125)
    assert compared["experts"] == {"a": [{"layer": i, "steps": [10] * 4} for i in (0, 1)], "b": rows}
    assert compared["staleness"]["b"] == staleness
    facts = {fact["name"]: fact["b"] for fact in compared["facts"]}
    assert facts["stale_experts"] == shown["stale_experts"]
    assert facts["plt"] == shown["plt"]
    assert whole["experts"] is None
    assert whole["staleness"] == {
        "oldest_step": 10,
        "mean_steps_behind": 0.0,
        "plt": None,
        "plt_if_restored": None,
        "lost_if_restored": None,
    }
    assert 0 < shown["written_bytes"] < shown["size_bytes"]
    assert (listed["written_bytes"], listed["size_bytes"]) == (shown["written_bytes"], shown["size_bytes"])


def test_a_list_tells_what_each_has_written_and_how_many_experts_are_stale(partial: Path) -> None:
    result, listed = moc("ls", "-r", partial), moc_json("ls", "-r", partial)["checkpoints"]

    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines[0] == ["STEP", "INCARNATION", "ATTEMPT", "SIZE", "WRITTEN", "STALE", "AGE", "IS"]
    assert [line[7] for line in lines[1:]] == ["0", "6", "8", "6"], "behind two sizes of two words"
    assert [row["stale_experts"] for row in listed] == [0, 6, 8, 6]
    assert max(map(len, result.stdout.splitlines())) <= COLUMNS


def test_exported_weights_are_those_of_the_declared_versions(partial: Path, tmp_path: Path) -> None:
    for step in ("20", "30", "40"):
        target = tmp_path / step
        assert moc("restore", "--step", step, "-r", partial, "--to", target, "--format", "safetensors").returncode == 0
        shown = moc_json("show", step, "-r", partial)
        steps = {(row["layer"], index): held for row in shown["experts"] for index, held in enumerate(row["steps"])}
        assert len(set(steps.values())) > 1

        content = (target / "model.safetensors").read_bytes()
        length = int.from_bytes(content[:8], "little")
        seen = set()
        for name, row in json.loads(content[8 : 8 + length]).items():
            if name == "__metadata__":
                continue
            found = re.search(r"layers\.(\d+)\..*experts?\.(\d+)\.", name)
            expert = None if found is None else (int(found[1]), int(found[2]))
            held = int(step) if expert is None else steps[expert]
            begin, end = (8 + length + offset for offset in row["data_offsets"])
            assert row["dtype"] == "F32"
            assert content[begin:end] == tensor_bytes(name, "master", (end - begin) // 4, held), name
            seen.add(expert)
        assert seen == {None, *steps}


def test_damage_in_what_an_earlier_checkpoint_wrote_is_named_and_fails_those_that_share_it(tmp_path: Path) -> None:
    root = tmp_path / "repository"
    builder = build_partial_history(LocalStore(root), last_step=40)
    newest = builder.repository.read_manifest(builder.name(2, 40))
    row = next(row for row in newest.objects if "000001-" in row.key)
    content = bytearray((root / row.key).read_bytes())
    content[row.header_bytes + 3] ^= 0x10
    (root / row.key).write_bytes(content)

    quick, full = moc("verify", "-r", root), moc("verify", "--read-data", "-r", root)
    asked = moc("restore", "--step", "40", "-r", root, "--to", tmp_path / "asked")
    facts = moc_json("verify", "--read-data", "-r", root, code=4)

    assert quick.returncode == 0, "data are read on request"
    assert full.returncode == 4
    assert row.key in full.stdout + full.stderr
    assert asked.returncode == 4
    assert row.key in asked.stderr
    assert not [path for path in (tmp_path / "asked").rglob("*") if path.is_file()]
    assert row.key in json.dumps(facts)


def test_show_still_answers_where_an_old_object_is_gone(tmp_path: Path) -> None:
    root = tmp_path / "repository"
    builder = build_partial_history(LocalStore(root), last_step=40)
    gone = next(iter(builder.repository.read_manifest(builder.name(2, 40)).objects)).key
    (root / gone).unlink()

    result, shown = moc("show", "-r", root), moc_json("show", "-r", root)

    assert result.returncode == 0
    assert gone in result.stderr
    assert "6 older than step 40, the oldest of step 10" in result.stdout
    assert (shown["experts"], shown["staleness"]) == (None, None)


def test_a_map_of_60_layers_of_256_experts_fits_a_screen() -> None:
    """Every layer has one expert of each of 256 steps, one of them its own; in layer 59 one is much older."""
    steps = {layer: [1000 - (index + layer) % 256 for index in range(256)] for layer in range(60)}
    steps[59][255] = 1
    manifest = _manifest(steps)

    lines = expert_map(manifest, steps)

    assert max(map(len, lines)) <= COLUMNS
    assert len(lines) <= LINES + 3
    assert lines[0] == "    layer experts 0-255, 5 to a mark, which shows the oldest"
    assert lines[1] == "      0-2 " + "1" * 22 + "2" * 22 + "3" * 8  # mark k stands for up to 5k + 6 steps
    assert lines[20].startswith("    57-59 ")
    assert lines[20].endswith("9"), "the oldest of its neighbours"
    assert lines[-1].endswith("9 step 1")


@given(st.data())
def test_every_expert_has_the_mark_of_its_step(data: st.DataObject) -> None:
    experts, layers = data.draw(st.integers(1, 60)), data.draw(st.integers(1, LINES))
    count = st.lists(st.integers(0, 1000), min_size=experts, max_size=experts)
    steps = {layer: data.draw(count) for layer in range(layers)}
    manifest = _manifest(steps, routing=data.draw(st.booleans()))

    lines = expert_map(manifest, steps)

    assert max(map(len, lines), default=0) <= COLUMNS
    if all(step == 1000 for row in steps.values() for step in row):
        assert lines == []
        return
    legend = " ".join(lines[1 + layers :]).split(",")
    ranges = {words[0]: words[-1].split("-") for words in map(str.split, legend)}
    for layer, row in steps.items():
        marks = lines[1 + layer][10 : 10 + experts]
        for mark, step in zip(marks, row, strict=True):
            assert int(ranges[mark][0]) <= step <= int(ranges[mark][-1])
    if len({step for row in steps.values() for step in row} - {1000}) <= LEVELS:
        assert all(len(bounds) == 1 for bounds in ranges.values()), "each step has a mark of its own"


def test_counts_that_do_not_fit_the_model_are_left_out() -> None:
    """What a manifest says of routes may be of another model, or less than what a version says it has learned."""
    routing = Routing(basis=BEFORE_DROPS, routed=((100, 100),), learned=((100, 40),))
    rows = [(0, 0, 60), (0, 1, 90), (0, 2, 5), (7, 0, 5)]
    manifest = replace(
        _manifest({}),
        routing=routing,
        stale_experts=tuple(
            StaleExpert(expert=Expert(layer=layer, index=index), step=1, source=NAME, routed=routed)
            for layer, index, routed in rows
        ),
    )

    after = if_restored(manifest)

    assert after is not None
    assert after.learned == ((60, 40),)
    assert staleness_json(manifest, {0: [1, 1, 1], 7: [1]})["lost_if_restored"] == [40]
    assert ("PLT", "30 %, 50 % if restored (routes counted: routed, before drops)") in staleness_facts(manifest, {})
    assert len(expert_map(manifest, {0: [1, 1, 1], 7: [2**62]})) == 4


def _manifest(steps: dict[int, list[int]], *, routing: bool = False) -> Manifest:
    counts = tuple(tuple(2000 for _ in row) for row in steps.values())
    return Manifest(
        name=NAME,
        parent=None,
        topology={},
        catalog_digest="0" * 16,
        tensors=0,
        objects=(),
        fingerprint={},
        versions={},
        is_finite=True,
        stale_experts=tuple(
            StaleExpert(expert=Expert(layer=layer, index=index), step=step, source=NAME, routed=2 * step)
            for layer, row in steps.items()
            for index, step in enumerate(row)
            if step < NAME.step
        ),
        routing=Routing(basis="kept", routed=counts, learned=counts) if routing else None,
    )
