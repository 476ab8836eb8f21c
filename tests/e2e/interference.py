"""What a manager promises where somebody else has got at the engine; behaviours of a world, as in `behaviours`."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable

import pytest
import torch.distributed as dist

from moc.errors import InternalError
from tests.adapters.refusals import expect
from tests.e2e.behaviours import DENSE
from tests.e2e.place import Place
from tests.e2e.worker import Note, Training

__all__ = ["BEHAVIOURS"]


class Unwrappable:
    """Stands where a method was, and does not let anybody look at it."""

    def __call__(self) -> None:
        raise AssertionError("nobody calls it here")

    def __getattr__(self, name: str) -> object:
        raise RuntimeError(f"no look at {name}")


def failed_hooking(place: Place, _: Note) -> None:
    """Where one rank cannot be hooked, none is, the session ends, and another attempt begins the next life."""
    training = Training(DENSE, seed=1)
    if dist.get_rank() == 1:
        training.engine.reload_states = Unwrappable()
    before, handler = dict(training.engine.__dict__), signal.getsignal(signal.SIGTERM)

    if dist.get_rank() == 0:
        expect(InternalError, "RuntimeError: no look at __name__ rank=1", lambda: place.attach(training))
    else:
        with pytest.raises(RuntimeError, match="no look at __name__"):
            place.attach(training)

    assert training.engine.__dict__ == before
    assert signal.getsignal(signal.SIGTERM) == handler
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("moc-")]
    if dist.get_rank() == 1:
        del training.engine.reload_states
    manager = place.attach(training)
    training.run(2, manager.step)
    manager.detach()
    assert place.committed() == [2]
    assert [number for number, _ in place.incarnations()] == [1, 2]


BEHAVIOURS: dict[str, Callable[[Place, Note], None]] = {"failed_hooking": failed_hooking}
