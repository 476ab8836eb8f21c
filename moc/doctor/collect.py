"""What a bundle is made of: this machine, every agent of this user's, the processes around them, the repository.

Each part has its own thread and deadline, and keeps what it has found when it is given up: a hung disk, a stopped agent
or a trainer that waits in a collective costs its own part only. Nothing here writes to the repository or asks an agent
for more than a report.
"""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moc.agent.client import AgentClient
from moc.agent.runtime import LOG_NAME, SOCKET_NAME, default_root, existing_root, open_private
from moc.agent.stacks import collect_stacks, facts_of_process
from moc.clock import Clock
from moc.doctor.evidence import AgentFacts, Facts
from moc.doctor.node import allowed_environment, environment_of, mount_of, node_facts, secrets_of
from moc.errors import IntegrityError, MocError, ObjectMissingError, StoreUnavailableError, UsageError
from moc.format.canonical import load_json
from moc.format.keys import incarnation_key, manifest_key
from moc.format.manifest import RECORD_LIMIT_BYTES
from moc.repository import Repository, StoredCheckpoint
from moc.store.open import open_store
from moc.store.redact import redact_url, secret_values
from moc.verify import check_structure

__all__ = ["collect"]

LOG_TAIL_BYTES = 1 << 20
MANIFESTS = 20  # newest ones whose content is taken
CHECKED = 3  # newest ones whose headers are checked
INCARNATIONS = 100
AGENTS = 16


def collect(*, storage: str | None, run_id: str | None, root: Path | None, clock: Clock, timeout_s: float) -> Facts:
    """Look at everything. `storage` None: where the only live job stores, if that is a folder of this machine.

    Blocks: at most three times `timeout_s`. Raises: nothing but defects; what fails is in `troubles`.
    """
    facts = Facts(epoch_s=time.time())
    _within(facts, "node", timeout_s, lambda: facts.node.update(node_facts()))
    _within(facts, "agents", 2 * timeout_s, lambda: _look_at_agents(facts, run_id, root, clock, timeout_s))
    facts.secrets |= secrets_of(environment_of("self"))
    place = storage if storage is not None else _place_of(facts.agents)
    if place is not None:
        facts.secrets |= secret_values(place, {})
        found: dict[str, Any] = {"url": redact_url(place)}
        _within(facts, "repository", timeout_s, lambda: _look_at_repository(found, place, clock))
        facts.repository = dict(found)  # what comes too late changes nothing any more
    return facts


def _within(facts: Facts, part: str, timeout_s: float, act: Callable[[], object]) -> None:
    """Do a part on a thread of its own, given up at the deadline: one in a hung system call cannot be ended."""

    def run() -> None:
        try:
            act()
        except (MocError, OSError) as error:
            facts.troubles[part] = f"{type(error).__name__}: {error}"
        except Exception as error:  # noqa: BLE001 - the thread's top: what one part meets must not cost the others
            facts.troubles[part] = f"InternalError: {type(error).__name__}: {error}"

    thread = threading.Thread(target=run, name=f"moc-doctor-{part}", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if thread.is_alive():
        facts.troubles[part] = f"not finished within {timeout_s:.0f} s"


# Agents


def _look_at_agents(facts: Facts, run_id: str | None, root: Path | None, clock: Clock, timeout_s: float) -> None:
    facts.runtime["root"] = str(default_root() if root is None else root)
    base = existing_root(root)
    if base is None:
        return
    facts.runtime["files"] = sorted(str(path.relative_to(base)) for path in base.glob("*") if path.is_file())
    folders = [path for path in sorted(base.iterdir()) if path.is_dir() and run_id in (None, path.name)]
    newest_first = sorted(folders, key=lambda path: -path.stat().st_mtime)
    for folder in newest_first[:AGENTS]:
        agent = AgentFacts(run=folder.name, folder=str(folder))
        facts.agents.append(agent)
        _look_at_agent(facts, agent, folder, clock, timeout_s / 3)


def _look_at_agent(facts: Facts, agent: AgentFacts, folder: Path, clock: Clock, timeout_s: float) -> None:
    agent.log_tail = _tail(folder / LOG_NAME)
    agent.is_listening, agent.pid = _listener(folder)
    try:
        client = AgentClient.connect(folder, timeout_s=timeout_s)
        try:
            agent.status = dict(client.status())
            agent.diagnosis = dict(client.request("diagnose")[0])
        finally:
            client.close()
    except MocError as error:
        agent.silence = str(error)
    agent.stacks = [
        {"name": report.name, "pid": report.pid, "text": report.text, "problem": report.problem}
        for report in collect_stacks(folder, clock=clock, timeout_s=timeout_s)
    ]
    rows = (agent.status or {}).get("ranks", [])
    pids = {agent.pid, *(row["pid"] for row in rows if row.get("alive")), *(row["pid"] for row in agent.stacks)}
    for pid in sorted(pid for pid in pids if isinstance(pid, int)):
        environment = environment_of(pid)
        facts.secrets |= secrets_of(environment)
        agent.processes.append({**facts_of_process(pid), "environment": allowed_environment(environment)})


def _listener(folder: Path) -> tuple[bool, int | None]:
    """Return whether somebody listens, and who: the kernel connects to a stopped process too, and knows its pid."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(folder / SOCKET_NAME))
        except (TimeoutError, BlockingIOError):
            return True, None  # too many wait already
        except OSError:
            return False, None
        pid, _, _ = struct.unpack("3i", probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return True, int(pid) or None


def _tail(path: Path) -> str:
    try:
        with open_private(path, 0) as stream:
            stream.seek(0, 2)
            stream.seek(max(stream.tell() - LOG_TAIL_BYTES, 0))
            return stream.read(LOG_TAIL_BYTES).decode("utf-8", "replace")
    except (OSError, UsageError) as error:
        return f"(no log: {error})"


def _place_of(agents: list[AgentFacts]) -> str | None:
    """Return the folder of the only live job; a URL is shown without credentials, and so of no use here."""
    places = {str(agent.status["storage"]) for agent in agents if agent.status and agent.status.get("storage")}
    (place,) = places if len(places) == 1 else (None,)
    return place if place is not None and place.startswith("/") else None


# The repository


def _look_at_repository(found: dict[str, Any], place: str, clock: Clock) -> None:
    began_s = clock.now_s()
    store = open_store(place)
    found["is_local"] = store.properties.is_local
    if store.properties.is_local:
        found["mount"] = mount_of(store.properties.url)
    repository = Repository(store)
    try:
        found["exists"] = repository.exists()
        found["answer_s"] = clock.now_s() - began_s
        found["free_bytes"] = store.free_bytes()
        if found["exists"]:
            _read_repository(found, repository)
    finally:
        repository.close()


def _read_repository(found: dict[str, Any], repository: Repository) -> None:
    """Fill `found`, value by whole value: it may be looked at before this ends."""
    listed = repository.checkpoints()
    found["checkpoints"] = [{"name": str(row.name), "modified_s": row.modified_s} for row in listed]
    records, findings = repository.incarnations()
    found["findings"] = [str(finding) for finding in findings]
    found["lineage"] = [
        {"incarnation": link.incarnation, "last_step": link.last_step, "is_known": link.is_known}
        for link in repository.lineage()
    ]
    found["newest_incarnation"] = max((record.number for record in records), default=None)
    keys = [incarnation_key(record.run, record.number) for record in records[-INCARNATIONS:]]
    found["incarnations"] = {key: _record(repository, key) for key in keys}
    checked: list[dict[str, object]] = []
    for row in reversed(listed[-CHECKED:]):
        checked.append(_check(repository, row))
        found["checked"] = list(checked)
    keys = [manifest_key(row.name) for row in listed[-MANIFESTS:]]
    found["manifests"] = {key: _record(repository, key) for key in keys}


def _record(repository: Repository, key: str) -> object:
    """Return a record as it is stored, or why it cannot be had: it may be dropped by retention meanwhile."""
    try:
        return load_json(repository.store.read(key, limit_bytes=RECORD_LIMIT_BYTES))
    except (IntegrityError, ObjectMissingError, ValueError, RecursionError) as error:
        return {"unreadable": f"{type(error).__name__}: {error!s:.300}"}


def _check(repository: Repository, row: StoredCheckpoint) -> dict[str, object]:
    """Check manifest and headers of a checkpoint; no data are read."""
    try:
        manifest = repository.read_manifest(row.name)
        _, findings = check_structure(repository, manifest)
    except StoreUnavailableError:
        raise
    except MocError as error:
        return {"name": str(row.name), "size_bytes": None, "findings": [str(error)]}
    return {"name": str(row.name), "size_bytes": manifest.size_bytes, "findings": [str(f) for f in findings]}
