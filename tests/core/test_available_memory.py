"""What a process may still take: the machine's free memory and every limit of every cgroup above it."""

from __future__ import annotations

from pathlib import Path

import pytest

from moc.agent.memory import available_memory
from moc.agent.room import refuse_if_too_large
from moc.errors import UsageError

GIB = 1 << 30
FREE_KIB = 8 * GIB // 1024
V1_MOUNT = "35 31 0:32 {root} /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory"
V2_MOUNT = "35 31 0:32 {root} /sys/fs/cgroup rw,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate"


class Machine:
    """A folder that looks like the root of a machine, as far as memory is concerned."""

    def __init__(self, top: Path, *, mount: str, root: str = "/", membership: str) -> None:
        self.top = top
        self.write("proc/meminfo", f"MemTotal: 99 kB\nMemAvailable: {FREE_KIB} kB")
        others = (
            "21 1 8:1 / / rw - ext4 /dev/root rw\n22 1 0:5 / /run rw shared:2 - tmpfs  rw\n"  # a source may be empty
        )
        self.write("proc/self/mountinfo", others + mount.format(root=root))
        self.write("proc/self/cgroup", membership)

    def write(self, path: str, text: object) -> None:
        file = self.top / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")

    def write_v2(self, folder: str, *, limit: object, high: object = "max", used: int, cache: int = 0) -> None:
        for name, value in (("max", limit), ("high", high), ("current", used), ("stat", f"inactive_file {cache}")):
            self.write(f"sys/fs/cgroup/{folder}/memory.{name}", value)

    def write_v1(self, folder: str, *, limit: int, used: int, cache: int = 0) -> None:
        for name, value in (
            ("limit_in_bytes", limit),
            ("usage_in_bytes", used),
            ("stat", f"total_inactive_file {cache}"),
        ):
            self.write(f"sys/fs/cgroup/memory/{folder}/memory.{name}", value)


def test_without_a_limit_the_machines_free_memory_counts(tmp_path: Path) -> None:
    machine = Machine(tmp_path, mount=V2_MOUNT, membership="0::/user")
    machine.write_v2("user", limit="max", used=GIB)

    room = available_memory(tmp_path)

    assert (room.size_bytes, room.limit) == (8 * GIB, "free memory of the machine")


@pytest.mark.parametrize("limits", [{"limit": 3 * GIB}, {"limit": "max", "high": 3 * GIB}])
def test_a_limit_or_throttle_of_version_2_counts_less_what_is_held(tmp_path: Path, limits: dict[str, object]) -> None:
    machine = Machine(tmp_path, mount=V2_MOUNT, membership="0::/jobs/one")
    machine.write_v2("jobs/one", used=2 * GIB, cache=GIB // 2, **limits)  # type: ignore[arg-type]

    room = available_memory(tmp_path)

    assert room.size_bytes == 3 * GIB - 2 * GIB + GIB // 2
    assert f"={3 * GIB}" in room.limit
    assert "jobs/one/memory." in room.limit


def test_the_tightest_limit_of_all_ancestors_counts(tmp_path: Path) -> None:
    machine = Machine(tmp_path, mount=V2_MOUNT, membership="0::/jobs/one")
    machine.write_v2("jobs", limit=4 * GIB, used=3 * GIB)
    machine.write_v2("jobs/one", limit=3 * GIB, used=GIB)

    assert available_memory(tmp_path).size_bytes == GIB


def test_version_1_counts_where_the_memory_controller_is_mounted_there(tmp_path: Path) -> None:
    machine = Machine(tmp_path, mount=V1_MOUNT, membership="9:cpu:/other\n4:hugetlb,memory:/jobs\n0::/")
    machine.write_v1("jobs", limit=2 * GIB, used=GIB, cache=GIB // 4)

    room = available_memory(tmp_path)

    assert room.size_bytes == GIB + GIB // 4
    assert "memory.limit_in_bytes" in room.limit


@pytest.mark.parametrize("root", ["/docker/abc", "/"])
def test_a_container_that_sees_only_its_own_cgroup_is_limited_by_it(tmp_path: Path, root: str) -> None:
    # Its path is that of the host; what is mounted is the container's part, or, with a namespace, looks like the root.
    machine = Machine(tmp_path, mount=V1_MOUNT, root=root, membership="4:memory:/docker/abc")
    machine.write_v1("", limit=2 * GIB, used=GIB)

    assert available_memory(tmp_path).size_bytes == GIB


def test_a_cgroup_that_holds_more_than_its_limit_leaves_nothing(tmp_path: Path) -> None:
    machine = Machine(tmp_path, mount=V2_MOUNT, membership="0::/")
    machine.write_v2("", limit=GIB, used=2 * GIB)

    assert available_memory(tmp_path).size_bytes == 0


def test_replicas_of_other_nodes_are_memory_that_must_be_there() -> None:
    refuse_if_too_large(1, None, replica_bytes=1)
    with pytest.raises(UsageError, match=rf"arena_bytes=1 replica_bytes={1 << 60} allowed=\d+ "):
        refuse_if_too_large(1, None, replica_bytes=1 << 60)
    with pytest.raises(UsageError, match="arena_bytes=1 replica_bytes=2 allowed=memory_budget_bytes=2"):
        refuse_if_too_large(1, 2, replica_bytes=2)
