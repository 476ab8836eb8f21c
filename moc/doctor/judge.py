"""What looks wrong in the collected facts, worst first, each with what to do about it. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import moc
from moc.doctor.evidence import AgentFacts, Facts

__all__ = ["NOTE", "PROBLEM", "WARNING", "Symptom", "judge"]

PROBLEM, WARNING, NOTE = "problem", "warning", "note"
_ORDER = {PROBLEM: 0, WARNING: 1, NOTE: 2}
SILENCE_S = 15.0  # as at attach: a rank that is silent for longer, and for three of its steps, is taken for hung
INTERVALS = 3  # steps between snapshots, or between commits, that may pass before a missing one is worth a word
MEMORY_RESERVE_BYTES = 512 << 20
CLOCK_SKEW_S = 5.0
SLOW_ANSWER_S = 5.0
DESCRIPTORS = 256
LISTED = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Symptom:
    """Something that looks wrong: a fact with its values, and a hint."""

    severity: str
    text: str
    hint: str


def judge(facts: Facts) -> list[Symptom]:
    """Return what looks wrong, worst first."""
    found = [*_parts(facts), *_node(facts), *_repository(facts)]
    for agent in facts.agents:
        found += _agent(agent, facts)
    if not facts.agents:
        found.append(
            _note("no agent has lived under this runtime root", f"root={facts.runtime.get('root')}; see --runtime-root")
        )
    return sorted(found, key=lambda symptom: _ORDER[symptom.severity])


def _problem(text: str, hint: str) -> Symptom:
    return Symptom(severity=PROBLEM, text=text, hint=hint)


def _warning(text: str, hint: str) -> Symptom:
    return Symptom(severity=WARNING, text=text, hint=hint)


def _note(text: str, hint: str) -> Symptom:
    return Symptom(severity=NOTE, text=text, hint=hint)


def _parts(facts: Facts) -> Iterator[Symptom]:
    for part, trouble in sorted(facts.troubles.items()):
        if part == "repository":
            yield _problem(f"storage does not answer: {trouble}", "check mount, network and credentials; 'moc ls'")
        else:
            yield _warning(f"could not look at everything: part={part} {trouble}", "the bundle has what was found")


# The node


def _node(facts: Facts) -> Iterator[Symptom]:
    free = facts.node.get("available_bytes")
    if isinstance(free, int) and free < MEMORY_RESERVE_BYTES:
        yield _problem(
            f"memory is nearly exhausted: available_bytes={free}",
            "the out-of-memory killer may take agent or trainers; fewer versions, or a larger limit",
        )
    for level in facts.node.get("cgroups", ()):
        killed = re.search(r"^oom_kill ([1-9]\d*)", level.get("memory.events", ""), re.MULTILINE)
        if killed:
            yield _warning(
                f"the out-of-memory killer has been here: cgroup={level['path']} kills={killed[1]}",
                "compare memory.max with the arena and the trainers; see Sizing in docs/operations.md",
            )
    soft = facts.node.get("limits", {}).get("NOFILE", [DESCRIPTORS])[0]
    if 0 <= soft < DESCRIPTORS:
        yield _warning(f"few file descriptors are allowed: soft_limit={soft}", f"ulimit -n {DESCRIPTORS} or more")


# Agents


def _agent(agent: AgentFacts, facts: Facts) -> Iterator[Symptom]:
    status = agent.status
    if status is None:
        yield from _silent_agent(agent)
        return
    if status.get("version") != moc.__version__:
        yield _warning(
            f"the agent has another version: run={agent.run} agent={status.get('version')} moc={moc.__version__}",
            "the next launch replaces it",
        )
    yield from _ranks(agent, status)
    yield from _saves(agent, status)
    yield from _arena(agent)
    newest = facts.repository.get("newest_incarnation")
    mine = status.get("incarnation")
    if isinstance(newest, int) and isinstance(mine, int) and newest > mine:
        yield _problem(
            f"a newer life has begun elsewhere: run={agent.run} incarnation={mine} newest={newest}",
            "this job's saves are refused; was there a rewind, or a second launch on another machine?",
        )
    if "Traceback (most recent call last)" in agent.log_tail:
        yield _warning(f"the agent has logged a traceback: run={agent.run}", f"see {agent.folder}/agent.log")


def _silent_agent(agent: AgentFacts) -> Iterator[Symptom]:
    if not agent.is_listening:
        yield _note(f"no agent lives: run={agent.run}", "normal after a job has ended; the folder may be deleted")
        return
    state = next((str(row["state"]) for row in agent.processes if row["pid"] == agent.pid), "unknown")
    hint = f"kill -CONT {agent.pid}" if state == "stopped" else "see its stacks in the bundle; it holds the snapshots"
    yield _problem(f"the agent does not answer: run={agent.run} pid={agent.pid} state={state}", hint)


def _ranks(agent: AgentFacts, status: dict[str, Any]) -> Iterator[Symptom]:
    rows = [row for row in status.get("ranks", ()) if row.get("incarnation") == status.get("incarnation")]
    ended = [row["rank"] for row in rows if not row.get("alive")]
    living = [row for row in rows if row.get("alive")]
    if ended and living:
        yield _problem(
            f"ranks have ended while others live: run={agent.run} ended={ended[:LISTED]} "
            f"alive={[row['rank'] for row in living][:LISTED]}",
            "the others hang in their next collective; start the job again, nothing that was sealed is lost",
        )
    elif ended:
        yield _note(f"all ranks have ended: run={agent.run} ranks={len(ended)}", "the agent keeps what they sealed")
    for row in living:
        patience_s = max(SILENCE_S, INTERVALS * (row.get("beat_interval_ns") or 0) * 1e-9)
        age_s = row.get("beat_age_s")
        if age_s is not None and age_s > patience_s:
            where = _place_in(agent, f"rank{row['rank']:05d}")
            yield _problem(
                f"a rank is silent: run={agent.run} rank={row['rank']} pid={row['pid']} step={row.get('beat_step')} "
                f"seconds={age_s:.0f} at={where}",
                "see its stacks in the bundle; 'moc run --hang-timeout' restarts such a job",
            )
    for row in agent.processes:
        if row["pid"] != agent.pid and row["state"] in ("stopped", "traced"):
            yield _problem(f"a trainer is {row['state']}: run={agent.run} pid={row['pid']}", f"kill -CONT {row['pid']}")
    programs = {row.get("executable") for row in agent.processes if row["pid"] != agent.pid}
    versions = {row.get("version") for row in living} - {None}
    if len(versions) > 1 or len(programs - {""}) > 1:
        yield _problem(
            f"ranks run different software: run={agent.run} versions={sorted(map(str, versions))} "
            f"programs={sorted(map(str, programs))}",
            "start all ranks from one environment",
        )


def _saves(agent: AgentFacts, status: dict[str, Any]) -> Iterator[Symptom]:
    if "previous save is still under way" in str(status.get("last_error")):
        yield _warning(f"storage is slower than persist_every: run={agent.run}", "raise persist_every")
    elif status.get("last_error"):
        yield _problem(
            f"the last save failed: run={agent.run} reason={status['last_error']}",
            "training goes on; the Runbook in docs/operations.md has the usual causes",
        )
    config = ((agent.diagnosis or {}).get("descriptor") or {}).get("config") or {}
    steps = [row.get("beat_step") or 0 for row in status.get("ranks", ()) if row.get("alive")]
    for what, step, every in (
        ("no snapshot of all ranks", status.get("global_step"), config.get("snapshot_every")),
        ("no checkpoint", status.get("last_committed_step"), config.get("persist_every")),
    ):
        if steps and every and min(steps) - (step or 0) > INTERVALS * every:
            sealed = {row["rank"]: row.get("sealed_step") for row in status.get("ranks", ())}
            yield _problem(
                f"{what} for more than {INTERVALS} intervals: run={agent.run} step={min(steps)} last={step} "
                f"every={every} sealed={dict(list(sealed.items())[:LISTED])}",
                "trainers log 'snapshot skipped', the agent 'save failed', with the reason",
            )


def _arena(agent: AgentFacts) -> Iterator[Symptom]:
    for row in ((agent.diagnosis or {}).get("arena") or {}).get("ranks", ()):
        if row.get("corrupt"):
            yield _problem(
                f"seal records are corrupt: run={agent.run} rank={row['rank']} records={row['corrupt']}",
                "bits changed in memory: check the machine; recovery takes the next candidate",
            )


def _place_in(agent: AgentFacts, name: str) -> str:
    """Return the innermost frame of the thread that a process began with, from its stacks."""
    text = next((str(row["text"]) for row in agent.stacks if row["name"] == name), "")
    frames = re.findall(r"most recent call first\):\n\s+(File .*)", text)
    return frames[-1] if frames else "unknown"


# The repository


def _repository(facts: Facts) -> Iterator[Symptom]:
    found = facts.repository
    if found.get("exists") is False:
        yield _warning(f"there is no repository: url={found.get('url')}", "is -r right, is the file system mounted?")
        return
    for finding in found.get("findings", ())[:LISTED]:
        yield _problem(f"a record is unreadable: {finding}", "'moc verify' names everything that is wrong")
    for row in found.get("checked", ()):
        for finding in row["findings"][:LISTED]:
            yield _problem(f"a checkpoint is not sound: name={row['name']} {finding}", "'moc verify --read-data'")
    answer_s = found.get("answer_s")
    if answer_s is not None and answer_s > SLOW_ANSWER_S:
        yield _warning(f"storage answers slowly: seconds={answer_s:.1f}", "saves may take longer than persist_every")
    sizes = [row["size_bytes"] for row in found.get("checked", ()) if row["size_bytes"]]
    free = found.get("free_bytes")
    if sizes and free is not None and free < 2 * max(sizes):
        yield _problem(
            f"storage is nearly full: free_bytes={free} checkpoint_bytes={max(sizes)}",
            "make room, or lower keep_last; 'moc verify' lists unreferenced objects",
        )
    ahead_s = max((row["modified_s"] - facts.epoch_s for row in found.get("checkpoints", ())), default=0.0)
    if ahead_s > CLOCK_SKEW_S:
        yield _warning(
            f"clocks differ: a checkpoint is {ahead_s:.0f} s in the future of this machine",
            "times are shown to people only; set the clock all the same",
        )
