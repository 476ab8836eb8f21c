"""What an explicit save gives back: a handle to wait on."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moc.agent.client import AgentClient
from moc.agent.link import AgentLink
from moc.errors import MocError, SaveFailedError, WaitTimeoutError
from moc.host import Host

__all__ = ["SaveHandle"]

log = logging.getLogger(__name__)

WAIT_SLICE_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveHandle:
    """One explicit save, as this rank sees it."""

    step: int
    attempt: str
    problem: str | None
    link: AgentLink
    host: Host

    def wait_committed(self, timeout_s: float = 600.0) -> None:
        """Wait until the checkpoint is committed. Raises: SaveFailedError with the reason, WaitTimeoutError."""
        if self.problem is not None:
            raise SaveFailedError(f"save failed: step={self.step} reason={self.problem}")
        deadline_s = self.host.now_s() + timeout_s
        while True:
            left_s = deadline_s - self.host.now_s()
            if left_s <= 0:
                raise WaitTimeoutError(
                    f"save did not end in time: step={self.step} attempt={self.attempt} timeout_s={timeout_s}"
                )
            reply = self._ask(min(left_s, WAIT_SLICE_S))
            if reply["state"] == "committed":
                return
            if reply["state"] == "failed":
                raise SaveFailedError(f"save failed: step={self.step} attempt={self.attempt} reason={reply['reason']}")

    def _ask(self, slice_s: float) -> Mapping[str, Any]:
        """Ask the agent; while there is none, a new one is on its way and will find the seal."""
        try:
            client = AgentClient.connect(self.link.folder, timeout_s=WAIT_SLICE_S, host=self.host)
        except MocError:
            self.link.look()
            self.host.sleep(min(slice_s, 0.1))
            return {"state": "pending"}
        try:
            fields = {"step": self.step, "attempt": self.attempt, "timeout_s": slice_s}
            return client.request("wait", fields, timeout_s=slice_s + WAIT_SLICE_S)[0]
        except MocError as error:
            log.info("agent did not answer a wait: %s", error)
            return {"state": "pending"}
        finally:
            client.close()
