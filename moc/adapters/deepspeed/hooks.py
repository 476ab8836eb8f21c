"""Where a manager hears of an engine's steps: methods wrapped on the instance, so that the class stays as it is.

`_take_model_step` is the only point that all ways to update share, and runs at accumulation boundaries alone; the outer
`step` counts the micro step after it. So the former says "really updated", skipped updates (a norm that is not finite)
included, and the exit of the latter is the boundary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from deepspeed.runtime.engine import DeepSpeedEngine

from moc.errors import UsageError

__all__ = ["Hooks", "refuse_attached"]

MARK = "__moc_hooks__"


def refuse_attached(engine: DeepSpeedEngine) -> None:
    """Raise UsageError if a manager is attached already."""
    if hasattr(engine.__dict__.get("step"), MARK):
        raise UsageError("engine is already attached: attached=1 allowed=1, detach the other manager first")


class Hooks:
    """Calls of a manager around an engine's methods, from construction to `detach`. Thread: the training thread.

    before_update: the weights are about to change. after_step: an outer `step` that updated has returned. on_load: the
    engine has loaded one of DeepSpeed's own checkpoints. on_destroy: the engine is about to be destroyed.
    """

    def __init__(
        self,
        engine: DeepSpeedEngine,
        before_update: Callable[[], None],
        after_step: Callable[[], None],
        on_load: Callable[[], None],
        on_destroy: Callable[[], None],
    ) -> None:
        refuse_attached(engine)
        self._engine: Any = engine
        self._before_update = before_update
        self._after_step = after_step
        self._on_load = on_load
        self._on_destroy = on_destroy
        self._is_updated = False
        self._is_destroyed = False
        self._is_detached = False
        self._previous: dict[tuple[Any, str], Any] = {}
        try:
            self._wrap(engine, "_take_model_step", self._take_model_step)
            self._wrap(engine, "step", self._step)
            self._wrap(engine, "load_checkpoint", self._load_checkpoint)
            self._wrap(engine, "destroy", self._destroy)
            for name in ("offload_states", "reload_states"):
                self._wrap(engine, name, self._move_states)
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Leave the engine's attributes as they were; again is harmless."""
        for (owner, name), previous in self._previous.items():
            if getattr(owner.__dict__.get(name), MARK, None) is not self:
                continue  # wrapped again by somebody else since: ours stays inside, and passes through
            if previous is None:
                delattr(owner, name)
            else:
                setattr(owner, name, previous)
        self._previous = {}
        self._is_detached = True

    def _wrap(self, owner: Any, name: str, around: Callable[..., Any]) -> None:
        original = getattr(owner, name)

        @functools.wraps(original)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return original(*args, **kwargs) if self._is_detached else around(original, *args, **kwargs)

        setattr(wrapper, MARK, self)
        self._previous[owner, name] = owner.__dict__.get(name)
        setattr(owner, name, wrapper)

    def _move_states(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._before_update()  # the tensors that the copy reads are about to be replaced
        return original(*args, **kwargs)

    def _take_model_step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._before_update()
        result = original(*args, **kwargs)
        self._is_updated = True
        return result

    def _step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._is_updated = False
        result = original(*args, **kwargs)
        if self._is_updated:
            self._is_updated = False
            self._after_step()
        return result

    def _load_checkpoint(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._before_update()  # masters and moments are about to be overwritten
        result = original(*args, **kwargs)
        if result[0] is not None:  # DeepSpeed returns (None, {}) when it found nothing
            self._on_load()
        return result

    def _destroy(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self._is_destroyed:  # the engine's destructor destroys it again
            self._is_destroyed = True
            self._on_destroy()
        return original(*args, **kwargs)
