"""Plans are equal on every rank: they do not depend on the order in which a hash seed makes sets iterate."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import hashlib
from moc.commit import CommitPlan, build_manifest
from moc.format.manifest import encode_manifest
from moc.plan.freeing import Seal, freeable, hopeless_moments, newest_moments
from moc.plan.layout import arrange_arena
from moc.plan.lineage import Candidate, Link, candidates
from moc.plan.read import Placed, plan_read
from moc.plan.retention import CheckpointFact, dropped
from moc.format.keys import CheckpointName
from moc.state import catalog_digest, check_coverage
from moc.store.memory import MemoryStore
from tests.support.repository import Model, RepositoryBuilder

model, other = Model(world_size=2), Model(world_size=4)
placed = [
    Placed(shard=shard, holder=str(catalog.rank), position=i, crc32c=0)
    for catalog in model.catalogs()
    for i, shard in enumerate(catalog.shards)
]
names = [
    CheckpointName(run=run, incarnation=i, step=s, attempt=f"{s:08x}")
    for run in "abc"
    for i in (1, 2)
    for s in range(9)
]
seals = [
    Seal(incarnation=1, step=s, attempt=f"{s:08x}", rank=r, record=s)
    for r in range(4)
    for s in range(9)
    if (s * r) % 3 != 1
]
links = (Link(incarnation=2, last_step=None), Link(incarnation=1, last_step=4))
known = [
    Candidate(source=s, run=n.run, incarnation=n.incarnation, step=n.step, attempt=n.attempt)
    for n in names
    for s in ("memory", "storage")
]
facts = [CheckpointFact(name=n, is_on_chain=n.step % 2 == 0, is_finite=n.step < 5) for n in names]
results = [
    arrange_arena(model.catalogs(), versions=4, descriptor_bytes=4096),
    [plan_read(catalog.shards, placed) for catalog in other.catalogs()],
    catalog_digest(model.catalogs()),
    check_coverage(s for c in model.catalogs() for s in c.shards),
    dropped(facts, keep_last=2, keep_every=3),
    freeable(seals, range(4), 1, pinned=[(1, (3, "00000003"))], source=(1, 2), hopeless=[(5, "00000005")]),
    hopeless_moments(seals, range(4), 1, passed=newest_moments(seals, 1)),
    candidates(links, known),
    encode_manifest(RepositoryBuilder(MemoryStore(), model=model).commit(1, 5)),
]
print(hashlib.sha256(repr(results).encode()).hexdigest())
"""


def test_plans_are_equal_under_every_hash_seed() -> None:
    digests = set()
    for seed in ("0", "1", "4711"):
        environment = os.environ | {"PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", PROGRAM]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        digests.add(done.stdout)
    assert len(digests) == 1
