"""Agreement between ranks: every rank goes on, or every rank raises the same error naming the rank that caused it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TypeVar

from moc import errors
from moc.errors import InternalError, MocError, RankFailedError
from moc.training import World

__all__ = ["agree", "decide", "exchange"]

T = TypeVar("T")


def agree(world: World, act: Callable[[], T]) -> T:
    """Run `act` on every rank; if it raises a MocError anywhere, raise one error everywhere. Collective.

    Where all failures are of one class, that class is raised with the lowest rank's words; otherwise RankFailedError.
    What is not a MocError is a defect: the others learn of it as InternalError, this rank raises it as it is.
    """
    result: T | None = None
    failure: Exception | None = None
    try:
        result = act()
    except Exception as error:  # noqa: BLE001  # told to the other ranks first, then raised below
        failure = error
    verdicts = [json.loads(payload) for payload in world.all_gather(json.dumps(_describe(failure)).encode())]
    failures = {rank: verdict for rank, verdict in enumerate(verdicts) if verdict is not None}
    if not failures:
        return result  # type: ignore[return-value]  # act has returned a T here
    if failure is not None and not isinstance(failure, MocError):
        raise failure
    raise _one_error(failures) from failure


def decide(world: World, act: Callable[[], dict[str, object]]) -> dict[str, object]:
    """Run `act` on rank 0 only and return its JSON value on every rank, or raise its error on every rank.

    Collective.
    """

    def on_rank_0() -> bytes | None:
        return json.dumps(act()).encode() if world.rank == 0 else None

    payload = agree(world, on_rank_0)
    decision = json.loads(world.broadcast(payload))
    if not isinstance(decision, dict):
        raise InternalError("decision is not an object")
    return decision


def exchange(world: World, value: object) -> list[object]:
    """Return every rank's JSON value, by rank. Collective."""
    return [json.loads(payload) for payload in world.all_gather(json.dumps(value).encode())]


def _describe(failure: Exception | None) -> list[str] | None:
    if failure is None:
        return None
    kind = type(failure).__name__ if isinstance(failure, MocError) else "InternalError"
    words = str(failure) if isinstance(failure, MocError) else f"{type(failure).__name__}: {failure}"
    return [kind, words]


def _one_error(failures: dict[int, list[str]]) -> MocError:
    kinds = {kind for kind, _ in failures.values()}
    lowest = min(failures)
    kind, words = failures[lowest]
    raised = getattr(errors, kind, None)
    if len(kinds) == 1 and isinstance(raised, type) and issubclass(raised, MocError) and raised is not RankFailedError:
        return raised(words if len(failures) > 1 else f"{words} rank={lowest}")
    return RankFailedError({rank: f"{kind}: {words}" for rank, (kind, words) in failures.items()}, kinds)
