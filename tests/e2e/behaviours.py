"""What a manager promises beside exactness; every function runs on all ranks of a world and raises if it is not so."""

from __future__ import annotations

import random
import signal
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.moe.sharded_moe import MOELayer

from moc import Config
from moc.errors import (
    ClosedError,
    MismatchError,
    NoCheckpointError,
    SaveFailedError,
    StoreDeniedError,
    TopologyError,
    UsageError,
)
from moc.repository import Repository
from moc.store.open import open_store
from tests.adapters.cases import assembled, gathered, snapshot
from tests.adapters.cases import attach as capture_state
from tests.adapters.refusals import expect, plain
from tests.e2e.matrix import Case
from tests.e2e.place import Place
from tests.e2e.worker import Note, Training

__all__ = ["BEHAVIOURS", "run"]

DENSE = Case(
    model="dense", zero="1", dtype="fp32", ranks=2, accumulation=1, optimizer="adamw", skips=False, boundary="step",
    killed="all", source="memory",
)  # fmt: skip
NATIVE = replace(DENSE, model="native", zero="2", dtype="bf16", accumulation=3)
HOOKED = ("_take_model_step", "step", "load_checkpoint", "destroy")


def run(spec: Mapping[str, Any], note: Note, behaviours: Mapping[str, Callable[[Place, Note], None]]) -> None:
    """Run the named behaviours one after the other. The first that fails ends the world: its ranks may be anywhere."""
    for name in spec["behaviours"]:
        folder = Path(spec["folder"]) / name
        try:
            behaviours[name](Place(folder, Path(spec["runtime"])), note)
        except BaseException:
            note("behaviour", name=name, verdict=traceback.format_exc())
            raise
        note("behaviour", name=name, verdict="ok")


def attach_twice(place: Place, _: Note) -> None:
    """A second manager is refused before it does anything, and the first goes on."""
    training = Training(DENSE, seed=1)
    traces = place.folder / "traces"
    place.refuse(UsageError, "no trace can be written", training.engine, trace_dir="/proc/traces")
    manager = place.attach(training, trace_dir=traces)
    training.run(2, manager.step)

    place.refuse(UsageError, "already attached", training.engine, stateful=training.stateful)

    assert place.incarnations() == [(1, "start")]
    training.run(4, manager.step)
    handle = manager.save()
    handle.wait_committed(60)
    assert handle.step == 4
    assert place.committed() == [4]
    manager.detach()
    manager.detach()
    assert place.committed() == [4]
    ranks = [f"rank{rank:05d}.jsonl" for rank in range(dist.get_world_size())]
    assert sorted(path.name for path in traces.glob("rank*")) == ranks
    (agent,) = traces.glob("agent-*.jsonl")
    assert '"commit.put"' in agent.read_text()
    assert '"snapshot.copy"' in (traces / ranks[-1]).read_text()


def unsupported_engine(place: Place, _: Note) -> None:
    """An engine that is not on the list is refused by name, before anything exists."""
    for engine, words in (
        (plain(optimizer=torch.optim.SGD), "SGD allowed=AdamW,Adam,"),
        (plain(stage=3), "DeepSpeedZeroOptimizer_Stage3"),
        (plain(stage=0), "unsupported zero optimizer"),
    ):
        place.refuse(UsageError, words, engine)
        engine.destroy()
    assert not place.storage.exists()


def detached_engine(place: Place, _: Note) -> None:
    """Losses with a manager, and after it has left, are those of a job that knows none; nothing stays on the engine."""
    for case in (DENSE, NATIVE, replace(NATIVE, boundary="hook")):
        undisturbed = Training(case, seed=1)
        undisturbed.run(9)
        training = Training(case, seed=1)
        engine = training.engine
        keys, handler = engine.__dict__.keys(), signal.getsignal(signal.SIGTERM)
        before = {name: engine.__dict__[name] for name in keys}
        inside = Place(place.folder / f"{case.model}-{case.boundary}", place.runtime)

        manager = inside.attach(training)
        assert all(name in engine.__dict__ for name in HOOKED)
        assert signal.getsignal(signal.SIGTERM) != handler
        assert len(inside.stack_files(manager.run_id)) == 1
        training.run(5, manager.step if case.boundary == "step" else lambda: None)
        assert manager.status().boundary == ("manager.step()" if case.boundary == "step" else "hook")
        manager.detach()

        assert engine.__dict__.keys() == before.keys()
        assert all(engine.__dict__[name] is before[name] for name in before if callable(before[name]))
        assert signal.getsignal(signal.SIGTERM) == handler
        assert inside.stack_files(manager.run_id) == []
        assert inside.committed() == [5]
        training.run(9)
        assert training.losses == undisturbed.losses
        ours, theirs = training.digests(), undisturbed.digests()
        differing = [name for name in theirs if ours[name] != theirs[name]]
        assert not differing, differing


def chosen_steps(place: Place, _: Note) -> None:
    """`restore` takes the newest step, an earlier one, only the weights, or nothing."""
    first = Training(NATIVE, seed=1)
    manager = place.attach(first)
    assert manager.recovery is None
    assert manager.resume_step == 0
    first.run(3, manager.step)
    manager.save().wait_committed(60)
    at_three = first.digests()
    first.run(6, manager.step)
    manager.detach()
    assert place.committed() == [3, 6]

    again = Training(NATIVE, seed=2)
    expect(NoCheckpointError, "step=5 available=[3, 6]", lambda: place.attach(again, restore=5))
    manager = place.attach(again, restore=3)
    assert (manager.resume_step, manager.incarnation, manager.recovery.source) == (3, 2, "storage")
    assert again.digests() == at_three
    again.run(6, manager.step)
    assert again.losses == first.losses[3:]
    again.run(7, manager.step)
    manager.detach()

    newest = Training(NATIVE, seed=3)
    manager = place.attach(newest)
    assert manager.resume_step == 7
    assert manager.recovery.parent_incarnation == 2
    assert newest.digests() == again.digests()
    manager.detach()

    weights = Training(NATIVE, seed=4)
    manager = place.attach(weights, restore="weights")
    ours, theirs = weights.digests(), again.digests()
    names = [name for name in theirs if name.startswith(("master", "module")) and "module module" not in name]
    kept = [name for name in names if ours[name] != theirs[name]]
    buffers = {f"module {name}" for name, _ in weights.engine.module.named_buffers()}
    assert set(kept) <= buffers, kept
    assert manager.resume_step == 0
    assert weights.loader.used == 0
    assert all(not moments.any() for moments in _moments(weights.engine))
    weights.run(2, manager.step)
    manager.detach()

    fresh = Training(NATIVE, seed=5)
    before = fresh.digests()
    manager = place.attach(fresh, restore="never")
    assert manager.recovery is None
    assert manager.incarnation == 5
    assert {k: v for k, v in fresh.digests().items() if k in before} == before
    manager.detach()
    assert [reason for _, reason in place.incarnations()] == ["start", "recover", "recover", "weights", "start"]


def _moments(engine: Any) -> list[torch.Tensor]:
    states = engine.optimizer.optimizer.state.values()
    return [value for state in states for key, value in state.items() if key.startswith("exp_avg")]


def loaded_checkpoint(place: Place, _: Note) -> None:
    """A load of one of DeepSpeed's checkpoints begins a life of its own, which recovery follows."""
    training = Training(DENSE, seed=1)
    manager = place.attach(training)
    training.run(3, manager.step)
    training.engine.save_checkpoint(str(place.folder / "deepspeed"))
    training.run(5, manager.step)

    training.engine.load_checkpoint(str(place.folder / "deepspeed"))

    assert manager.incarnation == 2
    assert place.incarnations() == [(1, "start"), (2, "load_checkpoint")]
    assert training.engine.global_steps == 3
    training.run(4, manager.step)
    manager.save().wait_committed(60)
    state = training.digests()
    manager.detach()
    fresh = Training(DENSE, seed=2)
    manager = place.attach(fresh)
    assert (manager.resume_step, manager.recovery.parent_incarnation) == (4, 2)
    assert fresh.digests() == state
    manager.detach()


def stepped_engine(place: Place, _: Note) -> None:
    """An engine that has trained is not overwritten, unless the stored state is thrown away on purpose."""
    first = Training(DENSE, seed=1)
    manager = place.attach(first)
    first.run(4, manager.step)
    manager.detach()

    other = Training(DENSE, seed=2)
    other.run(2)
    before = other.digests()
    words = "the engine has already stepped: engine_step=2"
    place.refuse(MismatchError, words, other.engine, stateful=other.stateful)
    assert other.digests() == before
    manager = place.attach(other, restore="never")
    assert other.digests() == before
    other.run(3, manager.step)
    manager.detach()
    assert place.committed() == [3, 4]


def other_experiment(place: Place, _: Note) -> None:
    """A repository of another experiment is refused with every differing key; keys are allowed by name."""
    first = Training(DENSE, seed=1)
    manager = place.attach(first, fingerprint={"data": "a", "tokens": 1, "same": [1, 2]})
    first.run(2, manager.step)
    manager.detach()
    lives = place.incarnations()

    other = Training(DENSE, seed=2)
    given = {"stateful": other.stateful, "fingerprint": {"data": "b", "tokens": 2, "same": [1, 2]}}
    place.refuse(MismatchError, "data: stored='a' given='b'; tokens: stored=1 given=2", other.engine, **given)
    place.refuse(MismatchError, "; tokens: stored=1 given=2; allowed", other.engine, on_mismatch=["data"], **given)
    wider = Training(NATIVE, seed=3)
    place.refuse(MismatchError, "parameters", wider.engine, stateful=wider.stateful)
    expect(MismatchError, "run_id=else", lambda: place.attach(Training(DENSE, seed=4), run_id="else"))
    assert place.incarnations() == lives

    manager = place.attach_engine(other.engine, on_mismatch=["data", "tokens"], **given)
    assert manager.resume_step == 2
    manager.detach()


class Strange:
    """A stateful object whose state holds something that cannot be stored."""

    def state_dict(self) -> dict[str, Any]:
        return {"a": {"b": [1, object()]}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise AssertionError("never asked for")


def strange_objects(place: Place, _: Note) -> None:
    """What cannot be stored is named by its path, before anything exists."""
    training = Training(DENSE, seed=1)
    path = "state['stateful']['loader']['a']['b'][1]"
    place.refuse(UsageError, path, training.engine, stateful={"loader": Strange()})
    place.refuse(UsageError, "stateful=clock type=object", training.engine, stateful={"clock": object()})
    place.refuse(UsageError, "restore=-1", training.engine, restore=-1)
    place.refuse(UsageError, "restore='newest'", training.engine, restore="newest")
    assert not place.storage.exists()


def bad_storage(place: Place, _: Note) -> None:
    """A storage without rights, or that is no folder, is refused on every rank with one error."""
    training = Training(DENSE, seed=1)
    place.folder.mkdir(exist_ok=True)
    occupied = place.folder / "file"
    occupied.touch()
    denied = "/sys/kernel/moc-test"  # not writable even for root
    place.refuse(StoreDeniedError, denied, training.engine, storage=denied)
    place.refuse(UsageError, "not a folder above", training.engine, storage=occupied / "repository")
    place.refuse(UsageError, "nosuch", training.engine, storage="nosuch://bucket/run")
    manager = place.attach(training)  # the engine is as good as new
    training.run(2, manager.step)
    manager.detach()
    assert place.committed() == [2]


def one_bad_rank(place: Place, _: Note) -> None:
    """What is wrong on one rank is refused on all, with that rank's words."""
    training = Training(DENSE, seed=1)
    stateful = training.stateful if dist.get_rank() == 0 else {"loader": Strange()}
    place.refuse(UsageError, "rank=1", training.engine, stateful=stateful)
    place.refuse(TopologyError, "ranks [1]", training.engine, fingerprint={"data": dist.get_rank()})
    assert not place.storage.exists()


def failed_save(place: Place, _: Note) -> None:
    """A save that fails is told on the handle and stops nothing; the next one succeeds."""
    undisturbed = Training(DENSE, seed=1)
    undisturbed.run(8)
    training = Training(DENSE, seed=1)
    manager = place.attach(training)
    training.run(2, manager.step)
    dist.barrier()
    obstacle = place.storage / "objects"
    if dist.get_rank() == 0:
        obstacle.touch()  # a file where a folder has to be
    dist.barrier()

    expect(SaveFailedError, "save failed: step=2", lambda: manager.save().wait_committed(60))

    training.run(5, manager.step)
    dist.barrier()
    if dist.get_rank() == 0:
        obstacle.unlink()
    dist.barrier()
    manager.save().wait_committed(60)
    training.run(8, manager.step)
    manager.detach()
    expect(ClosedError, "detached", manager.step)
    expect(ClosedError, "detached", manager.save)
    assert place.committed() == [5, 8]
    assert training.losses == undisturbed.losses


def counted_routes(place: Place, _: Note) -> None:
    """In a partial mode DeepSpeed's own layers are counted without a line of the user's, as long as moc is attached."""
    training = Training(NATIVE, seed=1)
    manager = place.attach(training, config=Config(mode="partial", k_persist=1, timeout_s=60.0))
    training.run(3, manager.step)
    expect(UsageError, "by itself: layer=0", lambda: manager.register_routing(0, [1, 1, 1, 1]))
    assert manager.status().plt == 0.0
    layers = [module for module in training.engine.module.modules() if isinstance(module, MOELayer)]
    per_forward = [int(layer.exp_counts.sum()) for layer in layers]
    manager.detach()
    assert not any(layer._forward_hooks for layer in layers)
    assert place.committed() == [3]
    repository = Repository(open_store(str(place.storage)))
    (checkpoint,) = repository.checkpoints()
    routing = repository.read_manifest(checkpoint.name).routing
    repository.close()
    forwards = 3 * NATIVE.accumulation * NATIVE.ranks
    assert routing is not None
    assert routing.basis == "routed, before drops"
    assert [sum(row) for row in routing.routed] == [forwards * tokens for tokens in per_forward]
    assert routing.learned == routing.routed


def destroyed_engine(place: Place, _: Note) -> None:
    """Destroying the engine detaches first, so that its last step is durable."""
    training = Training(DENSE, seed=1)
    manager = place.attach(training)
    training.run(3, manager.step)
    training.engine.destroy()
    assert place.committed() == [3]
    manager.detach()


def resharded(place: Place, note: Note) -> None:
    """Train on, and tell the digests of the whole tensors before and after, whoever holds them."""
    case = replace(NATIVE, model="grouped", accumulation=1)
    random.seed(dist.get_rank())
    training = Training(case, seed=1 + dist.get_world_size())
    manager = place.attach(training)
    report = manager.recovery
    note(
        "resharded",
        resumed=manager.resume_step,
        source=None if report is None else report.source,
        notes=[] if report is None else list(report.notes),
        used=training.loader.used,
        before=_whole(training.engine),
    )
    last = manager.resume_step + 4
    training.run(last, manager.step)
    note(
        "trained",
        step=last,
        used=training.loader.used,
        after=_whole(training.engine),
        weights=_weights(training.engine),
    )
    if dist.get_world_size() == 4:
        manager.save().wait_committed(60)
        signal.raise_signal(signal.SIGKILL)
    manager.detach()


def _whole(engine: Any) -> dict[str, str]:
    tensors = assembled(gathered(snapshot(capture_state(engine))[0]))
    return {"/".join(map(str, key)): data.hex() for key, data in sorted(tensors.items())}


def _weights(engine: Any) -> dict[str, str]:
    return {n: p.detach().float().numpy().tobytes().hex() for n, p in engine.module.named_parameters()}


BEHAVIOURS: dict[str, Callable[[Place, Note], None]] = {
    behaviour.__name__: behaviour
    for behaviour in (
        attach_twice,
        unsupported_engine,
        detached_engine,
        chosen_steps,
        loaded_checkpoint,
        stepped_engine,
        other_experiment,
        strange_objects,
        bad_storage,
        one_bad_rank,
        failed_save,
        counted_routes,
        destroyed_engine,
        resharded,
    )
}
