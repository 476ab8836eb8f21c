"""Into which slots a snapshot goes.

A slot that a held record refers to is never written. One that only the newest sealed record of the rank refers to is
written last of all, and only for a unit that is copied anew: as long as that record is whole, the units that are left
out keep its slots, whether the agent has freed it or not.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["Slots", "choose_slots"]

Slots = npt.NDArray[np.uint32]


def choose_slots(
    versions: int, copied: npt.NDArray[np.bool_], *, held: Sequence[Slots], base: Slots | None
) -> tuple[Slots, npt.NDArray[np.bool_]] | None:
    """Return each unit's slot and the units whose slot is the base's and will be overwritten.

    `copied` are the units that are copied; the others keep the base's slot. None if a copied unit has no free slot,
    which cannot be while there are fewer held records than versions.
    """
    units = np.arange(len(copied))
    taken = np.zeros((versions, len(copied)), dtype=np.bool_)
    for slots in held:
        taken[slots, units] = True
    if bool((taken.all(axis=0) & copied).any()):
        return None
    if base is None:
        assert bool(copied.all()), "without a base every unit is copied"
        return taken.argmin(axis=0).astype(np.uint32), np.zeros(len(copied), dtype=np.bool_)
    avoided = taken.copy()
    avoided[base, units] = True
    is_crowded = avoided.all(axis=0)
    fresh = np.where(is_crowded, base, avoided.argmin(axis=0))
    return np.where(copied, fresh, base).astype(np.uint32), copied & is_crowded
