"""Print how fast one agent's snapshots get into another's memory, beside plain TCP with the same checksums.

Two processes on this machine's loopback. *moc*: the courier of one agent and the reception of another, as they are in
production: an offer, the bytes of what the host lacks, every checksum compared there, the seal. *tcp*: the same bytes
from the same arena through one socket into an arena of the same layout, and the same checksums. Both take turns inside
each repeat; the first repeat is thrown away. The courier's limit of bytes per second is lifted: what is measured is
what a byte costs. Then a partial snapshot is sent, and one transfer is watched: what lies in the sockets, and by how
much the processes' own memory grows.

    python benchmarks/replication.py
    python benchmarks/replication.py --mib 64 --repeats 3         a look, not a result
"""

import argparse
import multiprocessing
import os
import resource
import socket
import statistics
import sys
import tempfile
import threading
import time
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: the repository's root must be searched, not this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np

from benchmarks.machine import machine_facts
from moc._native import crc32c
from moc.agent.guests import Guests
from moc.agent.loans import Loans
from moc.agent.peers.courier import Courier, Delivery, Parcel
from moc.agent.peers.proof import Membership
from moc.agent.peers.reception import Reception
from moc.agent.peers.transport import Routes, Transport
from moc.format.manifest import Incarnation, encode_incarnation
from moc.host import SystemHost
from moc.plan.layout import arrange_arena
from moc.snapshot.arena import Arena, descriptor_room
from moc.snapshot.parcel import parcel_bytes, unit_ranges
from moc.snapshot.seal import SealRecord
from moc.state import Expert, RankCatalog, Shard, shard_order
from moc.trace import Trace

MIB = 2**20
LAYERS, EXPERTS = 4, 16
DENSE_SHARE = 0.1  # of a snapshot; the rest are experts
SAMPLE_S = 0.002
UNLIMITED = 1e12  # bytes per second
LIFE = Incarnation(run="bench", number=1, token="0" * 8, parent=None, reason="start", fingerprint={})
DIGEST = "0" * 16
MEMBERS = [Membership(run="bench", incarnation=1, node=node, nodes=2, secret="bench") for node in (0, 1)]


@dataclass(frozen=True)
class Sample:
    """One transfer: bytes on the wire, seconds until they are checked, processor seconds of sender and receiver."""

    size_bytes: int
    seconds: float
    sender_s: float
    receiver_s: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=256, help="size of a snapshot")
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    for name, value in machine_facts(Path(tempfile.gettempdir())).items():
        print(f"{name}: {value}")
    with Source(options.mib * MIB) as source, Receiver(source.catalog) as receiver:
        rows: dict[str, list[Sample]] = {"tcp": [], "moc": []}
        for repeat in range(options.repeats + 1):
            found = {"tcp": source.send_plain(receiver), "moc": source.send(receiver)}
            if repeat:
                for name, sample in found.items():
                    rows[name].append(sample)
        report(rows)
        full = rows["moc"][-1].size_bytes
        for fresh in (EXPERTS, 4, 1):
            sample = source.send(receiver, fresh=fresh)
            print(
                f"K = {fresh:2} of {EXPERTS}: {sample.size_bytes / 1e6:.1f} MB on the wire, "
                f"{100 * sample.size_bytes / full:.1f} % of the full snapshot, {sample.seconds * 1e3:.0f} ms"
            )
        watch(source, receiver)
    return 0


def report(rows: dict[str, list[Sample]]) -> None:
    print("| | median GB/s | range | sender CPU s/GB | receiver CPU s/GB | x tcp |\n|---|---:|---:|---:|---:|---:|")
    for name, samples in rows.items():
        rates = [sample.size_bytes / sample.seconds / 1e9 for sample in samples]
        pairs = zip(rows["tcp"], samples, strict=True)
        ratios = [one.seconds * other.size_bytes / one.size_bytes / other.seconds for one, other in pairs]
        costs = [
            statistics.median(seconds / sample.size_bytes * 1e9 for seconds, sample in zip(each, samples, strict=True))
            for each in ([s.sender_s for s in samples], [s.receiver_s for s in samples])
        ]
        print(
            f"| {name} | {statistics.median(rates):.2f} | {min(rates):.2f} - {max(rates):.2f} "
            f"| {costs[0]:.2f} | {costs[1]:.2f} | {statistics.median(ratios):.2f} |"
        )


def watch(source: "Source", receiver: "Receiver") -> None:
    """Send one more, and print the most that was on its way at any look."""
    pids = {"sender": os.getpid(), "receiver": receiver.pid}
    port, done, peaks = receiver.port, threading.Event(), {"sockets": 0, "sender": 0, "receiver": 0}
    before = {name: _anonymous_bytes(pid) for name, pid in pids.items()}

    def look() -> None:
        while not done.wait(SAMPLE_S):
            peaks["sockets"] = max(peaks["sockets"], _queued_bytes(port))
            for name, pid in pids.items():
                peaks[name] = max(peaks[name], _anonymous_bytes(pid) - before[name])

    thread = threading.Thread(target=look)
    thread.start()
    source.send(receiver)
    done.set()
    thread.join()
    print("on its way at most: " + ", ".join(f"{name} {value / MIB:.1f} MiB" for name, value in peaks.items()))


class Source:
    """A node's arena with one rank, and the courier to the other node."""

    def __init__(self, size_bytes: int) -> None:
        self.catalog = make_catalog(size_bytes)
        described = {"run": "bench", "versions": 2, "catalogs": [self.catalog.to_json()]}
        layout = arrange_arena((self.catalog,), versions=2, descriptor_bytes=descriptor_room(described))
        self.arena = Arena.create(described, layout, name="bench")
        self._step = 0
        self._known: tuple[int, str] | None = None
        self._told: list[Delivery] = []
        self._ended = threading.Event()
        self._courier = Courier(
            MEMBERS[0], 1, stall_s=10.0, pace=UNLIMITED, on_end=self._note, host=SystemHost(), trace=Trace()
        )
        self._numbers = np.random.default_rng(1)
        self._record: SealRecord | None = None

    def __enter__(self) -> "Source":
        return self

    def __exit__(self, *_: object) -> None:
        self._courier.close()
        self.arena.close()

    def seal(self, fresh: int) -> SealRecord:
        """Seal a snapshot in which so many experts of every layer, and the dense part, are new."""
        self._step += 1
        layout, shards, former = self.arena.rank_layout(0), self.catalog.shards, self._record
        version = self._step % 2
        slots, steps = array("I", [version] * len(layout.units)), array("Q", [self._step] * len(layout.units))
        crcs = array("I", bytes(4 * len(shards)))
        for number, unit in enumerate(layout.units):
            is_fresh = unit.expert is None or (unit.expert.index + self._step) % EXPERTS < fresh
            if former is not None and not is_fresh:
                slots[number], steps[number] = former.slots[number], former.steps[number]
                crcs[unit.first : unit.first + unit.count] = former.crcs[unit.first : unit.first + unit.count]
                continue
            if former is not None:
                slots[number] = 1 - former.slots[number]
            for index, position in enumerate(unit.positions, start=unit.first):
                offset = self.arena.slot_offset(0, number, slots[number]) + position
                with self.arena.view(offset, shards[index].size_bytes) as view:
                    if not any(view[:64]):
                        view[:] = self._numbers.bytes(len(view))
                    view[:8] = self._step.to_bytes(8, "little")
                    crcs[index] = crc32c(view)
        self._record = SealRecord(
            run="bench", incarnation=1, step=self._step, rank=0, flags=0, attempt=f"00{self._step:06d}",
            digest=DIGEST, state_bytes=0, state_crc32c=crc32c(b""), slots=slots, steps=steps, crcs=crcs,
        )  # fmt: skip
        return self._record

    def send(self, receiver: "Receiver", *, fresh: int = EXPERTS) -> Sample:
        """Replicate a new snapshot."""
        record = self.seal(fresh)
        moment = (record.step, record.attempt)
        parcel = Parcel(
            arena=self.arena, records={0: record}, moment=moment, token=LIFE.token, known=self._known,
            url=f"http://127.0.0.1:{receiver.port}",
        )  # fmt: skip

        def act() -> int:
            self._ended.clear()
            self._courier.send(parcel)
            self._ended.wait()
            delivery = self._told.pop()
            if delivery.error is not None:
                raise RuntimeError(delivery.error)
            return delivery.size_bytes

        self._known = moment
        return measure(receiver, act)

    def send_plain(self, receiver: "Receiver") -> Sample:
        """Send a new snapshot through a socket."""
        record = self.seal(EXPERTS)
        units = range(len(record.slots))
        ranges = list(unit_ranges(self.arena, record, units))

        def act() -> int:
            with socket.create_connection(("127.0.0.1", receiver.ask("plain", record))) as sender:
                for offset, length in ranges:
                    with self.arena.view(offset, length) as view:
                        sender.sendall(view)
            receiver.answer()
            return parcel_bytes(self.arena, record, tuple(units))

        return measure(receiver, act)

    def _note(self, delivery: Delivery) -> None:
        self._told.append(delivery)
        self._ended.set()


def measure(receiver: "Receiver", act: Callable[[], int]) -> Sample:
    before = (_cpu_s(), receiver.ask("cpu"))
    began_s = time.perf_counter()
    size_bytes = act()
    seconds = time.perf_counter() - began_s
    return Sample(size_bytes, seconds, _cpu_s() - before[0], receiver.ask("cpu") - before[1])


class Receiver:
    """The other node, a process of its own."""

    def __init__(self, catalog: RankCatalog) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=receive, args=(theirs, catalog.to_json()))
        self._process.start()
        theirs.close()  # so that its end is seen here
        self.pid: int = self._process.pid or 0
        self.port: int = self.answer()

    def __enter__(self) -> "Receiver":
        return self

    def __exit__(self, *_: object) -> None:
        self.ask("end")
        self._process.join()

    def ask(self, *words: object) -> Any:
        self._pipe.send(words)
        return self.answer()

    def answer(self) -> Any:
        return self._pipe.recv()


def receive(pipe: Connection, row: dict[str, Any]) -> None:
    """Hold replicas as node 1, and take what comes through a plain socket, until told to end."""
    catalog, guests, routes = RankCatalog.from_json(row), Guests(), Routes()
    described = {
        "run": "bench", "versions": 2, "catalogs": [], "digest": DIGEST, "guests": [{"node": 0, "catalogs": [row]}],
        "lineage": [encode_incarnation(LIFE).decode()],
    }  # fmt: skip
    guests.begin_life(LIFE, described)
    layout = arrange_arena((catalog,), versions=2, descriptor_bytes=descriptor_room(described))
    plain = Arena.create({"versions": 2, "catalogs": [row]}, layout, name="plain")
    Reception(guests, Loans(guests)).add_to(routes)
    transport = Transport(routes, address="127.0.0.1", port=0, host=SystemHost())
    transport.enter(MEMBERS[1])
    pipe.send(transport.port)
    while True:
        match pipe.recv():
            case ("cpu",):
                pipe.send(_cpu_s())
            case ("plain", SealRecord() as record):
                with socket.create_server(("127.0.0.1", 0)) as listener:
                    pipe.send(listener.getsockname()[1])
                    _take_plain(listener, plain, record)
                pipe.send(None)
            case _:
                break
    transport.close()
    guests.close()
    plain.close()
    pipe.send(None)


def _take_plain(listener: socket.socket, arena: Arena, record: SealRecord) -> None:
    """Take all bytes of a snapshot where they belong, and compare their checksums."""
    peer, _ = listener.accept()
    with peer:
        for offset, length in unit_ranges(arena, record, range(len(record.slots))):
            with arena.view(offset, length) as view:
                reached = 0
                while reached < length:
                    reached += peer.recv_into(view[reached:])
    arena.check(record)


def make_catalog(size_bytes: int) -> RankCatalog:
    """Return what one rank seals: a dense part, and in every layer experts of three parts each."""
    dense = int(size_bytes * DENSE_SHARE) // 12
    expert = int(size_bytes * (1 - DENSE_SHARE)) // (12 * LAYERS * EXPERTS)
    names: Iterable[tuple[str, int, Expert | None]] = [
        ("dense", dense, None),
        *(
            (f"layers.{layer}.experts.{index}", expert, Expert(layer=layer, index=index))
            for layer in range(LAYERS)
            for index in range(EXPERTS)
        ),
    ]
    shards: Sequence[Shard] = [
        Shard(tensor=name, part=part, dtype="F32", shape=(length,), offset=0, length=length, expert=unit)
        for name, length, unit in names
        for part in ("exp_avg", "exp_avg_sq", "master")
    ]
    return RankCatalog(rank=0, shards=tuple(sorted(shards, key=shard_order)), state_capacity_bytes=4096)


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _anonymous_bytes(pid: int) -> int:
    rows = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(row.split()[1]) * 1024 for row in rows if row.startswith("RssAnon"))


def _queued_bytes(port: int) -> int:
    """Return what lies in the send and receive queues of this port's connections."""
    total = 0
    for row in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = row.split()
        if port in (int(fields[1].rpartition(":")[2], 16), int(fields[2].rpartition(":")[2], 16)):
            total += sum(int(each, 16) for each in fields[4].split(":"))
    return total


if __name__ == "__main__":
    raise SystemExit(main())
