"""What only S3 has: credentials, endpoints and buckets, uploads in parts, long listings, and a server that lies."""

from __future__ import annotations

import logging
import os
import random
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from uuid import uuid4

import pytest

from moc.errors import (
    FencedError,
    IntegrityError,
    ManifestCorruptError,
    MocError,
    ShardCorruptError,
    StorageError,
    StoreDeniedError,
    StoreUnavailableError,
    UsageError,
)
from moc.repository import Repository
from moc.store.open import open_store
from moc.store.port import Store
from moc.store.remote import RemoteStore
from moc.store.retry import RetryingStore
from moc.store.s3 import REQUEST_TRIES
from moc.trace import Trace
from moc.verify import verify_checkpoint, verify_repository
from tests.support.clock import FakeClock
from tests.support.fault_proxy import Answer, Fault, FaultProxy, Harm, slow_down
from tests.support.repository import build_history
from tests.support.s3_server import S3Server

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 60.0
PART_BYTES = 5 * 2**20

CALLS: dict[str, Callable[[Store], object]] = {
    "put": lambda store: store.put("a", [memoryview(b"x")]),
    "create": lambda store: store.put("b", [memoryview(b"x")], create_only=True),
    "read": lambda store: store.read("a", limit_bytes=10),
    "read-into": lambda store: store.read_into("a", 0, memoryview(bytearray(1))),
    "list": lambda store: store.list(""),
    "delete": lambda store: store.delete("a"),
    "size": lambda store: store.size_bytes("a"),
}


@pytest.fixture(scope="module")
def proxy(s3_server: S3Server) -> Iterator[FaultProxy]:
    with FaultProxy(s3_server.port) as running:
        yield running


@pytest.fixture
def healed(proxy: FaultProxy) -> Iterator[FaultProxy]:
    yield proxy
    proxy.heal()


@pytest.fixture
def place(s3_bucket: str) -> str:
    return f"s3://{s3_bucket}/{uuid4().hex}/repository"


# Credentials, endpoints, buckets


@pytest.mark.parametrize("wrong", [{"secret": "not-the-secret"}, {"key": "nobody"}, {"token": "no-such-token"}])
def test_wrong_credentials_are_denied_by_every_call(s3_server: S3Server, place: str, wrong: dict[str, str]) -> None:
    clock = FakeClock()
    store = RetryingStore(RemoteStore(place, s3_server.options() | wrong), clock)

    for call in CALLS.values():
        with pytest.raises(StoreDeniedError) as caught:
            call(store)
        assert not any(value in str(caught.value) for value in wrong.values())

    assert clock.sleeps == []
    store.close()


def test_a_bucket_that_does_not_exist_is_a_wrong_url_for_every_call(s3_server: S3Server) -> None:
    store = RemoteStore("s3://no-such-bucket/repository", s3_server.options())

    for name, call in CALLS.items():
        with pytest.raises(StorageError, match="NoSuchBucket") as caught:
            call(store)
        assert type(caught.value) is StorageError, name
    store.close()


def test_an_endpoint_where_nobody_listens_is_unavailable(s3_server: S3Server, place: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody else gets the port, and nobody listens
        clock = FakeClock()
        options = s3_server.options(f"http://127.0.0.1:{taken.getsockname()[1]}")
        config = {"retries": {"total_max_attempts": 1}}
        store = RetryingStore(RemoteStore(place, options | {"config_kwargs": config}), clock, attempts=2)
        for call in CALLS.values():
            clock.sleeps.clear()
            with pytest.raises(StoreUnavailableError):
                call(store)
            assert len(clock.sleeps) == 1
        store.close()


@pytest.mark.parametrize("tail", ["", "/repository"])
def test_what_must_exist_is_not_missing_because_one_may_not_look(
    s3_server: S3Server, s3_bucket: str, tail: str
) -> None:
    options = s3_server.options() | {"secret": "not-the-secret"}
    with pytest.raises(StoreDeniedError):
        open_store(f"s3://{s3_bucket}{tail}", storage_options=options, must_exist=True)
    with pytest.raises(UsageError, match="nothing is stored"):
        open_store(f"s3://{s3_bucket}/nowhere", storage_options=s3_server.options(), must_exist=True)


@pytest.mark.parametrize("source", ["environment", "profile", "fsspec"])
def test_an_endpoint_from_around_the_process_does_not_weaken_the_fence(
    s3_server: S3Server, place: str, source: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in s3_server.environment().items():
        if source == "environment" or "ENDPOINT" not in name:
            monkeypatch.setenv(name, value)
    if source == "profile":
        (tmp_path / "config").write_text(f"[default]\nendpoint_url = {s3_server.endpoint}\n")
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    if source == "fsspec":
        import fsspec.config

        monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": s3_server.endpoint})
    store = RemoteStore(place)

    store.put("record", [memoryview(b"first")], create_only=True)
    with pytest.raises(FencedError):
        store.put("record", [memoryview(b"other")], create_only=True)

    assert store.read("record", limit_bytes=5) == b"first"
    assert not store.properties.create_only, "this server ignores the condition, so nothing may be promised"
    store.close()


def test_one_layer_repeats_and_not_three(s3_server: S3Server, healed: FaultProxy, place: str) -> None:
    store = RemoteStore(place, s3_server.options(healed.endpoint))
    fault = healed.inject(Fault(harm=slow_down()))

    with pytest.raises(StoreUnavailableError, match="SlowDown"):
        CALLS["list"](store)

    assert fault.hits == REQUEST_TRIES
    store.close()


# Secrets

SECRETS = {"key": "AKIAMOCEXAMPLE4TESTS", "secret": "hunter2/hunter2+secret", "token": "hunter2-session-token"}
VARIABLES = {"key": "AWS_ACCESS_KEY_ID", "secret": "AWS_SECRET_ACCESS_KEY", "token": "AWS_SESSION_TOKEN"}


@pytest.mark.parametrize("source", ["options", "environment", "url"])
def test_no_secret_is_shown_when_the_server_quotes_all_of_them(
    s3_server: S3Server,
    healed: FaultProxy,
    place: str,
    source: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    events: list[object] = []
    options = {name: value for name, value in s3_server.options(healed.endpoint).items() if name not in SECRETS}
    if source == "options":
        options |= SECRETS
    else:
        for name, value in SECRETS.items():
            monkeypatch.setenv(VARIABLES[name], value)
    if source == "url":
        place = place.replace("s3://", f"s3://{SECRETS['key']}:{SECRETS['secret']}@")
    caplog.set_level(logging.INFO)
    caplog.set_level(logging.DEBUG, logger="moc")
    options["config_kwargs"] = {"retries": {"total_max_attempts": 1}}
    remote = RemoteStore(place, options, trace=Trace(lambda *event: events.append(event)))
    store = RetryingStore(remote, FakeClock(), attempts=2, trace=Trace(lambda *event: events.append(event)))
    words = f"no {SECRETS['secret']} of {SECRETS['key']} with {SECRETS['token']} https://u:{SECRETS['secret']}@host/"
    shown = [repr(store), repr(remote), repr(remote.properties)]

    for answer in (Answer(status=403, code="SignatureDoesNotMatch", words=words), slow_down(words)):
        with healed.injected(Fault(harm=answer)):
            for call in CALLS.values():
                with pytest.raises(MocError) as caught:
                    call(store)
                shown += traceback.format_exception(caught.value)
                shown += [repr(caught.value), repr(caught.value.args), repr(caught.value.__cause__)]

    text = "\n".join([*shown, caplog.text, repr(events)])
    assert "hunter2" not in text
    assert SECRETS["key"] not in text
    assert "url=s3://" in text
    store.close()


# Large and many


def test_an_object_is_sent_in_parts_and_read_across_them(s3_server: S3Server, s3_bucket: str, place: str) -> None:
    store = RemoteStore(place, s3_server.options(), part_bytes=PART_BYTES)
    content = random.Random(5).randbytes(3 * PART_BYTES + 17)
    cuts = [0, 1, PART_BYTES - 1, PART_BYTES + 1, len(content)]
    segments = [memoryview(content)[begin:end] for begin, end in pairwise(cuts)]

    with ThreadPoolExecutor(3) as pool:
        for future in [pool.submit(store.put, f"objects/{number}", segments) for number in range(3)]:
            future.result(DEADLINE_S)

    assert [entry.size_bytes for entry in store.list("objects")] == [len(content)] * 3
    for offset, length in ((0, len(content)), (PART_BYTES - 3, 7), (2 * PART_BYTES, PART_BYTES), (len(content) - 1, 1)):
        target = bytearray(length)
        store.read_into("objects/1", offset, memoryview(target))
        assert target == content[offset : offset + length]
    assert not [key for key in s3_server.uploads(s3_bucket) if key.startswith(place.split("/", 3)[3])]
    store.close()


@pytest.mark.parametrize(("count", "page"), [(20, 3), pytest.param(2100, 1000, marks=pytest.mark.slow)])
def test_a_listing_of_more_than_one_page_is_whole(
    s3_server: S3Server, healed: FaultProxy, place: str, count: int, page: int
) -> None:
    options = {"s3_additional_kwargs": {"MaxKeys": page}}  # AWS's limit is 1000, this server's is larger
    store = RemoteStore(place, s3_server.options(healed.endpoint) | options)
    names = [f"objects/{number % 7}/{number:05d}" for number in range(count)]

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda name: s3_server.put_empty(f"{place}/{name}"), names))

    assert [entry.key for entry in store.list("")] == sorted(names)
    assert len([target for _, target in healed.requests if "list-type=2" in target]) > count // page
    assert len(store.list("objects/3")) == len([name for name in names if name.startswith("objects/3/")])
    store.close()


def test_places_that_begin_alike_do_not_see_each_other(s3_server: S3Server) -> None:
    bucket = s3_server.make_bucket()
    urls = [f"s3://{bucket}", f"s3://{bucket}/run", f"s3://{bucket}/run-2/", f"s3://{bucket}/run/deep"]
    stores = [RemoteStore(url, s3_server.options()) for url in urls]
    for number, store in enumerate(stores):
        store.put(f"a/{number}", [memoryview(b"x")])

    assert [[entry.key for entry in store.list("")] for store in stores] == [
        ["a/0", "run-2/a/2", "run/a/1", "run/deep/a/3"],
        ["a/1", "deep/a/3"],
        ["a/2"],
        ["a/3"],
    ]
    assert [entry.key for entry in stores[0].list("run")] == ["run/a/1", "run/deep/a/3"]
    for store in stores:
        store.close()


UPLOADER = """
import sys
from moc.store.remote import RemoteStore
store = RemoteStore(sys.argv[1], part_bytes=int(sys.argv[2]))
store.put("objects/half", [memoryview(bytes(3 * int(sys.argv[2])))])
"""


def test_a_process_killed_in_an_upload_leaves_nothing_visible_and_the_sweep_takes_the_parts(
    s3_server: S3Server, s3_bucket: str, healed: FaultProxy, place: str
) -> None:
    stalled = healed.inject(Fault(harm=Harm.STALL, method="PUT", target="partNumber=2"))
    process = subprocess.Popen(
        [sys.executable, "-c", UPLOADER, place, str(PART_BYTES)],
        env={**os.environ, **s3_server.environment(healed.endpoint)},
        cwd=ROOT,
    )
    try:
        stalled.wait_hit()
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(DEADLINE_S)

    store = RemoteStore(place, s3_server.options())
    other = RemoteStore(f"{place}/objects/hal", s3_server.options())
    assert store.list("") == []
    assert f"{place.split('/', 3)[3]}/objects/half" in s3_server.uploads(s3_bucket)
    assert (store.sweep(older_than_s=3600), other.sweep(older_than_s=0)) == (0, 0), "neither young ones nor others'"
    assert store.sweep(older_than_s=0, is_dry_run=True) == 1
    assert store.sweep(older_than_s=0) == 1
    assert f"{place.split('/', 3)[3]}/objects/half" not in s3_server.uploads(s3_bucket)
    for opened in (store, other):
        opened.close()


@pytest.mark.parametrize("answer", [Answer(status=403, code="AccessDenied"), Answer(status=501, code="NotImplemented")])
def test_who_may_not_list_uploads_leaves_them_to_the_bucket(
    s3_server: S3Server, healed: FaultProxy, place: str, answer: Answer
) -> None:
    spans: list[str] = []
    trace = Trace(lambda event, span, _: spans.append(span) if event == "begin" else None)
    store = RemoteStore(place, s3_server.options(healed.endpoint), trace=trace)
    fault = healed.inject(Fault(harm=answer, method="GET", target=r"\?uploads"))

    assert store.sweep(older_than_s=0) == 0

    assert fault.hits == 1
    assert spans == ["store.skip_sweep"]
    store.close()


# A server that lies: the port cannot tell right bytes from wrong ones of the same length; the layer above it can.

NEWEST = "000000000040"


@pytest.fixture(scope="module")
def history(s3_server: S3Server) -> str:
    """Write a repository once for all tests that only read it."""
    place = f"s3://{s3_server.make_bucket()}/run"
    store = RemoteStore(place, s3_server.options())
    build_history(store)
    store.close()
    return place


@pytest.mark.parametrize(
    ("target", "first", "expected"),
    [
        ("incarnations/000002", 1, ManifestCorruptError),
        (f"manifests/.*{NEWEST}", 1, ManifestCorruptError),
        (f"objects/.*{NEWEST}.*r00001-d", 1, ShardCorruptError),
        (f"objects/.*{NEWEST}.*r00000-e00", 3, ShardCorruptError),  # the header is read right, twice, then its data
    ],
)
def test_a_bit_that_flips_on_the_way_is_found_and_named(
    s3_server: S3Server, healed: FaultProxy, history: str, target: str, first: int, expected: type[IntegrityError]
) -> None:
    repository = Repository(RemoteStore(history, s3_server.options(healed.endpoint)))
    fault = healed.inject(Fault(harm=Harm.FLIP_ANSWER, method="GET", target=target, first=first))

    findings = verify_repository(repository).all_findings
    if not findings:  # only the data are wrong, and those are read where they are asked for
        newest = next(stored.name for stored in repository.checkpoints() if stored.name.step == int(NEWEST))
        findings = verify_checkpoint(repository, newest, read_data_fraction=1.0).findings

    assert fault.hits >= 1
    assert findings
    assert all(isinstance(finding.error, expected) for finding in findings), findings
    assert all(target.rpartition(".*")[2] in finding.key for finding in findings), findings
    repository.close()


def test_a_format_that_is_hidden_for_a_while_is_no_new_repository(
    s3_server: S3Server, healed: FaultProxy, history: str
) -> None:
    repository = Repository(RemoteStore(history, s3_server.options(healed.endpoint)))
    healed.inject(Fault(harm=Answer(status=404, code="NoSuchKey"), target="run/FORMAT"))

    with pytest.raises(IntegrityError, match="has manifests but no FORMAT"):
        repository.exists()

    healed.heal()
    assert repository.exists()
    repository.close()
