"""Which URL opens which store, and what a wrong one is told."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from uuid import uuid4

import pytest

from moc.errors import MocError, StoreUnavailableError, UsageError
from moc.store.local import LocalStore
from moc.store.open import open_store
from moc.store.retry import RetryingStore


@pytest.mark.parametrize("form", ["{}", "file://{}", "file://localhost{}", "file:{}", "FILE://{}"])
def test_paths_and_file_urls_open_local_stores(tmp_path: Path, form: str) -> None:
    store = open_store(form.format(tmp_path / "repository"))
    store.put("a", [memoryview(b"x")])

    assert isinstance(store, LocalStore)
    assert store.properties.is_local
    assert (tmp_path / "repository" / "a").read_bytes() == b"x"


def test_a_file_url_is_decoded(tmp_path: Path) -> None:
    open_store(f"file://{tmp_path}/my%20runs").put("a", [memoryview(b"x")])

    assert (tmp_path / "my runs" / "a").exists()


def test_a_relative_path_counts_from_where_it_was_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = open_store("checkpoints")
    monkeypatch.chdir("/")

    store.put("a", [memoryview(b"x")])

    assert (tmp_path / "checkpoints" / "a").exists()


def test_other_urls_open_retrying_remote_stores() -> None:
    url = f"memory://{uuid4().hex}/repository"
    store = open_store(url, chance=random.Random(1))
    store.put("a/b", [memoryview(b"x")])

    assert isinstance(store, RetryingStore)
    assert store.properties.url == url
    assert not store.properties.is_local
    assert [entry.key for entry in open_store(url, must_exist=True).list("a")] == ["a/b"]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("", "empty"),
        ("  ", "empty"),
        ("a\0b", "NUL"),
        ("~/checkpoints", "not expanded"),
        ("s3:/bucket/x", r"only one slash.*allowed=s3://"),
        ("file://server/share", "no absolute path"),
        ("file://", "no absolute path"),
        ("s3x://bucket/x", "not understood url=s3x://bucket/x"),
        ("s3://", "names no place"),
        ("s3://bucket/x?token=hunter2", "no query"),
        ("simplecache::s3://bucket/x", "no chain"),
    ],
)
def test_a_url_that_cannot_be_served_is_refused_by_value(url: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        open_store(url)

    assert "allowed=" in str(caught.value) or "reason=" in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_a_url_that_names_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")

    for path in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / "file" / "far" / "below"):
        with pytest.raises(UsageError, match="not a folder"):
            open_store(str(path))


def test_a_dangling_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")

    with pytest.raises(UsageError, match="not a folder"):
        open_store(str(tmp_path / "link" / "repository"))


def test_what_must_exist_is_not_created(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        open_store(str(tmp_path / "repository"), must_exist=True)
    with pytest.raises(UsageError, match="nothing is stored there"):
        open_store(f"memory://{uuid4().hex}/repository", must_exist=True)

    assert os.listdir(tmp_path) == []


def test_a_path_takes_no_storage_options(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"options=\['key'\]") as caught:
        open_store(str(tmp_path), storage_options={"key": "hunter2"})

    assert "hunter2" not in str(caught.value)


def test_a_folder_without_rights_is_denied() -> None:
    if os.geteuid() != 0:
        pytest.fail("this test changes its user and therefore needs root")
    program = (
        "import os, sys\n"
        "from moc.errors import StoreDeniedError\n"
        "from moc.store.open import open_store\n"
        "os.setuid(65534)\n"
        "for path in sys.argv[1:]:\n"
        "    try:\n"
        "        open_store(path).put('a', [memoryview(b'x')])\n"
        "    except StoreDeniedError as error:\n"
        "        print(error)\n"
    )

    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are closed to other users
        os.chmod(folder, 0o755)
        os.mkdir(f"{folder}/closed", 0o700)
        os.mkdir(f"{folder}/readable", 0o755)
        paths = [f"{folder}/{name}" for name in ("closed", "closed/x", "readable", "readable/x")]
        done = subprocess.run(
            [sys.executable, "-c", program, *paths], capture_output=True, text=True, timeout=60, check=False
        )

    lines = done.stdout.splitlines()
    assert len(lines) == 4, done.stderr
    assert all(path in line for path, line in zip(paths, lines, strict=True))


def test_an_endpoint_that_does_not_answer_is_unavailable_and_no_secret_is_shown() -> None:
    secret = "hunter2-" + uuid4().hex
    options = {
        "key": "AKIAEXAMPLE",
        "secret": secret,
        "endpoint_url": "http://127.0.0.1:9",
        "config_kwargs": {"connect_timeout": 1, "retries": {"max_attempts": 0}},
    }

    with pytest.raises(MocError) as caught:
        open_store("s3://bucket/repository", storage_options=options, must_exist=True)

    assert isinstance(caught.value, StoreUnavailableError)
    assert secret not in str(caught.value)
    assert caught.value.__suppress_context__
