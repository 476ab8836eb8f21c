"""What is shown, logged or traced of a storage: never its secrets, whatever users put into a URL."""

from __future__ import annotations

import json
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from moc.errors import MocError, UsageError
from moc.store.open import open_store
from moc.store.redact import redact_url, scrub, scrub_value, secret_values
from moc.store.remote import RemoteStore
from moc.trace import JsonLinesSink, Trace

CANARY = "c4nary/Secret"
URLS = [
    (f"s3://AKIA:{CANARY}@bucket/run", "s3://bucket/run"),
    (f"s3://AKIA:{CANARY}+?#@bucket/run", "s3://bucket/run"),
    (f"s3://AKIA:{CANARY}@x@bucket/run", "s3://bucket/run"),
    (f"s3://AKIA:{CANARY}", "s3://***"),
    (f"s3://{CANARY.replace('/', '-')}@bucket/run", "s3://bucket/run"),
    (f"s3:/AKIA:{CANARY}@bucket/run", "s3:/bucket/run"),
    (f"filecache::s3://AKIA:{CANARY}@bucket/run", "filecache::s3://bucket/run"),
    (f"https://host:443/a/b?X-Amz-Signature={CANARY}#{CANARY}", "https://host:443/a/b"),
    (f"ftp://me:{CANARY}@[::1]:21/run", "ftp://[::1]:21/run"),
]
INNOCENT = [
    "sftp://host:22/data@v2",
    "s3://arn:aws:s3:eu-west-1:123456789012:accesspoint/name/run@2",
    "s3://[fe80::1]:9000/bucket",
    "/data/runs/a@b:c",
    "checkpoints",
]


@pytest.mark.parametrize(("url", "shown"), URLS)
def test_no_part_of_a_password_in_a_url_is_shown(url: str, shown: str) -> None:
    assert redact_url(url) == shown
    assert "c4nary" not in scrub(f"cannot open {url}: refused", ())
    assert any("c4nary" in secret for secret in secret_values(url, {}))
    assert "c4nary" not in scrub(f"the server quotes {CANARY}", secret_values(f"s3://me:{CANARY}@b", {}))


@pytest.mark.parametrize("url", INNOCENT)
def test_a_url_without_secrets_is_shown_as_it_is(url: str) -> None:
    assert redact_url(url) == url
    assert secret_values(url, {}) == frozenset()


@pytest.mark.parametrize("url", [f"{url}{tail}" for url, _ in URLS for tail in ("", "\0")])
def test_a_url_that_is_refused_is_named_without_its_secrets(url: str) -> None:
    words = []
    try:
        open_store(url).close()
    except MocError as error:
        words = [str(error), repr(error.__cause__), *map(str, error.args)]
    assert not any("c4nary" in word for word in words), words


@pytest.mark.parametrize(
    "text",
    [
        f"Authorization: Bearer {CANARY}",
        f"authorization=Basic {CANARY}",
        f'{{"aws_secret_access_key": "{CANARY}"}}',
        f"password: {CANARY}\nsecond line: token={CANARY}",
        f"Retrying https://host/x?X-Amz-Signature={CANARY}&y=1",
    ],
)
def test_what_looks_like_a_secret_is_scrubbed_from_texts_of_many_lines(text: str) -> None:
    assert "c4nary" not in scrub(text)


def test_keys_of_a_repository_are_not_taken_for_secrets() -> None:
    text = "checksum mismatch: key=manifests/000001-run/000000000010-0123abcd.json key='objects/a/r00000-d.safetensors'"
    body = {"key": "objects/a", "token": "0123abcd", "tokens": 12, "secret_key": CANARY, "rows": [{"url": URLS[0][0]}]}

    assert scrub(text) == text
    assert scrub_value(body) == {
        "key": "objects/a",
        "token": "0123abcd",
        "tokens": 12,
        "secret_key": "***",
        "rows": [{"url": URLS[0][1]}],
    }


class QuotingFileSystem(MemoryFileSystem):
    """A client library whose errors quote what it was given, as many do."""

    protocol = "quoting"
    store = {}  # noqa: RUF012 - the base class's shared state, not to be shared here
    pseudo_dirs = [""]  # noqa: RUF012

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: object) -> None:
        raise OSError(f"403 for https://me:{CANARY}@host{path}?X-Amz-Signature={CANARY}")

    rm_file = pipe_file


def test_a_trace_of_a_failing_store_holds_no_secret(tmp_path: Path) -> None:
    fsspec.register_implementation("quoting", QuotingFileSystem, clobber=True)
    sink = JsonLinesSink(tmp_path / "trace.jsonl")
    store = RemoteStore(f"quoting://me:{CANARY}@place/x", trace=Trace(sink))
    for act in (lambda: store.put("a", [memoryview(b"x")]), lambda: store.delete("a")):
        with pytest.raises(MocError) as caught:
            act()
        assert "c4nary" not in str(caught.value)
    sink.close()

    text = (tmp_path / "trace.jsonl").read_text()

    assert [json.loads(line)["event"] for line in text.splitlines()] == ["begin", "error"] * 2
    assert "c4nary" not in text


def test_the_note_of_a_repository_does_not_depend_on_its_credentials() -> None:
    from moc.config import Config
    from moc.survey import Request

    digests = {
        Request(
            storage=f"s3://{user}@bucket/run",
            config=Config(),
            restore="auto",
            run_id=None,
            take_over=False,
            on_mismatch=(),
            runtime_root=None,
            agent_idle_s=1.0,
            fingerprint={},
        ).url_digest
        for user in ("one:two", f"AKIA:{CANARY}")
    }

    assert len(digests) == 1


def test_a_query_with_a_secret_is_refused_before_anything_is_stored() -> None:
    with pytest.raises(UsageError, match="no query") as caught:
        open_store(f"memory://place/x?token={CANARY}")

    assert "c4nary" not in str(caught.value)
