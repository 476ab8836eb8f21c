"""Whose turn it is at a snapshot, and into which slots it goes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moc.errors import UsageError
from moc.plan.rotation import rotation_of
from moc.plan.slots import choose_slots
from moc.plan.turns import Turns, check_k
from moc.state import Expert

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import hashlib
from moc.plan.rotation import expert_counts, rotation_of
from moc.plan.turns import Turns
from moc.state import Expert
from tests.plan.values import catalogs

held = catalogs(4, replicated=[], owned=[(n % 4, 3 * n + 1, Expert(layer=n % 3, index=n // 3)) for n in range(24)])
counts = expert_counts(shard.expert for catalog in held for shard in catalog.shards)
turns = Turns(rotation_of(counts, (("a", 2), ("b", 4))), k=3, every=2)
windows = [turns.window(step).tobytes() for step in range(0, 40, 2)]
print(counts, hashlib.sha256(repr((turns.experts, windows)).encode()).hexdigest())
"""

models = st.one_of(
    st.builds(lambda layers, experts: (experts,) * layers, st.integers(1, 5), st.integers(1, 12)),
    st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple),
)


def turns_of(counts: tuple[int, ...], k: int | None, *, every: int = 1, ep: int = 1) -> Turns:
    return Turns(rotation_of(counts, (("ep", ep),)), k=k, every=every)


@given(counts=models, ep=st.sampled_from([1, 2, 3, 4]), every=st.integers(1, 7), data=st.data())
def test_every_expert_has_its_turn_within_n_over_k_snapshots_in_a_row(
    counts: tuple[int, ...], ep: int, every: int, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, min(counts)))
    first = data.draw(st.integers(0, 1000))
    turns = turns_of(counts, k, every=every, ep=ep)

    for layer, count in enumerate(counts):
        seen = turns.nothing()
        for number in range(-(-count // k)):
            seen |= turns.window((first + number) * every)
        assert all(seen[turns.place(Expert(layer=layer, index=index))] for index in range(count))


@given(counts=models, step=st.integers(0, 10_000), data=st.data())
def test_a_window_holds_k_experts_of_every_layer(counts: tuple[int, ...], step: int, data: st.DataObject) -> None:
    k = data.draw(st.none() | st.integers(1, min(counts)))
    turns = turns_of(counts, k)

    chosen = turns.window(step)

    for layer, count in enumerate(counts):
        places = [turns.place(Expert(layer=layer, index=index)) for index in range(count)]
        assert chosen[places].sum() == (count if k is None else k)
    assert len(chosen) == len(turns.experts) == sum(counts)
    assert [turns.place(expert) for expert in turns.experts] == list(range(sum(counts)))


def test_the_first_windows_are_those_of_the_papers_figure() -> None:
    turns = turns_of((3, 3, 3, 3), 1, ep=3)

    for step, indices in ((0, (0, 1, 2, 0)), (1, (1, 2, 0, 1))):
        chosen = turns.window(step)
        assert tuple(e.index for e, is_chosen in zip(turns.experts, chosen, strict=True) if is_chosen) == indices


def test_turns_are_equal_under_every_hash_seed() -> None:
    printed = set()
    for seed in ("0", "4711"):
        environment = os.environ | {"PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", PROGRAM]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        printed.add(done.stdout)
    assert len(printed) == 1
    assert printed.pop().startswith("(8, 8, 8)")


@pytest.mark.parametrize(
    ("k", "counts", "words"),
    [(5, (4, 4), "k_snapshot=5 allowed=1..4"), (5, (8, 4), "allowed=1..4"), (1, (), "allowed=None, the model has no")],
)
def test_more_experts_than_a_layer_has_are_refused(k: int, counts: tuple[int, ...], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        check_k("k_snapshot", k, counts)


@given(data=st.data(), versions=st.integers(2, 5), units=st.integers(1, 6))
def test_no_slot_of_a_held_record_is_written_and_what_is_left_out_keeps_the_bases(
    data: st.DataObject, versions: int, units: int
) -> None:
    record = st.lists(st.integers(0, versions - 1), min_size=units, max_size=units)
    rows = data.draw(st.lists(record, max_size=versions))
    held = [np.array(row, dtype=np.uint32) for row in rows]
    base = data.draw(st.none() | st.sampled_from(rows)) if rows else None
    base = data.draw(record) if base is None and data.draw(st.booleans()) else base  # freed already
    is_copied = (
        [True] * units
        if base is None
        else [True, *data.draw(st.lists(st.booleans(), min_size=units - 1, max_size=units - 1))]
    )
    copied = np.array(is_copied)

    chosen = choose_slots(versions, copied, held=held, base=None if base is None else np.array(base, dtype=np.uint32))

    if chosen is None:
        assert len(held) >= versions
        return
    slots, overwritten = chosen
    for unit in range(units):
        if not copied[unit]:
            assert base is not None
            assert slots[unit] == base[unit]
            assert not overwritten[unit]
            continue
        assert slots[unit] not in {row[unit] for row in held}
        assert overwritten[unit] == (base is not None and slots[unit] == base[unit])
        if overwritten[unit]:
            assert {row[unit] for row in held} | {slots[unit]} == set(range(versions)), "another one was free"
