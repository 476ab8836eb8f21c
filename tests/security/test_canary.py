"""Secrets stay where they came from: a whole job with passwords everywhere writes none of them anywhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest

from tests.cli.console import clean_env

ROOT = Path(__file__).resolve().parents[2]
CANARY = "c4nary"
PASSWORD = f"{CANARY}/Pass:word"
ENVIRONMENT = {
    "AWS_SECRET_ACCESS_KEY": f"{CANARY}+aws",
    "AWS_SESSION_TOKEN": f"{CANARY}+session",
    "WANDB_API_KEY": f"{CANARY}+wandb",
    "DATABASE_URL": f"postgres://me:{CANARY}@host/db",
    "VAULT_EXPECTED": PASSWORD,
}


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.slow)], ids=["one node", "two nodes"])
def job(request: pytest.FixtureRequest) -> tuple[Path, dict[str, list[object]]]:
    """The folder of a finished job, and what its processes and commands have said."""
    nodes = request.param
    with tempfile.TemporaryDirectory(prefix="moc-") as name:
        folder = Path(name)
        url = f"vault://me:{PASSWORD}@place{folder}/repo"
        environment = clean_env() | ENVIRONMENT | {"PYTHONPATH": f"{ROOT / 'tests/security/site'}:{ROOT}"}
        done = subprocess.run(
            [sys.executable, ROOT / "tests/security/canary_job.py", folder, url, str(nodes)],
            capture_output=True,
            text=True,
            timeout=200,
            env=environment,
            cwd=ROOT,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        assert CANARY not in done.stderr
        told = json.loads(done.stdout.splitlines()[-1])
        assert len(set(told["secrets"])) == (3 if nodes > 1 else 0), "each life of several nodes has its own"
        assert not any(secret in done.stderr for secret in told["secrets"])
        yield folder, told


def test_the_job_met_what_could_tell(job: tuple[Path, dict[str, list[object]]]) -> None:
    """The canary sings only if there was something to sing about: failed puts, refused passwords, a log, a bundle."""
    folder, told = job
    log = "".join(path.read_text() for path in sorted(folder.glob("rt*/canary/agent.log")))

    assert "save failed" in log
    assert "403 for" in log
    assert "retrying https://place" in log, "libraries' warnings are logged"
    assert "committed: name=" in log
    assert (folder / "repo" / "FORMAT").exists()
    assert any("StoreDeniedError" in str(text) for text in told["logs"]), "a wrong password was refused"
    assert {0, 3, 5} <= {row["code"] for row in told["said"]}, told["said"]  # type: ignore[index]
    assert any("moc.agent" in str(command) for command in told["commands"])
    if told["secrets"]:
        assert told["source"] == "peer memory", "replicas were fetched from another node"
        assert told["replicas_tell"]
        assert any("moc_replicated_step" in row["out"] for row in told["said"])  # type: ignore[index]


def test_replicas_hold_no_secret(job: tuple[Path, dict[str, list[object]]]) -> None:
    assert not any(job[1]["replicas_tell"])


def test_nothing_that_was_written_holds_a_secret(job: tuple[Path, dict[str, list[object]]]) -> None:
    folder, told = job
    files = [path for path in folder.rglob("*") if path.is_file()]

    assert len(files) > 10
    for path in files:
        content = path.read_bytes()
        assert CANARY.encode() not in content, path
        assert not any(str(secret).encode() in content for secret in told["secrets"]), path
        assert CANARY not in str(path)


def test_nothing_that_was_said_holds_a_secret(job: tuple[Path, dict[str, list[object]]]) -> None:
    _, told = job
    secrets = [str(secret) for secret in told["secrets"]]

    for row in told["said"]:
        assert not any(word in json.dumps(row) for word in (CANARY, *secrets)), row
    for text in told["logs"]:
        # What a library logs inside a trainer goes where the user's own logging sends it; the rest is moc's.
        mine = [line for line in str(text).splitlines() if not line.startswith("retrying https://place")]
        assert not any(word in "\n".join(mine) for word in (CANARY, *secrets)), text
    assert told["commands"]
    for command in told["commands"]:
        assert not any(word in str(command) for word in (CANARY, *secrets)), command


def test_no_file_of_the_bundle_holds_a_secret(job: tuple[Path, dict[str, list[object]]]) -> None:
    folder, told = job
    found = {}
    with tarfile.open(folder / "bundle.tar.gz") as bundle:
        for member in bundle:
            stream = bundle.extractfile(member)
            assert stream is not None
            found[member.name.partition("/")[2]] = stream.read().decode()

    assert {"node.json", "summary.json", "repository.json", "agents/canary/diagnosis.json"} <= set(found)
    assert "vault://place" in found["agents/canary/diagnosis.json"]
    assert found["agents/canary/agent.log"].count("committed") > 0
    for name, text in found.items():
        assert not any(word in text for word in (CANARY, *map(str, told["secrets"]))), name
        assert not any(value in text for value in ENVIRONMENT.values()), name
    assert not set(ENVIRONMENT) & set(found["node.json"].split('"')), "names that are not allowed are not there"
    assert os.stat(folder / "bundle.tar.gz").st_mode & 0o777 == 0o600
