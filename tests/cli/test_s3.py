"""The command line against a real S3 server: what works, and how each way of being refused ends."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from moc.store.remote import RemoteStore
from tests.cli.console import moc
from tests.support.repository import build_history
from tests.support.s3_server import SECRET_KEY, S3Server

ONE_TRY = {"FSSPEC_S3": json.dumps({"config_kwargs": {"retries": {"total_max_attempts": 1}}})}  # below moc's own
VERBS = {
    "ls": ("ls",),
    "show": ("show", "20"),
    "verify": ("verify", "20"),
    "restore": ("restore", "--step", "20", "--to", "copy"),
}


@pytest.fixture(scope="module")
def repository(s3_server: S3Server) -> Iterator[str]:
    """Write a repository and return its URL."""
    url = f"s3://{s3_server.make_bucket()}/runs/seven"
    store = RemoteStore(url, s3_server.options())
    build_history(store)
    yield url
    store.close()


def quick(verb: str, situation: str) -> bool:
    """Return whether the case is run by default: a few, since each starts an interpreter and a client."""
    return (verb, situation) in {("ls", "down"), ("show", "denied"), ("verify", "bucket")}


def test_a_repository_on_s3_is_listed_shown_checked_and_copied(
    repository: str, s3_server: S3Server, tmp_path: Path
) -> None:
    environment = s3_server.environment()

    listed = moc("ls", "-r", repository, env=environment)
    copied = moc("restore", "--step", "20", "--to", tmp_path / "copy", "-r", repository, env=environment)
    checked = moc("verify", "--read-data", "-r", repository, env=environment)

    assert (listed.returncode, copied.returncode, checked.returncode) == (0, 0, 0), listed.stderr + copied.stderr
    assert [line.split()[0] for line in listed.stdout.splitlines()[1:]] == ["10", "20", "30", "30", "40"]
    assert moc("verify", "--read-data", "-r", tmp_path / "copy").returncode == 0


@pytest.mark.parametrize(
    ("verb", "situation"),
    [
        pytest.param(verb, situation, marks=[] if quick(verb, situation) else [pytest.mark.slow])
        for verb in VERBS
        for situation in ("down", "denied", "bucket", "prefix")
    ],
)
def test_every_way_of_being_refused_has_its_exit_code(
    verb: str, situation: str, repository: str, s3_server: S3Server, tmp_path: Path
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody else gets the port, and nobody listens
        environment: Mapping[str, str] = s3_server.environment()
        url, code, words = repository, 5, ""
        match situation:
            case "down":
                environment = s3_server.environment(f"http://127.0.0.1:{taken.getsockname()[1]}") | ONE_TRY
                words = "(hint: try again later)"
            case "denied":
                environment = {**environment, "AWS_SECRET_ACCESS_KEY": "another-secret-than-the-right-one"}
                words = "(hint: check the rights of this user and the credentials)"
            case "bucket":
                url, words = "s3://no-such-bucket/runs/seven", "code=NoSuchBucket"
            case "prefix":
                url, code, words = f"{repository}-2", 3, "no moc repository here"

        result = moc(*VERBS[verb], "-r", url, env=environment, cwd=tmp_path)

    assert result.returncode == code, result.stderr
    assert words in result.stderr
    assert url in result.stderr
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.stderr
    assert SECRET_KEY not in result.stderr
    assert "another-secret" not in result.stderr
    assert list(tmp_path.iterdir()) == []
