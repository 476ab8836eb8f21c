"""From facts to the files of a bundle, and to the summary that is printed."""

from __future__ import annotations

from dataclasses import asdict
from urllib.parse import quote

from moc.doctor.bundle import Bundle
from moc.doctor.evidence import AgentFacts, Facts
from moc.doctor.judge import Symptom

__all__ = ["secrets_to_hide", "summarize", "write_bundle"]

README = """What is in here (written by `moc doctor`; no credentials, no weights, no data of the training):

summary.json       what looks wrong, and the state in short
node.json          versions, processor, memory, limits, clocks, allowed environment variables
repository.json    mount, lineage, checkpoints, findings; records/ has incarnation records and newest manifests
agents/RUN/        status, diagnosis (life, arena, saves, last spans), processes, agent.log, stacks/
"""


def secrets_to_hide(facts: Facts) -> set[str]:
    """Return the secrets that were seen, in the forms in which libraries write them. Pure."""
    secrets = set(facts.secrets)
    return secrets | {quote(secret, safe="") for secret in secrets}


def write_bundle(bundle: Bundle, facts: Facts, symptoms: list[Symptom]) -> None:
    """Write everything that was found."""
    bundle.add_text("README.txt", README)
    bundle.add_json("summary.json", summarize(facts, symptoms))
    bundle.add_json("node.json", facts.node)
    bundle.add_json("runtime.json", facts.runtime)
    records = {kind: facts.repository.get(kind, {}) for kind in ("incarnations", "manifests")}
    bundle.add_json("repository.json", {k: v for k, v in facts.repository.items() if k not in records})
    for rows in records.values():
        for key, record in sorted(rows.items()):
            bundle.add_json(f"records/{key}", record)
    for agent in facts.agents:
        _add_agent(bundle, agent)


def summarize(facts: Facts, symptoms: list[Symptom]) -> dict[str, object]:
    """Return the short form: symptoms, and per agent and repository the few values that matter most. Pure."""
    agents = []
    for agent in facts.agents:
        status = agent.status or {}
        agents.append(
            {
                "run": agent.run,
                "folder": agent.folder,
                "pid": agent.pid,
                "is_answering": agent.status is not None,
                "silence": agent.silence,
                "incarnation": status.get("incarnation"),
                "global_step": status.get("global_step"),
                "last_committed_step": status.get("last_committed_step"),
                "last_error": status.get("last_error"),
                "ranks": status.get("ranks", []),
                "stacks": [{k: v for k, v in row.items() if k != "text"} for row in agent.stacks],
            }
        )
    checkpoints = facts.repository.get("checkpoints", [])
    return {
        "epoch_s": facts.epoch_s,
        "symptoms": [asdict(symptom) for symptom in symptoms],
        "versions": facts.node.get("versions", {}),
        "agents": agents,
        "repository": {
            "url": facts.repository.get("url"),
            "exists": facts.repository.get("exists"),
            "checkpoints": len(checkpoints),
            "newest": checkpoints[-1]["name"] if checkpoints else None,
        },
        "troubles": facts.troubles,
    }


def _add_agent(bundle: Bundle, agent: AgentFacts) -> None:
    place = f"agents/{agent.run}"
    bundle.add_json(f"{place}/status.json", agent.status if agent.status is not None else {"silence": agent.silence})
    if agent.diagnosis is not None:
        bundle.add_json(f"{place}/diagnosis.json", agent.diagnosis)
    bundle.add_json(f"{place}/processes.json", agent.processes)
    bundle.add_text(f"{place}/agent.log", agent.log_tail)
    for row in agent.stacks:
        text = str(row["text"]) or f"none: {row['problem']}\n"
        bundle.add_text(f"{place}/stacks/{row['name']}-{row['pid']}.txt", text)
