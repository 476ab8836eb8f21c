"""A real S3 client against a server that answers badly: each answer becomes the right error, and no secret is shown."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from aiobotocore.session import AioSession

from moc.errors import ObjectMissingError, StorageError, StoreDeniedError, StoreFullError, StoreUnavailableError
from moc.store.remote import RemoteStore

SECRET = "hunter2hunter2"


class AnsweringServer(ThreadingHTTPServer):
    """Gives every request the same answer."""

    status = 200
    code = ""
    cut_bytes = 0
    daemon_threads = True


class Answer(BaseHTTPRequestHandler):
    """One answer of an `AnsweringServer`."""

    server: AnsweringServer
    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        text = f"<Error><Code>{self.server.code}</Code><Message>no secret={SECRET}</Message></Error>"
        body = text.encode() if self.server.code else bytes(10 if self.command != "PUT" else 0)
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(body) + self.server.cut_bytes))
        self.send_header("Connection", "close")
        self.send_header("ETag", '"etag"')
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        self.close_connection = True

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = answer

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        """Keep the test's output quiet."""


@pytest.fixture
def server() -> Iterator[AnsweringServer]:
    with AnsweringServer(("127.0.0.1", 0), Answer) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield running
        running.shutdown()
        thread.join(timeout=10)


@pytest.fixture(scope="module")
def session() -> AioSession:
    """Return what clients can share; it takes longest to make."""
    return AioSession()


@pytest.fixture
def store(server: AnsweringServer, session: AioSession) -> Iterator[RemoteStore]:
    options = {
        "key": "name",
        "secret": SECRET,
        "endpoint_url": f"http://127.0.0.1:{server.server_port}",
        "config_kwargs": {"retries": {"max_attempts": 0}},
        "session": session,
    }
    opened = RemoteStore("s3://bucket/repository", options)
    yield opened
    opened.close()


CALLS: dict[str, Callable[[RemoteStore], object]] = {
    "put": lambda store: store.put("a", [memoryview(b"x")]),
    "read": lambda store: store.read("a", limit_bytes=10),
    "list": lambda store: store.list(""),
    "delete": lambda store: store.delete("a"),
}


@pytest.mark.parametrize("call", sorted(CALLS))
@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (403, "AccessDenied", StoreDeniedError),
        (503, "ServiceUnavailable", StoreUnavailableError),
        (500, "InternalError", StoreUnavailableError),
        (507, "XMinioStorageFull", StoreFullError),
    ],
)
def test_an_answer_decides_the_error(
    server: AnsweringServer, store: RemoteStore, call: str, status: int, code: str, expected: type[StorageError]
) -> None:
    server.status, server.code = status, code

    with pytest.raises(expected) as caught:
        CALLS[call](store)

    assert f"status={status}" in str(caught.value)
    assert "s3://bucket/repository" in str(caught.value)
    assert SECRET not in str(caught.value)
    assert caught.value.retryable == (expected is StoreUnavailableError)


@pytest.mark.parametrize("call", ["put", "list", "delete"])
def test_a_missing_bucket_is_neither_an_empty_store_nor_a_missing_object(
    server: AnsweringServer, store: RemoteStore, call: str
) -> None:
    server.status, server.code = 404, "NoSuchBucket"

    with pytest.raises(StorageError, match="NoSuchBucket") as caught:
        CALLS[call](store)

    assert not isinstance(caught.value, ObjectMissingError)
    assert not caught.value.retryable


def test_an_answer_that_breaks_off_is_unavailable_and_not_a_short_object(
    server: AnsweringServer, store: RemoteStore
) -> None:
    server.cut_bytes = 10

    with pytest.raises(StoreUnavailableError):
        store.read_into("a", 0, memoryview(bytearray(20)))


def test_a_put_is_only_done_when_the_stored_length_is_right(server: AnsweringServer, store: RemoteStore) -> None:
    assert server.status == 200

    with pytest.raises(StoreUnavailableError, match="total_bytes=1 stored_bytes=10"):
        CALLS["put"](store)
