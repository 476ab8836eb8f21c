"""Which spans each process has, and where it is killed at them: every row of the table in docs/operations.md."""

from __future__ import annotations

__all__ = ["AGENT", "ELSEWHERE", "FORCED", "STORE", "TRAINER"]

STORE = ("store.create", "store.write", "store.fsync", "store.rename", "store.fsync_directory")

TRAINER = (
    "attach.survey",
    "attach.record",
    "attach.begin",
    "recover.restore",
    "recover.read",
    "recover.apply",
    "snapshot.capture",
    "snapshot.stall",
    "snapshot.copy",
    "snapshot.seal",
    "save.take",
    *STORE,
)
"""At which a rank dies in a life that was recovered from memory: `crash/test_spans.py`."""

AGENT = (
    "save.persist",
    "persist.check",
    "persist.put",
    "commit.fence",
    "commit.put",
    "retention.list",
    "retention.condemn",
    "retention.drop",
    "retention.delete",
    *STORE,
    "store.delete",
)
"""At which the agent dies while it saves: `crash/test_spans.py`."""

FORCED = (
    "agent.adopt",
    "agent.begin",
    "agent.fence",
    "agent.leave",
    "agent.listen",
    "agent.reconnect",
    "agent.start",
    "detach.drain",
    "detach.seal",
    "life.renew",
    "rewind.record",
)
"""Which need a course of events of their own: `crash/test_transitions.py`."""

ELSEWHERE = {
    "extract.check": "cli/test_extraction.py kills at every span of a copy",
    "extract.create": "cli/test_extraction.py kills at every span of a copy",
    "extract.copy": "cli/test_extraction.py kills at every span of a copy",
    "extract.record": "cli/test_extraction.py kills at every span of a copy",
    "extract.commit": "cli/test_extraction.py kills at every span of a copy",
    "gc.condemn": "cli/test_collection.py kills at every span of a collection",
    "gc.delete": "cli/test_collection.py kills at every span of a collection",
    "gc.drop": "cli/test_collection.py kills at every span of a collection",
    "gc.fence": "cli/test_collection.py kills at every span of a collection",
    "gc.forget": "cli/test_collection.py kills at every span of a collection",
    "gc.list": "cli/test_collection.py kills at every span of a collection",
    "gc.settle": "cli/test_collection.py kills at every span of a collection",
    "gc.sweep": "cli/test_collection.py kills at every span of a collection",
    "replica.fetch": "peers/test_lost_node.py kills the agent of a replaced node at it",
    "replica.send": "peers/test_lost_node.py kills the agent at it",
    "store.skip_sweep": "does nothing but say so",
    "store.put": "of remote stores, which put in one request: the server has all of it or nothing",
    "store.wait_retry": "a pause between two requests",
    "agent.meet": "crash/test_nodes.py kills the agents of several nodes as their life begins",
    "save.gather": "crash/test_nodes.py kills agents in joint saves",
    "save.offer": "crash/test_partial_nodes.py kills agents in joint saves of experts in turn",
    "supervise.live": "the supervisor keeps nothing: its command's processes die as any others",
}
"""At which nobody is killed in the crash tests, with the place where it is done or the reason why not."""
