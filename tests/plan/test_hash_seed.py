"""Plans do not depend on the order in which a hash seed makes sets and dictionaries iterate."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import hashlib
from moc.plan.assign import RULES, assign
from moc.plan.bound import lower_bound
from moc.plan.ownership import zero2_ownership
from moc.plan.balance import balanced_rotation, job_rotations
from moc.plan.select import LoadAware, Sequential, commit_selection, fresh_history, select
from moc.state import Expert
from tests.plan.test_composition import committed, terms_of
from tests.plan.values import catalogs, owned_catalogs, tiny, wide

own = zero2_ownership(wide(), 64, 16)
rotation = balanced_rotation(own, 8)
history = fresh_history(own.layers, own.experts)
results = [rotation, lower_bound(own, 8), lower_bound(own, 3)]
for policy in (Sequential(8), Sequential(3), LoadAware(5)):
    selection = select(policy, history, rotation, loads=[[7 * i % 5 for i in range(64)]] * 24)
    history = commit_selection(history, selection)
    results.append(selection)
held = catalogs(
    4,
    replicated=[(n, ranks) for n in (3, 50, 7) for ranks in ((0, 1, 2, 3), (0, 2), (1, 3))],
    owned=[(n % 4, 3 * n, Expert(layer=0, index=n)) for n in range(8)],
)
results += [assign(held, selection, rule=rule) for rule in RULES]
small = zero2_ownership(tiny(layers=4, experts=6), 12, 3)
results += job_rotations(owned_catalogs(small), (("ep", 3),), (1, 2, 4, None))
grid = [Expert(layer=layer, index=index) for layer in range(3) for index in range(8)]
base = None
for step in range(5, 60, 5):
    steps = {e: None if base and (7 * e.index + step) % 11 == 0 else step - (e.index * step) % 3 for e in grid}
    base = committed(step, steps, base, terms_of((8, 8, 8), Sequential(3)))
    results.append(base.manifest)
results += [balanced_rotation(small, k) for k in range(1, 7)]
print(hashlib.sha256(repr(results).encode()).hexdigest())
"""


def test_plans_are_equal_under_every_hash_seed() -> None:
    digests = set()
    for seed in ("0", "4711"):
        environment = os.environ | {"PYTHONHASHSEED": seed}
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        digests.add(done.stdout)
    assert len(digests) == 1
