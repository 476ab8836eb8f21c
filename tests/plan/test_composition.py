"""What a partial checkpoint writes and keeps: nobody is forgotten, nothing is twice, whatever fails or restarts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moc.errors import PlanDivergedError
from moc.format.keys import CheckpointName, object_key, parse_object_key
from moc.format.manifest import Manifest, ObjectRow, decode_manifest, encode_manifest
from moc.plan.composition import Base, Composition, Sealed, Terms, compose, is_newer, next_base, steps_of_experts
from moc.plan.offers import offered_experts
from moc.plan.rotation import even_rotation, expert_counts, rotation_of
from moc.plan.select import DynamicK, LoadAware, Policy, Sequential
from moc.routing import BEFORE_DROPS, KEPT, Capture, Routing, lose
from moc.state import Expert

DIGEST, FINGERPRINT = "0" * 16, {"model": "plain"}
INTERVAL = 5


def experts_of(counts: Sequence[int]) -> list[Expert]:
    return [Expert(layer=layer, index=index) for layer, count in enumerate(counts) for index in range(count)]


def name_of(step: int, *, incarnation: int = 1, attempt: int = 0) -> CheckpointName:
    return CheckpointName(run="run-7", incarnation=incarnation, step=step, attempt=f"{attempt:08x}")


def terms_of(counts: Sequence[int], policy: Policy) -> Terms:
    return Terms(policy=policy, rotation=rotation_of(counts, [("ep", 2)]), interval=INTERVAL)


def sealed_of(name: CheckpointName, steps: Mapping[Expert, int | None], captures: Sequence[Capture] = ()) -> Sealed:
    return Sealed(
        name=name,
        steps=steps,
        digest=DIGEST,
        fingerprint=FINGERPRINT,
        routing=captures[0].routing if captures else None,
        learned={
            row.expert: row.learned for row in offered_experts(steps, captures, name.step) if row.learned is not None
        },
    )


def manifest_of(name: CheckpointName, composition: Composition, *, is_finite: bool = True) -> Manifest:
    """Return the manifest that one rank with all experts would commit; checked as a reader checks it."""
    pieces = ["d", "e00"] if composition.written else ["d"]
    own = [ObjectRow(key=object_key(name, 0, p), size_bytes=8192, header_bytes=4096, header_crc32c=0) for p in pieces]
    manifest = Manifest(
        name=name,
        parent=None,
        topology={"world_size": 1, "node_of_rank": [0], "ep_sizes": []},
        catalog_digest=DIGEST,
        tensors=1,
        objects=tuple(sorted((*own, *composition.kept), key=lambda row: row.key)),
        fingerprint=FINGERPRINT,
        versions={},
        is_finite=is_finite and composition.is_kept_finite,
        stale_experts=composition.stale,
        routing=composition.routing,
    )
    assert decode_manifest(encode_manifest(manifest), name="test") == manifest
    return manifest


def committed(step: int, steps: Mapping[Expert, int | None], base: Base | None, terms: Terms | None) -> Base:
    """Compose and commit a finite checkpoint."""
    name = name_of(step)
    composition = compose(sealed_of(name, steps), base, terms)
    return next_base(manifest_of(name, composition), composition, is_written_finite=True)


@dataclass(slots=True)
class Job:
    """A job whose saves fail, whose agents die and whose experts are not all captured; it knows what is true."""

    counts: tuple[int, ...]
    base: Base | None = None
    memory: dict[Expert, int] = field(default_factory=dict)
    bad: set[tuple[CheckpointName, Expert]] = field(default_factory=set)  # versions that are not finite
    waited: dict[Expert, int] = field(default_factory=dict)  # the sum of K of the commits that passed a fit expert by
    lives: int = 1

    @property
    def experts(self) -> list[Expert]:
        return experts_of(self.counts)

    def restart(self, *, is_agent_alone: bool) -> None:
        """Forget what only a process knew; the first snapshot of a life has all experts."""
        self.base = None if self.base is None else Base.of(self.base.manifest)
        if not is_agent_alone:
            self.memory.clear()
            self.lives += 1

    def save(self, data: st.DataObject, step: int) -> None:
        captured = {e for e in self.experts if e not in self.memory or data.draw(st.booleans())}
        self.memory |= dict.fromkeys(captured, step)
        torn = {e for e in self.experts if self.base is not None and data.draw(st.integers(0, 9)) == 0}
        steps = {e: None if e in torn else self.memory[e] for e in self.experts}
        k = data.draw(st.integers(1, min(self.counts)))
        terms = None if data.draw(st.integers(0, 7)) == 0 else terms_of(self.counts, Sequential(k))
        name = name_of(step, incarnation=self.lives)
        sealed = sealed_of(name, steps)

        composition = compose(sealed, self.base, terms)

        turned = replace(sealed, steps=dict(reversed(steps.items())))
        assert compose(turned, self.base, terms) == composition, "the order of what is given decides nothing"
        is_finite = data.draw(st.integers(0, 4)) > 0
        manifest = manifest_of(name, composition, is_finite=is_finite)
        self.check(sealed, composition, manifest, k if terms is not None and self.base is not None else None)
        if data.draw(st.booleans()):
            self.commit(sealed, composition, manifest, k, is_finite=is_finite)

    def check(self, sealed: Sealed, composition: Composition, manifest: Manifest, k: int | None) -> None:
        sources = {e: manifest.version(e)[0] for e in self.experts}
        assert [e for e in self.experts if sources[e] == manifest.name] == list(composition.written)
        owners = {parse_object_key(row.key)[0] for row in manifest.objects}
        assert owners == {manifest.name, *sources.values()}, "an object of every source, and of nothing else"
        for expert, step in sealed.steps.items():
            held = None if self.base is None else self.base.manifest.version(expert)
            if sources[expert] == manifest.name:
                assert manifest.version(expert)[1] == step
                assert held is None or step is None or step > held[1]
            else:
                assert manifest.version(expert) == held
        for layer, count in enumerate(self.counts):
            chosen = [e for e in composition.written if e.layer == layer]
            assert len(chosen) <= (count if k is None else k)

    def commit(self, sealed: Sealed, composition: Composition, manifest: Manifest, k: int, *, is_finite: bool) -> None:
        if not is_finite:
            self.bad |= {(manifest.name, e) for e in composition.written}
        for expert, step in sealed.steps.items():
            held = None if self.base is None else self.base.manifest.version(expert)
            is_fit = step is not None and (held is None or step > held[1])
            is_passed_by = is_fit and expert not in composition.written
            self.waited[expert] = self.waited.get(expert, 0) + k if is_passed_by else 0
            assert self.waited[expert] < self.counts[expert.layer], f"starved: {expert}"
        has_bad = any((manifest.version(e)[0], e) in self.bad for e in self.experts)
        assert not (manifest.is_finite and has_bad), "said to be finite although it is not"
        self.base = next_base(manifest, composition, is_written_finite=is_finite)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_every_expert_is_committed_within_n_over_k_commits_and_exactly_once_whatever_happens(
    data: st.DataObject,
) -> None:
    job = Job(counts=tuple(data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))))

    for step in range(INTERVAL, INTERVAL * data.draw(st.integers(2, 16)), INTERVAL):
        if data.draw(st.integers(0, 5)) == 0:
            job.restart(is_agent_alone=data.draw(st.booleans()))
        job.save(data, step)


def test_a_checkpoint_is_finite_again_once_what_was_not_is_superseded() -> None:
    counts, terms = (4,), terms_of((4,), Sequential(1))
    base = committed(5, dict.fromkeys(experts_of(counts), 5), None, None)
    found = []
    for step in range(10, 45, 5):
        name = name_of(step)
        composition = compose(sealed_of(name, dict.fromkeys(experts_of(counts), step)), base, terms)
        manifest = manifest_of(name, composition, is_finite=step != 10)
        base = next_base(manifest, composition, is_written_finite=step != 10)
        found.append(manifest.is_finite)

    assert found == [False, False, False, False, True, True, True]


def test_a_new_agent_does_not_trust_a_base_that_is_not_all_finite() -> None:
    counts, terms = (2,), terms_of((2,), Sequential(1))
    name = name_of(5)
    composition = compose(sealed_of(name, dict.fromkeys(experts_of(counts), 5)), None, None)
    base = Base.of(manifest_of(name, composition, is_finite=False))

    found = []
    for step in (10, 15):
        name = name_of(step)
        composition = compose(sealed_of(name, dict.fromkeys(experts_of(counts), step)), base, terms)
        manifest = manifest_of(name, composition)
        base = next_base(manifest, composition, is_written_finite=True)
        found.append(manifest.is_finite)

    assert found == [False, True]


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_by_load_nobody_waits_for_longer_than_the_bound_although_older_commits_are_gone(data: st.DataObject) -> None:
    experts, k = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 2))
    k = min(k, experts)
    terms = terms_of((experts,), LoadAware(k))
    grid = experts_of((experts,))
    base, since = None, dict.fromkeys(grid, 0)
    for step in range(INTERVAL, 40 * INTERVAL, INTERVAL):
        if base is not None and data.draw(st.integers(0, 5)) == 0:
            base = Base.of(base.manifest)  # a new agent
        routed = tuple(data.draw(st.integers(0, 10**6)) for _ in grid)
        routing = Routing(basis=KEPT, routed=(routed,), learned=(routed,))
        capture = Capture(routing=routing, captured=(routed,), steps=((step,) * experts,))
        name = name_of(step)
        composition = compose(sealed_of(name, dict.fromkeys(grid, step), [capture]), base, terms)
        base = next_base(manifest_of(name, composition), composition, is_written_finite=True)
        since = {expert: 0 if expert in composition.written else since[expert] + 1 for expert in grid}
        assert max(since.values()) < 2 * -(-experts // k)


def test_loads_are_what_was_learned_since_the_base_has_an_expert() -> None:
    grid = experts_of((4,))
    first = Routing(basis=KEPT, routed=((100, 10, 10, 10),), learned=((100, 10, 10, 10),))
    base = _counted(5, first, None, None)
    second = Routing(basis=KEPT, routed=((110, 15, 90, 12),), learned=((110, 15, 30, 12),))
    capture = Capture(routing=second, captured=second.learned, steps=((10,) * 4,))

    composition = compose(
        sealed_of(name_of(10), dict.fromkeys(grid, 10), [capture]), base, terms_of((4,), LoadAware(1))
    )

    assert [e.index for e in composition.written] == [2], "20 since then, the most although 60 routes are lost"
    assert {row.expert.index: row.routed for row in composition.stale} == {0: 100, 1: 10, 3: 10}
    assert composition.routing == second


@pytest.mark.parametrize("is_counted_between", [True, False])
def test_what_a_base_says_of_another_count_is_not_carried_on(*, is_counted_between: bool) -> None:
    terms, grid = terms_of((4,), LoadAware(1)), experts_of((4,))
    base = _counted(5, _even(1_000_000), None, None)
    if not is_counted_between:
        base = committed(10, dict.fromkeys(grid, 10), base, terms_of((4,), Sequential(1)))

    for step, learned in ((15, 0), (20, 10)):
        base = _counted(step, _even(learned + 10), base, terms)
        counts = {row.expert: row.routed for row in base.manifest.stale_experts}
        assert sorted(counts.values()) == [0] * (3 - learned // 10) + [10] * (learned // 10)
        assert lose(_even(learned + 10), counts).lost[0] == sum(learned + 10 - count for count in counts.values())

    others = Routing(basis=BEFORE_DROPS, routed=((2_000_000,) * 4,), learned=((2_000_000,) * 4,))
    base = _counted(25, others, base, terms)
    assert {row.routed for row in base.manifest.stale_experts} == {0}


def test_a_written_expert_of_an_older_step_says_what_its_bytes_have_learned() -> None:
    grid = experts_of((2,))
    routing = Routing(basis=KEPT, routed=((30, 20),), learned=((30, 20),))
    # The first rank has missed a snapshot of expert 1, which it does not hold; the second one knows it.
    lowest = Capture(routing=routing, captured=((30, 8),), steps=((10, 5),))
    other = Capture(routing=routing, captured=((30, 17),), steps=((10, 9),))

    composition = compose(sealed_of(name_of(10), {grid[0]: 10, grid[1]: 9}, [lowest, other]), None, None)

    (row,) = composition.stale
    assert (row.expert, row.step, row.source, row.routed) == (grid[1], 9, name_of(10), 17)


@pytest.mark.parametrize(("lost", "written"), [(3, 1), (4, 4)])
def test_k_grows_when_too_many_tokens_are_lost(lost: int, written: int) -> None:
    grid = experts_of((4,))
    base = committed(5, dict.fromkeys(grid, 5), None, None)
    routing = Routing(basis=KEPT, routed=((25, 25, 25, 25),), learned=((25 - lost, 25, 25, 25),))
    capture = Capture(routing=routing, captured=routing.learned, steps=((10,) * 4,))
    terms = terms_of((4,), DynamicK(1, plt_limit=0.0375))

    composition = compose(sealed_of(name_of(10), dict.fromkeys(grid, 10), [capture]), base, terms)

    assert len(composition.written) == written


@pytest.mark.parametrize(("faults", "written"), [(0, 1), (2, 2)])
def test_k_grows_with_the_rate_of_faults_while_the_share_is_within_the_limit(faults: int, written: int) -> None:
    grid = experts_of((4,))
    base = committed(200, dict.fromkeys(grid, 200), None, None)
    routing = Routing(basis=KEPT, routed=((250, 250, 250, 250),), learned=((245, 250, 250, 250),))
    capture = Capture(routing=routing, captured=routing.learned, steps=((205,) * 4,))
    terms = replace(terms_of((4,), DynamicK(1, plt_limit=0.0375)), faults=faults)

    composition = compose(sealed_of(name_of(205), dict.fromkeys(grid, 205), [capture]), base, terms)

    assert len(composition.written) == written


def test_what_cannot_be_written_nor_kept_fails_the_save() -> None:
    grid = experts_of((2,))
    with pytest.raises(PlanDivergedError, match="ranks hold an expert at different steps"):
        compose(sealed_of(name_of(10), {grid[0]: 10, grid[1]: None}), None, None)
    base = committed(10, dict.fromkeys(grid, 10), None, None)
    again = sealed_of(name_of(10, attempt=1), {grid[0]: 10, grid[1]: 9})
    with pytest.raises(PlanDivergedError, match="memory holds an older expert"):
        compose(again, base, None)


def test_a_second_checkpoint_of_a_step_writes_again_what_the_first_has_of_that_step() -> None:
    grid = experts_of((3,))
    base = committed(5, dict.fromkeys(grid, 5), None, None)
    base = committed(10, dict.fromkeys(grid, 10), base, terms_of((3,), Sequential(1)))
    assert len(base.manifest.stale_experts) == 2

    composition = compose(sealed_of(name_of(10, attempt=1), dict.fromkeys(grid, 10)), base, None)

    assert len(composition.written) == 3
    assert composition.stale == composition.kept == ()


def test_a_base_of_another_experiment_makes_a_whole_checkpoint_and_one_of_other_catalogs_is_none() -> None:
    grid = experts_of((4,))
    base = committed(5, dict.fromkeys(grid, 5), None, None)
    terms = terms_of((4,), Sequential(1))
    steps: dict[Expert, int | None] = {**dict.fromkeys(grid, 10), grid[0]: None, grid[1]: 5}

    sealed = replace(sealed_of(name_of(10), steps), fingerprint={"model": "other"})
    assert [e.index for e in compose(sealed, base, terms).written] == [2, 3]
    with pytest.raises(PlanDivergedError, match="different steps"):
        compose(replace(sealed, digest="1" * 16), base, terms)


def test_a_manifest_that_would_be_too_long_is_of_a_whole_checkpoint() -> None:
    grid, terms = experts_of((4,)), terms_of((4,), Sequential(1))
    base = committed(5, dict.fromkeys(grid, 5), None, None)
    written = []
    for step in (10, 15, 20, 25):
        name = name_of(step)
        composition = compose(sealed_of(name, dict.fromkeys(grid, step)), base, terms, kept_limit=2)
        base = next_base(manifest_of(name, composition), composition, is_written_finite=True)
        written.append(len(composition.written))

    assert written == [1, 1, 4, 1]


def test_layers_with_other_numbers_of_experts_take_turns_alone() -> None:
    counts = (4, 2, 4)
    rotation = rotation_of(counts, [("ep_2", 2), ("ep_4", 4)])
    assert [len(order) for order in rotation.orders] == [4, 2, 4]
    assert (rotation.orders[0], rotation.orders[2]) == even_rotation(2, 4, 4).orders
    assert rotation.orders[1:2] == even_rotation(1, 2, 2).orders
    assert rotation_of((6, 6), [("ep_4", 4)]) == even_rotation(2, 6, 1), "a size that divides nothing is no size"
    assert rotation_of((), []).orders == ()

    grid, base = experts_of(counts), None
    terms = Terms(policy=Sequential(2), rotation=rotation, interval=1)
    for step in (1, 2, 3):
        base = committed(step, dict.fromkeys(grid, step), base, terms)
    assert {e for e in grid if base.manifest.version(e)[1] == 1} == set(), "all 4 experts within 2 commits of 2"
    assert expert_counts(grid) == counts


def test_slices_agree_on_a_step_or_there_is_none() -> None:
    first, second = experts_of((2,))
    slices = [(second, 7), (first, 7), (second, 7), (first, 6), (first, 7)]
    assert list(steps_of_experts(slices).items()) == [(first, None), (second, 7)]


def test_a_snapshot_is_newer_if_any_of_its_experts_is() -> None:
    first, second = experts_of((2,))
    base = committed(5, {first: 5, second: 4}, None, None)
    assert not is_newer({first: 5, second: 4}, base)
    assert not is_newer({first: 5, second: None}, base)
    assert is_newer({first: 5, second: 5}, base)


def _even(count: int) -> Routing:
    return Routing(basis=KEPT, routed=((count,) * 4,), learned=((count,) * 4,))


def _counted(step: int, routing: Routing, base: Base | None, terms: Terms | None) -> Base:
    counts = [len(row) for row in routing.routed]
    capture = Capture(routing=routing, captured=routing.learned, steps=tuple((step,) * n for n in counts))
    name = name_of(step)
    composition = compose(sealed_of(name, dict.fromkeys(experts_of(counts), step), [capture]), base, terms)
    return next_base(manifest_of(name, composition), composition, is_written_finite=True)
