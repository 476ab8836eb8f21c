"""A real S3 server behind a proxy that answers badly: every fault for every call, once and for good.

What passes is repeated within bounds and succeeds; what stays is one error of the right class; nothing is ever a wrong
answer. Waits between repetitions take no time, because the test owns the clock.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from uuid import uuid4

import pytest
from _pytest.mark import ParameterSet

from moc.errors import FencedError, ObjectMissingError, StorageError, StoreDeniedError, StoreUnavailableError
from moc.store.port import Store
from moc.store.remote import RemoteStore
from moc.store.retry import RetryingStore
from tests.support.clock import FakeClock
from tests.support.fault_proxy import (
    Answer,
    Fault,
    FaultProxy,
    Harm,
    expired_token,
    internal_error,
    missing,
    slow_down,
)
from tests.support.s3_server import S3Server

PART_BYTES = 5 * 2**20  # the least that S3 takes
SMALL = random.Random(1).randbytes(100_000)
LARGE = random.Random(2).randbytes(2 * PART_BYTES + 1234)
ATTEMPTS = 3


@dataclass(slots=True)
class Bench:
    """A store behind the proxy, the clock of its repetitions, and a store that goes to the server directly."""

    proxy: FaultProxy
    store: Store
    direct: RemoteStore
    clock: FakeClock
    server: S3Server

    @property
    def bucket(self) -> str:
        return self.direct.properties.url.split("/")[2]

    def uploads(self) -> list[str]:
        return self.server.uploads(self.bucket)


@pytest.fixture(scope="module")
def proxy(s3_server: S3Server) -> Iterator[FaultProxy]:
    with FaultProxy(s3_server.port) as running:
        yield running


@pytest.fixture(scope="module")
def stores(s3_server: S3Server, proxy: FaultProxy) -> Iterator[tuple[RemoteStore, RemoteStore]]:
    """Open one place through the proxy and directly; clients are made once, because that takes longest."""
    url = f"s3://{s3_server.make_bucket()}/{uuid4().hex}/repository"
    config = {"retries": {"total_max_attempts": 1}, "read_timeout": 0.5}
    options = s3_server.options(proxy.endpoint) | {"config_kwargs": config}
    harmed = RemoteStore(url, options, patience_s=1.0, part_bytes=PART_BYTES)
    direct = RemoteStore(url, s3_server.options())
    yield harmed, direct
    harmed.close()
    direct.close()


@pytest.fixture
def bench(s3_server: S3Server, proxy: FaultProxy, stores: tuple[RemoteStore, RemoteStore]) -> Iterator[Bench]:
    proxy.heal()
    harmed, direct = stores
    wanted = {"folder/a": b"a", "small": SMALL}
    present = {entry.key for entry in direct.list("")}
    for key in sorted(present - wanted.keys()):
        direct.delete(key)
    for key in sorted(wanted.keys() - present):
        direct.put(key, [memoryview(wanted[key])])
    clock = FakeClock()
    store = RetryingStore(harmed, clock, attempts=ATTEMPTS, chance=random.Random(0))
    yield Bench(proxy, store, direct, clock, s3_server)
    proxy.heal()
    direct.sweep(older_than_s=0)


# The calls: each does one thing and checks that its answer is the right one, as seen by the store without faults.


def put_small(bench: Bench) -> None:
    bench.store.put("new", [memoryview(SMALL)])
    assert bench.direct.read("new", limit_bytes=len(SMALL)) == SMALL


def put_parts(bench: Bench) -> None:
    bench.store.put("new", [memoryview(LARGE)])
    assert bench.direct.read("new", limit_bytes=len(LARGE)) == LARGE


def create(bench: Bench) -> None:
    bench.store.put("record", [memoryview(SMALL)], create_only=True)
    assert bench.direct.read("record", limit_bytes=len(SMALL)) == SMALL


def read(bench: Bench) -> None:
    assert bench.store.read("small", limit_bytes=len(SMALL)) == SMALL


def read_into(bench: Bench) -> None:
    target = bytearray(50_000)
    bench.store.read_into("small", 777, memoryview(target))
    assert target == SMALL[777:50_777]


def list_all(bench: Bench) -> None:
    assert [(entry.key, entry.size_bytes) for entry in bench.store.list("")] == [("folder/a", 1), ("small", len(SMALL))]


def delete(bench: Bench) -> None:
    bench.store.delete("small")
    assert [entry.key for entry in bench.direct.list("")] == ["folder/a"]


def size(bench: Bench) -> None:
    assert bench.store.size_bytes("small") == len(SMALL)


Call = Callable[[Bench], None]
CALLS: dict[str, tuple[Call, str, str]] = {
    # name: (call, method and target of the request that is harmed)
    "put": (put_small, "PUT", "new"),
    "put-begin": (put_parts, "POST", r"\?uploads"),
    "put-part": (put_parts, "PUT", "partNumber=2"),
    "put-complete": (put_parts, "POST", "uploadId="),
    "put-check": (put_small, "HEAD", "new"),
    "create": (create, "PUT", "record"),
    "read": (read, "GET", "small"),
    "read-into": (read_into, "GET", "small"),
    "list": (list_all, "GET", "list-type=2"),
    "delete": (delete, "DELETE", "small"),
    "size": (size, "HEAD", "small"),
}
PASSING: dict[str, Answer | Harm] = {
    "slow-down": slow_down(),
    "internal-error": internal_error(),
    "unavailable": Answer(status=503, code="ServiceUnavailable"),
    "request-timeout": Answer(status=400, code="RequestTimeout"),
    "bad-digest": Answer(status=400, code="BadDigest"),
    **{harm.name.lower().replace("_", "-"): harm for harm in Harm if harm is not Harm.FLIP_ANSWER},
}
READS = {"read", "read-into", "list"}
BODIES = {"put", "put-part", "create"}
HEADS = {"put-check", "size"}  # an answer without a body: only its status tells what is wrong


def is_possible(call: str, fault: str) -> bool:
    """Return whether the fault can be told from a right answer in the request that this call makes."""
    if fault in {"cut", "short"}:
        return call in READS
    if fault in {"flip-request", "stall-unread"}:
        return call in BODIES - ({"put-part"} if fault == "stall-unread" else set())
    return not (fault in {"request-timeout", "bad-digest"} and call in HEADS)


TYPICAL = {"put", "read-into"}  # calls for which every fault is tried by default
SLOW_CALLS = {"put-begin", "put-complete"}  # calls that send an object in parts before the harmed request
QUICK_ONCE = {"slow-down", "error-after", "flip-request", "cut", "short"}


def case(call: str, fault: str, quick: Collection[str]) -> ParameterSet:
    """Return a parameter; what only repeats in another request what a quick case shows is left to the long run."""
    is_quick = call in TYPICAL or (fault in quick and (call not in SLOW_CALLS or fault == "error-after"))
    return pytest.param(call, fault, marks=[] if is_quick else [pytest.mark.slow])


CASES = [(call, fault) for call in CALLS for fault in PASSING if is_possible(call, fault)]


@pytest.mark.parametrize(("call", "fault"), [case(*names, QUICK_ONCE) for names in CASES])
def test_a_fault_that_passes_is_repeated_and_the_answer_is_right(bench: Bench, call: str, fault: str) -> None:
    act, method, target = CALLS[call]
    injected = bench.proxy.inject(Fault(harm=PASSING[fault], method=method, target=target, count=1))

    act(bench)

    assert injected.hits == 1
    assert len(bench.clock.sleeps) <= 1
    assert len(bench.uploads()) == is_lost(call, fault), "what was begun in parts is completed or aborted"


def is_lost(call: str, fault: str) -> bool:
    """Return whether the server began an upload whose id nobody was told."""
    return call == "put-begin" and fault in {"reset-after", "error-after"}


PERMANENT = {"slow-down", "internal-error", "reset-before", "reset-after", "error-after", "short", "flip-request"}
FOUND_AGAIN = {("create", "reset-after"), ("create", "error-after")}  # what it made is found by the look before the put


@pytest.mark.parametrize(
    ("call", "fault"),
    [case(*names, {"slow-down"}) for names in CASES if names[1] in PERMANENT and names not in FOUND_AGAIN],
)
def test_a_fault_that_stays_is_unavailable_within_the_budget(bench: Bench, call: str, fault: str) -> None:
    act, method, target = CALLS[call]
    injected = bench.proxy.inject(Fault(harm=PASSING[fault], method=method, target=target))

    with pytest.raises(StoreUnavailableError, match=f"url={bench.direct.properties.url}"):
        act(bench)

    assert ATTEMPTS <= injected.hits <= 2 * ATTEMPTS  # a reset on a used connection is repeated once by the client
    assert len(bench.clock.sleeps) == ATTEMPTS - 1
    assert len(bench.uploads()) == injected.hits * is_lost(call, fault)
    assert bench.direct.sweep(older_than_s=3600) == 0
    assert bench.direct.sweep(older_than_s=0) == injected.hits * is_lost(call, fault)
    assert bench.uploads() == []


@pytest.mark.parametrize("fault", [pytest.param("stall", marks=pytest.mark.slow), "stall-unread"])
def test_a_server_that_stays_silent_is_given_up_within_bounds(bench: Bench, fault: str) -> None:
    bench.proxy.inject(Fault(harm=PASSING[fault], method="PUT", target="new"))

    with pytest.raises(StoreUnavailableError):
        put_small(bench)

    assert len(bench.clock.sleeps) == ATTEMPTS - 1
    with pytest.raises(ObjectMissingError):
        bench.direct.size_bytes("new")


DENIALS = {
    "expired": (expired_token(), StoreDeniedError),
    "expired-as-aws": (Answer(status=400, code="ExpiredToken"), StoreDeniedError),
    "denied": (Answer(status=403, code="AccessDenied"), StoreDeniedError),
    "no-bucket": (Answer(status=404, code="NoSuchBucket"), StorageError),
    "not-implemented": (Answer(status=501, code="NotImplemented"), StorageError),
}


@pytest.mark.parametrize(
    ("call", "denial"),
    [case(call, denial, {"expired"}) for call in CALLS if call not in HEADS for denial in DENIALS],
)
def test_what_no_repetition_mends_is_raised_at_once(bench: Bench, call: str, denial: str) -> None:
    answer, expected = DENIALS[denial]
    act, method, target = CALLS[call]
    injected = bench.proxy.inject(Fault(harm=answer, method=method, target=target))

    with pytest.raises(expected, match=answer.code) as caught:
        act(bench)

    assert type(caught.value) is expected
    assert injected.hits == 1
    assert bench.clock.sleeps == []
    assert bench.uploads() == []


@pytest.mark.parametrize("fault", ["reset-after", "error-after"])
def test_a_creation_whose_answer_is_always_lost_finds_its_own_bytes(bench: Bench, fault: str) -> None:
    injected = bench.proxy.inject(Fault(harm=PASSING[fault], method="PUT", target="record"))

    create(bench)

    assert injected.hits >= 1
    with pytest.raises(FencedError):
        bench.store.put("record", [memoryview(b"other")], create_only=True)


def test_a_condition_that_fails_on_ones_own_success_is_no_fence(bench: Bench, s3_server: S3Server) -> None:
    # The client repeats the request after an answer that got lost; a server that honours the condition refuses then.
    config = {"retries": {"total_max_attempts": 2}}
    patient = RemoteStore(
        bench.direct.properties.url, s3_server.options(bench.proxy.endpoint) | {"config_kwargs": config}
    )
    lost = bench.proxy.inject(Fault(harm=Harm.ERROR_AFTER, method="PUT", target="record", count=1))
    failed = Answer(status=412, code="PreconditionFailed")
    refused = bench.proxy.inject(Fault(harm=failed, method="PUT", target="record", count=1))

    patient.put("record", [memoryview(SMALL)], create_only=True)

    assert (lost.hits, refused.hits) == (1, 1)
    assert bench.direct.read("record", limit_bytes=len(SMALL)) == SMALL
    patient.close()


@pytest.mark.parametrize("call", ["put", "put-part", "put-complete", "put-check", "create", "list"])
def test_an_answer_that_something_is_missing_is_repeated_where_nothing_can_be(bench: Bench, call: str) -> None:
    act, method, target = CALLS[call]
    injected = bench.proxy.inject(Fault(harm=missing(), method=method, target=target, count=2))

    act(bench)

    assert injected.hits == 2


@pytest.mark.parametrize("call", ["put", "put-begin", "create", "list"])
def test_a_missing_answer_that_stays_is_neither_success_nor_an_empty_store(bench: Bench, call: str) -> None:
    act, method, target = CALLS[call]
    bench.proxy.inject(Fault(harm=missing(), method=method, target=target))

    with pytest.raises(StoreUnavailableError):
        act(bench)
