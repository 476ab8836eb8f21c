"""Words are shared with the right order between processes; pages come when they are asked for."""

import ctypes
import errno
import mmap
import os
import signal
import struct
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moc import _native
from tests.native.memory import PAGE_BYTES, mapped, random_bytes

fill_pages = pytest.mark.parametrize("fill", [_native.populate, _native.touch])


@given(value=st.integers(0, 2**64 - 1), slot=st.integers(0, 7))
def test_word_is_stored_and_loaded_in_native_order(value: int, slot: int) -> None:
    with mapped(64) as memory:
        _native.store_release_u64(memory.address + 8 * slot, value)

        assert _native.load_acquire_u64(memory.address + 8 * slot) == value
        assert struct.unpack("=Q", memory.get(8 * slot, 8)) == (value,)
        assert not memory.get(0, 8 * slot).strip(b"\0")


def test_reader_that_sees_the_flag_sees_what_was_written_before_it() -> None:
    rounds = 2000
    with mapped(4096) as memory:
        flag, payload = memory.address, memory.address + 2048
        failures: list[int] = []

        def read() -> None:
            seen = 0
            while seen < rounds:
                latest = _native.load_acquire_u64(flag)
                if _native.load_acquire_u64(payload) < latest:
                    failures.append(latest)
                seen = latest

        reader = threading.Thread(target=read)
        reader.start()
        for value in range(1, rounds + 1):
            _native.store_release_u64(payload, value)
            _native.store_release_u64(flag, value)
        reader.join(timeout=60)

        assert not reader.is_alive()
        assert failures == []


@pytest.mark.parametrize("offset", range(1, 8))
def test_unaligned_word_is_refused(offset: int) -> None:
    with mapped(64) as memory:
        with pytest.raises(ValueError, match=r"address is not aligned address=\d+ allowed=multiples of 8"):
            _native.load_acquire_u64(memory.address + offset)
        with pytest.raises(ValueError, match=r"address is not aligned"):
            _native.store_release_u64(memory.address + offset, 1)


def test_word_out_of_range_is_refused_and_not_stored() -> None:
    with mapped(64) as memory:
        with pytest.raises(OverflowError, match=r"value is too large value=18446744073709551616"):
            _native.store_release_u64(memory.address, 2**64)
        with pytest.raises(ValueError, match=r"value is negative value=-1"):
            _native.store_release_u64(memory.address, -1)

        assert _native.load_acquire_u64(memory.address) == 0
    with pytest.raises(ValueError, match=r"address is null"):
        _native.load_acquire_u64(0)


def resident_pages(address: int) -> int:
    """Count the resident pages of the mapping that starts at `address`, from the kernel's own books."""
    lines = Path("/proc/self/smaps").read_text(encoding="ascii").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"{address:08x}-"))
    rss = next(line for line in lines[start:] if line.startswith("Rss:"))
    return int(rss.split()[1]) * 1024 // PAGE_BYTES


@fill_pages
def test_all_pages_of_a_shared_mapping_become_resident(fill: Callable[[int, int], None]) -> None:
    pages = 300
    fd = os.memfd_create("populate", os.MFD_CLOEXEC)
    os.ftruncate(fd, pages * PAGE_BYTES)
    region = mmap.mmap(fd, pages * PAGE_BYTES)
    os.close(fd)
    address = ctypes.addressof(ctypes.c_char.from_buffer(region))
    assert resident_pages(address) == 0

    fill(address, pages * PAGE_BYTES)

    assert resident_pages(address) == pages


@fill_pages
@given(offset=st.integers(0, 3 * PAGE_BYTES), length=st.integers(0, 5 * PAGE_BYTES), seed=st.integers(0, 2**32 - 1))
def test_bytes_keep_their_values(fill: Callable[[int, int], None], offset: int, length: int, seed: int) -> None:
    data = random_bytes(8 * PAGE_BYTES, seed)
    with mapped(len(data)) as memory:
        memory.put(0, data)

        fill(memory.address + offset, length)

        assert memory.get(0, len(data)) == data


def test_unmapped_page_is_enomem() -> None:
    with pytest.raises(OSError, match="memory") as caught:
        _native.populate(PAGE_BYTES, PAGE_BYTES)

    assert caught.value.errno == errno.ENOMEM


def test_range_advised_is_absent_from_a_child() -> None:
    with mapped(2 * PAGE_BYTES) as memory:
        _native.advise_dontfork(memory.address, PAGE_BYTES)

        kept = exit_status_of_child_reading(memory.address + PAGE_BYTES)
        gone = exit_status_of_child_reading(memory.address)

    assert os.WIFEXITED(kept)
    assert os.WEXITSTATUS(kept) == 0
    assert os.WIFSIGNALED(gone)
    assert os.WTERMSIG(gone) == signal.SIGSEGV


def exit_status_of_child_reading(address: int) -> int:
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)  # pytest's fault handler would print a traceback
        _native.load_acquire_u64(address)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def test_fork_advice_on_half_a_page_is_refused() -> None:
    with mapped(PAGE_BYTES) as memory, pytest.raises(ValueError, match=r"address is not that of a page .*multiples of"):
        _native.advise_dontfork(memory.address + 8, 8)
