"""What `moc doctor` has found, as values: what is judged, and what the bundle is written from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["AgentFacts", "Facts"]


@dataclass(slots=True, kw_only=True)
class AgentFacts:
    """One runtime folder: who listens there, what it says, and what the kernel says of it and its trainers."""

    run: str
    folder: str
    pid: int | None = None
    is_listening: bool = False
    """Whether an agent lives there, answering or not."""
    status: dict[str, Any] | None = None
    diagnosis: dict[str, Any] | None = None
    silence: str | None = None
    """Why there is no status."""
    log_tail: str = ""
    stacks: list[dict[str, Any]] = field(default_factory=list)
    processes: list[dict[str, object]] = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class Facts:
    """Everything that was found; filled while the collection runs, so that a part given up keeps what it has."""

    epoch_s: float
    node: dict[str, Any] = field(default_factory=dict)
    runtime: dict[str, object] = field(default_factory=dict)
    agents: list[AgentFacts] = field(default_factory=list)
    repository: dict[str, Any] = field(default_factory=dict)
    troubles: dict[str, str] = field(default_factory=dict)
    """By part: why it is not whole."""
    secrets: set[str] = field(default_factory=set)
    """What must not leave this process."""
