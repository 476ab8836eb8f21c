"""Aligned writes and reads move the right bytes, direct or not, and report errors by their number."""

import errno
import os
import resource
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moc import _native
from tests.native import reference
from tests.native.memory import mapped, random_bytes, words

BLOCK = 4096


def open_direct(path: Path) -> int:
    """Open for direct I/O, or plainly on a file system that has none (tmpfs of old kernels)."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o600)


@pytest.fixture
def direct_fd(tmp_path: Path) -> Iterator[int]:
    fd = open_direct(tmp_path / "direct")
    yield fd
    os.close(fd)


@pytest.fixture
def plain_fd(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "plain", os.O_RDWR | os.O_CREAT, 0o600)
    yield fd
    os.close(fd)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(blocks=st.lists(st.integers(0, 5), max_size=8), start=st.integers(0, 3), seed=st.integers(0, 2**32 - 1))
def test_direct_write_then_read_gives_the_bytes_back(
    direct_fd: int, plain_fd: int, blocks: list[int], start: int, seed: int
) -> None:
    segments = [random_bytes(count * BLOCK, seed + i) for i, count in enumerate(blocks)]
    total = sum(map(len, segments))
    os.ftruncate(direct_fd, 0)
    os.ftruncate(plain_fd, 0)
    with mapped(total) as source, mapped(total + BLOCK) as target:
        source.put(0, b"".join(segments))
        offsets = [sum(blocks[:i]) * BLOCK for i in range(len(blocks))]
        addresses = words(source.address + offset for offset in offsets)

        written = _native.write_aligned(direct_fd, start * BLOCK, addresses, words(map(len, segments)))
        read = _native.read_aligned(direct_fd, start * BLOCK, target.address, total + BLOCK)

        assert written == reference.write_segments(plain_fd, start * BLOCK, segments) == total
        assert read == total
        assert target.get(0, total) == b"".join(segments)
        assert target.get(total, BLOCK) == bytes(BLOCK)
        size = os.fstat(plain_fd).st_size
        assert os.fstat(direct_fd).st_size == size
        assert os.pread(plain_fd, size, 0)[start * BLOCK :] == target.get(0, total)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.integers(0, 300), max_size=20), offset=st.integers(0, 100), seed=st.integers(0, 2**32 - 1))
def test_plain_write_needs_no_alignment(plain_fd: int, lengths: list[int], offset: int, seed: int) -> None:
    data = random_bytes(sum(lengths), seed)
    os.ftruncate(plain_fd, 0)
    with mapped(len(data)) as source:
        source.put(0, data)
        starts = [sum(lengths[:i]) for i in range(len(lengths))]

        written = _native.write_aligned(
            plain_fd, offset, words(source.address + start for start in starts), words(lengths)
        )

    assert written == len(data)
    assert os.pread(plain_fd, len(data), offset) == data


def test_more_segments_than_one_call_takes_are_written_in_order(direct_fd: int) -> None:
    count = 2500  # IOV_MAX is 1024
    with mapped(count * BLOCK) as source, mapped(count * BLOCK) as target:
        source.put(0, random_bytes(count * BLOCK, seed=5))
        backwards = words(source.address + i * BLOCK for i in reversed(range(count)))

        assert _native.write_aligned(direct_fd, 0, backwards, words([BLOCK] * count)) == count * BLOCK
        assert _native.read_aligned(direct_fd, 0, target.address, count * BLOCK) == count * BLOCK

        assert (target.view.reshape(count, BLOCK) == source.view.reshape(count, BLOCK)[::-1]).all()


def test_one_segment_longer_than_one_call_is_continued_where_the_call_ended(direct_fd: int) -> None:
    length = (128 << 20) + BLOCK  # a call moves 64 MiB
    with mapped(length) as source, mapped(length) as target:
        source.view.view(np.uint64)[::512] = np.arange(length // BLOCK, dtype=np.uint64)  # each block holds its number

        assert _native.write_aligned(direct_fd, 0, words([source.address]), words([length])) == length
        assert _native.read_aligned(direct_fd, 0, target.address, length) == length

        assert np.array_equal(source.view, target.view)


def test_partial_writes_into_a_limited_file_end_in_efbig(plain_fd: int) -> None:
    limit = 3 * BLOCK + 100
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        with mapped(8 * BLOCK) as source:
            source.put(0, b"\x07" * (8 * BLOCK))
            # the first call writes up to the limit only; the loop goes on there and gets the reason
            with pytest.raises(OSError, match="large") as caught:
                _native.write_aligned(plain_fd, 0, words([source.address]), words([8 * BLOCK]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)

    assert caught.value.errno == errno.EFBIG
    assert os.pread(plain_fd, 8 * BLOCK, 0) == b"\x07" * limit


def test_direct_read_of_a_file_that_ends_inside_a_block_is_short(tmp_path: Path) -> None:
    data = random_bytes(2 * BLOCK + 123, seed=3)
    (tmp_path / "odd").write_bytes(data)
    fd = open_direct(tmp_path / "odd")
    try:
        with mapped(8 * BLOCK) as target:
            assert _native.read_aligned(fd, 0, target.address, 8 * BLOCK) == len(data)
            assert target.get(0, len(data)) == data
            assert _native.read_aligned(fd, 4 * BLOCK, target.address, BLOCK) == 0
    finally:
        os.close(fd)


def test_read_from_a_pipe_is_refused_by_number() -> None:
    reader, writer = os.pipe()
    try:
        with mapped(BLOCK) as target, pytest.raises(OSError, match="seek") as caught:
            _native.read_aligned(reader, 0, target.address, BLOCK)
    finally:
        os.close(reader)
        os.close(writer)

    assert caught.value.errno == errno.ESPIPE


def test_closed_descriptor_is_ebadf(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "gone", os.O_RDWR | os.O_CREAT, 0o600)
    os.close(fd)
    with mapped(BLOCK) as memory:
        with pytest.raises(OSError, match="descriptor") as written:
            _native.write_aligned(fd, 0, words([memory.address]), words([BLOCK]))
        with pytest.raises(OSError, match="descriptor") as read:
            _native.read_aligned(fd, 0, memory.address, BLOCK)

    assert (written.value.errno, read.value.errno) == (errno.EBADF, errno.EBADF)


def test_unmapped_memory_is_an_error_and_no_crash(plain_fd: int) -> None:
    with pytest.raises(OSError, match="address") as caught:
        _native.write_aligned(plain_fd, 0, words([BLOCK]), words([BLOCK]))

    assert caught.value.errno == errno.EFAULT


def test_bad_arguments_are_named(plain_fd: int) -> None:
    with pytest.raises(ValueError, match=r"fd is negative fd=-1"):
        _native.write_aligned(-1, 0, words([]), words([]))
    with pytest.raises(ValueError, match=r"file_offset is negative file_offset=-4096"):
        _native.write_aligned(plain_fd, -4096, words([]), words([]))
    with pytest.raises(OverflowError, match=r"file_offset is too large file_offset=9223372036854775808"):
        _native.read_aligned(plain_fd, 2**63, 4096, 1)
    with pytest.raises(OverflowError, match=r"file range is too large file_offset=9223372036854775807 length=1"):
        _native.read_aligned(plain_fd, 2**63 - 1, 4096, 1)
    with pytest.raises(ValueError, match=r"addresses has the wrong number of items addresses=1 lengths=0"):
        _native.write_aligned(plain_fd, 0, words([1]), words([]))


def test_two_threads_write_their_own_ranges_at_once(direct_fd: int) -> None:
    share = 64 * BLOCK
    with mapped(2 * share) as source, mapped(2 * share) as target:
        source.put(0, random_bytes(2 * share, seed=9))

        def write(part: int) -> None:
            _native.write_aligned(direct_fd, part * share, words([source.address + part * share]), words([share]))

        threads = [threading.Thread(target=write, args=(part,)) for part in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=30)
            assert not thread.is_alive()

        assert _native.read_aligned(direct_fd, 0, target.address, 2 * share) == 2 * share
        assert target.get(0, 2 * share) == source.get(0, 2 * share)
