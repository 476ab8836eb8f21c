"""Random number generators of this process: python, numpy's global one, torch's, and every accelerator device's."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.activation_checkpointing.checkpointing import get_cuda_rng_tracker

from moc.adapters.deepspeed.values import array_of, expect_array, live_of, plain_of, tensor_of
from moc.errors import MismatchError

__all__ = ["capture_rng", "derive_rng", "restore_rng"]


def capture_rng() -> dict[str, object]:
    """Return the state of all generators. Blocks: until accelerators' current streams have reached this point."""
    version, words, gauss = random.getstate()
    return {
        "python": {
            "version": version,
            "words": plain_of(np.array(words, dtype=np.uint32), "rng", is_lenient=True),
            "gauss": gauss,
        },
        "numpy": plain_of(np.random.get_state(legacy=False), "rng", is_lenient=True),
        "torch": array_of(torch.get_rng_state(), "rng.torch"),
        "devices": [array_of(state, "rng.devices") for state in _device_states()],
        "device": _current_device(),
        "tracker": {
            str(name): array_of(state, "rng.tracker") for name, state in get_cuda_rng_tracker().get_states().items()
        },
    }


def restore_rng(tree: Mapping[str, object]) -> None:
    """Put all generators back; raises MismatchError if only one of the two runs had accelerators."""
    python: Any = tree["python"]
    words = live_of(python["words"])
    assert isinstance(words, np.ndarray)
    random.setstate((python["version"], tuple(words.tolist()), python["gauss"]))
    numpy_state: Any = live_of(tree["numpy"])
    np.random.set_state(numpy_state)
    devices: Any = tree["devices"]
    present = len(_device_states())
    if bool(devices) != bool(present):
        raise MismatchError(f"accelerators differ: stored_devices={len(devices)} present_devices={present}")
    if len(devices) == present:
        chosen = list(enumerate(devices))
    else:  # other devices are visible, but this rank works on one
        chosen = [(_current_device(), devices[cast("int", tree["device"])])]
    for index, state in chosen:
        get_accelerator().set_rng_state(tensor_of(expect_array(state, "rng.devices")), index)
    tracker: Any = tree["tracker"]
    if tracker:
        get_cuda_rng_tracker().set_states({name: tensor_of(state) for name, state in tracker.items()})
    torch.set_rng_state(tensor_of(expect_array(tree["torch"], "rng.torch")))


def derive_rng(tree: Mapping[str, object], rank: int) -> None:
    """Seed all generators of a rank that has no state of its own, because the number of ranks has changed.

    The seed is the first 8 bytes, little-endian, of SHA-256 over "moc-rng", the stored python words, the stored torch
    state and the rank in decimal; numpy takes its low 32 bits.
    """
    python: Any = tree["python"]
    digest = hashlib.sha256(b"moc-rng")
    digest.update(expect_array(python["words"], "rng.python").data)
    digest.update(expect_array(tree["torch"], "rng.torch").data)
    digest.update(str(rank).encode())
    seed = int.from_bytes(digest.digest()[:8], "little")
    random.seed(seed)
    np.random.seed(seed & 0xFFFF_FFFF)
    torch.manual_seed(seed)  # seeds every accelerator device as well


def _current_device() -> int:
    accelerator = get_accelerator()
    return 0 if accelerator.device_name() == "cpu" else int(accelerator.current_device())


def _device_states() -> list[torch.Tensor]:
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":  # its generator is torch's own
        return []
    return [accelerator.get_rng_state(index) for index in range(accelerator.device_count())]
