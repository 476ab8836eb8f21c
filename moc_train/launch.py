"""Where this process stands among the ranks, as its launcher said in the environment."""

import os
import socket
from collections.abc import MutableMapping
from dataclasses import dataclass

__all__ = ["Place", "prepare_environment", "read_place", "thread_count"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """This process among those of the job."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int


def read_place(environment: MutableMapping[str, str]) -> Place:
    """Return the place that deepspeed's or torch's launcher gave; without a launcher, a world of one rank."""
    world_size = int(environment.get("WORLD_SIZE", 1))
    return Place(
        rank=int(environment.get("RANK", 0)),
        local_rank=int(environment.get("LOCAL_RANK", 0)),
        world_size=world_size,
        local_world_size=int(environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE") or world_size),
    )


def prepare_environment(environment: MutableMapping[str, str], place: Place, *, deterministic: bool) -> None:
    """Fill in what DeepSpeed and CUDA read from the environment; to be called before torch is used."""
    environment.setdefault("RANK", str(place.rank))
    environment.setdefault("LOCAL_RANK", str(place.local_rank))
    environment.setdefault("WORLD_SIZE", str(place.world_size))
    environment.setdefault("MASTER_ADDR", "127.0.0.1")
    if "MASTER_PORT" not in environment:
        environment["MASTER_PORT"] = str(_free_port())
    environment.setdefault("TOKENIZERS_PARALLELISM", "true")
    if deterministic:
        environment.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def thread_count(place: Place, requested: int) -> int:
    """Return the threads of this rank: as requested, else this node's usable cores over its ranks."""
    if requested:
        return requested
    return max(1, len(os.sched_getaffinity(0)) // place.local_world_size)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
