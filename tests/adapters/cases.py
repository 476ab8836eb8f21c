"""What a test world does in each case; every function runs on all ranks and raises if something is wrong."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from moc import _native
from moc.adapters.deepspeed import DeepSpeedState, Hooks
from moc.adapters.deepspeed.routes import RouteCounter
from moc.adapters.world import TorchWorld
from moc.errors import ClosedError, InternalError, UsageError, WaitTimeoutError
from moc.format.tagged import decode_state, encode_state
from moc.state import Shard, check_coverage
from tests.adapters import refusals
from tests.adapters.engines import build, differences, observe, train
from tests.adapters.models import EXPERTS, WIDTH, Native, Stacked
from tests.adapters.scenarios import DEFAULT, SLOW, Scenario

SCENARIOS = {scenario.name: scenario for scenario in (*DEFAULT, *SLOW)}
CAPTURED_STEP, LAST_STEP = 4, 7
Copies = dict[Shard, bytes]


def gathered(value: object) -> list:
    """Return every rank's value."""
    rows: list = [None] * dist.get_world_size()
    dist.all_gather_object(rows, value)
    return rows


def attach(engine, stateful: dict[str, object] | None = None) -> DeepSpeedState:
    return DeepSpeedState(engine, stateful or {}, extra_fingerprint={"seed": 1})


def snapshot(state: DeepSpeedState, between: Callable[[], object] = lambda: None) -> tuple[Copies, bytes]:
    """Copy the state as a manager does: encode the tree at the boundary, then copy the shards; checks every crc."""
    blob = encode_state(state.capture()).to_bytes()
    between()
    assert len(blob) <= state.catalog.state_capacity_bytes
    shards = state.catalog.shards
    memory = [np.full(shard.size_bytes + 1, 0xA5, dtype=np.uint8) for shard in shards]
    crcs = array("I", bytes(4 * len(shards)))
    state.copy_shards(array("Q", [m.ctypes.data for m in memory]), crcs)
    for shard, crc, m in zip(shards, crcs, memory, strict=True):
        assert m[-1] == 0xA5, f"written past the end: {shard.name}"
        assert crc == _native.crc32c(m[:-1]), shard.name
    return {shard: m[:-1].tobytes() for shard, m in zip(shards, memory, strict=True)}, blob


def restore(state: DeepSpeedState, copies: list[Copies], blob: bytes, *, exact_rank: bool = True) -> None:
    """Write every needed shard from whoever copied its elements, in small pieces, then finish."""
    pieces: dict[tuple[str, str], list[tuple[Shard, bytes]]] = {}
    for held in copies:
        for shard, data in held.items():
            pieces.setdefault((shard.tensor, shard.part), []).append((shard, data))
    state.begin_restore()
    for index, shard in enumerate(state.needed):
        received = 0
        for source, data in pieces[shard.tensor, shard.part]:
            first = max(shard.offset, source.offset)
            end = min(shard.offset + shard.length, source.offset + source.length)
            width = len(data) // source.length
            for start in range(first, end, 41):
                stop = min(end, start + 41)
                view = memoryview(data)[(start - source.offset) * width : (stop - source.offset) * width]
                state.write_shard(index, start - shard.offset, view)
                received += stop - start
        assert received == shard.length, f"incomplete: {shard.name} {received} of {shard.length}"
    tree = decode_state(blob)
    state.apply(tree)
    state.derive_weights()
    state.finish_restore(tree, exact_rank=exact_rank)


def assembled(copies: list[Copies]) -> dict[tuple[str, str, str, tuple[int, ...]], bytes]:
    """Return whole tensors by name, part, dtype and shape, whoever held their pieces."""
    check_coverage(shard for held in copies for shard in held)
    rows = sorted(((s.tensor, s.part, s.dtype, s.shape), s.offset, data) for held in copies for s, data in held.items())
    whole: dict[tuple[str, str, str, tuple[int, ...]], bytes] = {}
    for key, _, data in rows:
        whole[key] = whole.get(key, b"") + data
    return whole


def expect_same(expected: dict, actual: dict, what: str) -> None:
    found = differences(expected, actual)
    assert not found, f"{what}: differing: {found}"


def undisturbed(scenario: Scenario, last_step: int = LAST_STEP) -> tuple[list[float], dict[str, object]]:
    """Return losses and final state of a run that knows nothing of moc."""
    plain = build(scenario)
    losses = train(plain, scenario, last_step)
    expected = observe(plain)
    plain.destroy()
    return losses, expected


def resume(name: str, _: Path) -> None:
    """Attached equals plain training, and a fresh engine restored at a step continues exactly as the first went on."""
    scenario = SCENARIOS[name]
    plain_losses, expected = undisturbed(scenario)

    engine = build(scenario)
    state = attach(engine)
    catalogs = gathered(state.catalog)
    check_coverage(shard for catalog in catalogs for shard in catalog.shards)
    assert gathered(state.fingerprint) == [state.fingerprint] * dist.get_world_size()
    losses = train(engine, scenario, CAPTURED_STEP)
    assert state.step == CAPTURED_STEP
    held, blob = snapshot(state)
    later_losses = train(engine, scenario, LAST_STEP - CAPTURED_STEP)
    assert losses + later_losses == plain_losses
    expect_same(expected, observe(engine), "attached against plain")
    assert engine.skipped_steps == int(scenario.is_skipping)
    engine.destroy()

    fresh = build(scenario, seed=99)
    restored = attach(fresh)
    assert restored.catalog == state.catalog
    assert restored.fingerprint == state.fingerprint
    restore(restored, gathered(held), blob)
    assert restored.step == CAPTURED_STEP
    again, again_blob = snapshot(restored)
    assert again == held
    assert again_blob == blob
    assert train(fresh, scenario, LAST_STEP - CAPTURED_STEP) == later_losses
    expect_same(expected, observe(fresh), "restored against plain")
    fresh.destroy()


def powers(base: str, _: Path) -> None:
    """The beta powers that C++ keeps are rebuilt: a resume after many steps is exact, and would not be without it."""
    scenario = Scenario(ranks=2, dtype="fp32", zero=1, base=base, model="stacked")
    captured, last = 50, 52
    _, expected = undisturbed(scenario, last)
    engine = build(scenario)
    state = attach(engine)
    train(engine, scenario, captured)
    held, blob = snapshot(state)
    train(engine, scenario, last - captured)  # the CPU FusedAdam keeps its powers per process: move them away
    engine.destroy()

    fresh = build(scenario, seed=99)
    restore(attach(fresh), gathered(held), blob)
    train(fresh, scenario, last - captured)
    expect_same(expected, observe(fresh), "restored against plain")
    fresh.destroy()


def rewind(name: str, _: Path) -> None:
    """An engine that has trained on goes back to an earlier state in place, tensors staying where they are."""
    scenario = SCENARIOS[name]
    plain_losses, expected = undisturbed(scenario)
    engine = build(scenario)
    state = attach(engine)
    start, start_blob = snapshot(state)
    train(engine, scenario, LAST_STEP)
    addresses = [p.data_ptr() for p in engine.module.parameters()]

    restore(state, gathered(start), start_blob)

    assert [p.data_ptr() for p in engine.module.parameters()] == addresses
    assert train(engine, scenario, LAST_STEP) == plain_losses
    expect_same(expected, observe(engine), "rewound against plain")
    engine.destroy()


def reshard(kind: str, _: Path) -> None:
    """Names, shapes and bytes do not depend on the expert-parallel size, and a state moves from EP 2 to EP 1."""
    rows = {}
    for ep_size in (2, 1):
        scenario = Scenario(ranks=2, dtype="bf16", zero=2, base="foreach", model=kind, ep_size=ep_size)
        engine = build(scenario)
        rows[ep_size] = scenario, engine, attach(engine)
    wide, narrow = rows[2], rows[1]
    assert assembled(gathered(snapshot(wide[2])[0])) == assembled(gathered(snapshot(narrow[2])[0]))
    assert wide[2].fingerprint == narrow[2].fingerprint
    assert wide[2].ep_sizes == (("ep_size_2", 2),)
    train(wide[1], wide[0], 2)
    held, blob = snapshot(wide[2])
    generators = torch.get_rng_state()

    restore(narrow[2], gathered(held), blob, exact_rank=False)

    copied = assembled(gathered(snapshot(narrow[2])[0]))
    assert copied == assembled(gathered(held))
    assert narrow[2].step == 2
    dense = [name for name, p in narrow[1].module.named_parameters() if getattr(p, "allreduce", True)]
    weights = dict(wide[1].module.named_parameters())
    for name, parameter in narrow[1].module.named_parameters():
        assert name not in dense or torch.equal(parameter, weights[name]), name
    assert len(dense) > 5
    assert not torch.equal(torch.get_rng_state(), generators)
    states = gathered(torch.get_rng_state())
    assert not torch.equal(states[0], states[1])
    for _, engine, _ in rows.values():
        engine.destroy()


def save(name: str, folder: Path) -> None:
    """Leave a snapshot and what training on from it gives, for `load` in other processes."""
    scenario = SCENARIOS[name]
    engine = build(scenario)
    state = attach(engine)
    train(engine, scenario, CAPTURED_STEP)
    held, blob = snapshot(state)
    losses = train(engine, scenario, LAST_STEP - CAPTURED_STEP)
    torch.save((held, blob, losses, observe(engine)), folder / f"{name}.{dist.get_rank()}")
    engine.destroy()


def load(name: str, folder: Path) -> None:
    """Continue in fresh processes what `save` left."""
    scenario = SCENARIOS[name]
    ranks = range(dist.get_world_size())
    rows = [torch.load(folder / f"{name}.{rank}", weights_only=False) for rank in ranks]
    _, blob, losses, expected = rows[dist.get_rank()]
    engine = build(scenario, seed=99)
    restore(attach(engine), [row[0] for row in rows], blob)
    assert train(engine, scenario, LAST_STEP - CAPTURED_STEP) == losses
    expect_same(expected, observe(engine), "other processes")
    engine.destroy()


def moved(_: str, __: Path) -> None:
    """Addresses follow tensors that DeepSpeed or torch replace; lost optimizer state is created again at a restore."""
    scenario = Scenario(ranks=2, dtype="bf16", zero=2, base="foreach", model="stacked")
    engine = build(scenario)
    state = attach(engine)
    train(engine, scenario, 2)
    held, blob = snapshot(state)
    base = engine.optimizer.optimizer
    old = [value for row in base.state.values() for value in row.values()]
    base.load_state_dict(base.state_dict())
    for row in base.state.values():
        for key, value in row.items():
            row[key] = value.clone()
    assert all(value is not kept for row in base.state.values() for value in row.values() for kept in old)
    for value in old:
        value.fill_(77)
    again, _blob = snapshot(state)
    assert again == held

    base.state.clear()
    refusals.expect(UsageError, "the optimizer has lost its state", lambda: snapshot(state))
    restore(state, gathered(held), blob)
    assert snapshot(state)[0] == held
    refusals.expect(InternalError, "write outside its shard", lambda: state.write_shard(0, 10**6, memoryview(b"1234")))
    engine.destroy()


class Loader:
    """A stateful object with tensors, arrays and every plain type in its state."""

    def __init__(self) -> None:
        self.state: dict[str, object] = {
            "position": 3,
            "order": np.arange(5, dtype=np.int32),
            "mask": torch.tensor([True, False]),
            "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
            "empty": torch.empty(0, 3),
            "mixed": [None, (1, 2.5), {"k": b"raw", 7: float("inf")}],
        }

    def state_dict(self) -> dict[str, object]:
        return self.state

    def load_state_dict(self, state: dict[str, object]) -> None:
        self.state = state


def stateful(_: str, __: Path) -> None:
    """A user's objects come back as they were; what cannot be stored is refused at construction, by its path."""
    scenario = Scenario(ranks=2, dtype="fp32", zero=1, base="foreach", model="dense")
    engine = build(scenario)
    loader, ema = Loader(), torch.nn.BatchNorm1d(3)
    state = attach(engine, {"loader": loader, "ema": ema})
    ema.running_mean.fill_(4)
    held, blob = snapshot(state)
    kept = loader.state
    loader.state = {}
    ema.running_mean.fill_(5)

    restore(state, gathered(held), blob)

    assert ema.running_mean.tolist() == [4, 4, 4]
    assert str(loader.state) == str(kept)
    assert loader.state["order"].dtype == np.int32
    assert {k: type(v) for k, v in loader.state.items()} == {k: type(v) for k, v in kept.items()}
    loader.state["order"][0] = 9  # what comes back is writable
    loader.state = {"a": {"b": np.float64(1)}}
    before = dict(engine.__dict__)
    refusals.expect(
        UsageError, "path=state['stateful']['loader']['a']['b']", lambda: attach(engine, {"loader": loader})
    )
    loader.state = {"z": torch.zeros(2, dtype=torch.complex64)}
    refusals.expect(UsageError, "tensor=stateful['loader']['z']", lambda: attach(engine, {"loader": loader}))
    refusals.expect(UsageError, "stateful=clock type=object", lambda: attach(engine, {"clock": object()}))
    refusals.expect(UsageError, "names=dtype", lambda: DeepSpeedState(engine, {}, extra_fingerprint={"dtype": 1}))
    refusals.expect(UsageError, "plain JSON", lambda: DeepSpeedState(engine, {}, extra_fingerprint={"x": {1, 2}}))
    assert engine.__dict__ == before
    engine.destroy()


def hooks(_: str, folder: Path) -> None:
    """Hooks fire once per update, skipped ones included, and leave nothing behind."""
    scenario = SCENARIOS["2ranks-bf16-zero2-loop-native-gas3-none-round_robin_gradients-skip"]
    engine = build(scenario)
    before = dict(engine.__dict__)
    events: list[tuple[str, int, int]] = []

    def record(what: str) -> Callable[[], None]:
        return lambda: events.append((what, engine.global_steps, engine.micro_steps))

    names = ("update", "step", "load", "destroy")
    attached = Hooks(engine, *(record(name) for name in names))
    refusals.expect(UsageError, "already attached", lambda: Hooks(engine, *(record(name) for name in names)))
    train(engine, scenario, 3)  # the last one is skipped
    assert engine.skipped_steps == 1
    assert events == [(w, s, m) for i in range(3) for w, s, m in (("update", i, 3 * i + 2), ("step", i + 1, 3 * i + 3))]
    assert engine.step.__wrapped__.__func__ is type(engine).step
    events.clear()
    engine.load_checkpoint(str(folder / "nothing"))
    assert [e[0] for e in events] == ["update"]  # nothing may be read while masters are overwritten, if there were any
    events.clear()
    engine.save_checkpoint(str(folder / "deepspeed"))
    engine.load_checkpoint(str(folder / "deepspeed"))
    assert [e[0] for e in events] == ["update", "load"]
    attached.detach()
    attached.detach()
    assert {k: v for k, v in engine.__dict__.items() if k in before}.keys() == before.keys()
    assert not {"step", "_take_model_step", "load_checkpoint", "destroy"} & (engine.__dict__.keys() - before.keys())
    events.clear()
    train(engine, scenario, 1)
    assert events == []
    Hooks(engine, *(record(name) for name in names))
    engine.destroy()
    engine.destroy()
    assert [e[0] for e in events] == ["destroy"]


def loaded(_: str, folder: Path) -> None:
    """After DeepSpeed's own load, which replaces the tensors of the optimizer, a snapshot holds the engine's state."""
    scenario = Scenario(ranks=2, dtype="bf16", zero=2, base="foreach", model="native")
    engine = build(scenario)
    state = attach(engine)
    train(engine, scenario, 2)
    engine.save_checkpoint(str(folder / "own"))
    held, _blob = snapshot(state)
    train(engine, scenario, 1)
    assert snapshot(state)[0] != held
    engine.load_checkpoint(str(folder / "own"))
    assert snapshot(state)[0] == held
    engine.destroy()


def world(_: str, __: Path) -> None:
    """The side channel carries bytes of any length, and a maximum that is waited for later."""
    channel = TorchWorld(timeout_s=30)
    rank, size = dist.get_rank(), dist.get_world_size()
    assert (channel.rank, channel.size) == (rank, size)
    for length in (0, 1, 100_003):
        rows = channel.all_gather(bytes([rank + 1]) * (length if rank else 2 * length))
        assert rows == [bytes([r + 1]) * (length if r else 2 * length) for r in range(size)]
        payload = bytes(range(256)) * (length % 7)
        assert channel.broadcast(None if rank else payload) == payload
    assert channel.finish_max() is None
    channel.start_max([rank, 10 - rank, 2**62])
    refusals.expect(InternalError, "pending=True", lambda: channel.start_max([1]))
    assert channel.sum_up(array("q", [rank, 2**61, -1])).tolist() == [size * (size - 1) // 2, size * 2**61, -size]
    assert channel.all_gather(b"between") == [b"between"] * size
    assert channel.finish_max() == (size - 1, 10, 2**62)
    assert channel.finish_max() is None
    refusals.expect(InternalError, "values=9", lambda: channel.start_max([0] * 9))
    channel.start_max([3])
    channel.close()
    channel.close()
    refusals.expect(ClosedError, "closed", lambda: channel.all_gather(b""))

    impatient = TorchWorld(timeout_s=0.5)
    if rank == 0:  # the others never come
        refusals.expect(
            WaitTimeoutError, "all_gather timed out: rank=0 timeout_s=0.5", lambda: impatient.all_gather(b"x")
        )
    dist.barrier()
    impatient.close()


def routes(_: str, __: Path) -> None:
    """DeepSpeed's own layers are counted as their gates have chosen, in training alone, recomputation not again."""
    scenario = SCENARIOS["2ranks-bf16-zerobf16-foreach-native-gas3-none"]
    engine = build(scenario)
    counter = attach(engine).routes
    seen: list[np.ndarray] = []
    counter.begin(with_hooks=True)
    counter.install(lambda _, counts: seen.append(np.array(counts)))
    train(engine, scenario, 2)
    tokens, top_k = 3 * 5, 2
    assert [row.sum() for row in seen] == [tokens * top_k] * (2 * scenario.accumulation)
    assert counter.basis == "routed, before drops"
    layer = engine.module.middle.moe.deepspeed_moe
    layer.gate.drop_tokens = False
    assert counter.basis == "kept"
    refusals.expect(UsageError, "by itself: layer=0", lambda: counter.register(0, [1] * EXPERTS))
    seen.clear()
    engine.eval()
    engine(torch.zeros(3, 5, dtype=torch.int64))
    assert seen == []
    engine.train()
    x = torch.randn(2, 6, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    for use_reentrant in (True, False):
        out = checkpoint(engine.module.middle, x, use_reentrant=use_reentrant)
        out.float().sum().backward()
        assert torch.equal(torch.from_numpy(seen[-1]), layer.exp_counts)
    assert len(seen) == 2
    counter.remove()
    counter.remove()
    engine.module.middle(x)
    assert len(seen) == 2
    engine.destroy()

    engine = build(SCENARIOS["2ranks-fp32-zero2-config-stacked-gas3-warmup-parameter_alignment"])
    counter = attach(engine).routes
    counter.begin(with_hooks=True)
    counter.install(lambda _, counts: seen.append(counts))
    counter.register(0, torch.ones(EXPERTS, dtype=torch.int32))
    assert seen[-1].tolist() == [1] * EXPERTS
    for _ in range(2):  # as on an accelerator, whose sums are read later
        counter.add_on_device(0, torch.arange(EXPERTS))
    ((layer_index, sums),) = counter.take()
    assert (layer_index, sums.tolist()) == (0, [0, 2, 4, 6])
    assert counter.take() == []
    ones = torch.ones(EXPERTS, dtype=torch.int64)
    refusals.expect(UsageError, "layer=1", lambda: counter.add_on_device(1, ones))
    refusals.expect(UsageError, "shape=(3,)", lambda: counter.add_on_device(0, ones[:3]))
    refusals.expect(UsageError, "dtype=torch.float32", lambda: counter.add_on_device(0, ones.float()))
    engine.destroy()

    mixed = RouteCounter(torch.nn.ModuleList([Native(2), Stacked(2)]))
    mixed.begin(with_hooks=True)
    refusals.expect(UsageError, "beside others", lambda: mixed.register(0, ones))


CASES: dict[str, Callable[[str, Path], None]] = {
    "hooks": hooks,
    "load": load,
    "loaded": loaded,
    "moved": moved,
    "powers": powers,
    "refusals": refusals.run,
    "reshard": reshard,
    "routes": routes,
    "resume": resume,
    "rewind": rewind,
    "save": save,
    "stateful": stateful,
    "world": world,
}
