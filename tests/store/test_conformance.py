"""What every store promises, as one suite that runs against all of them."""

from __future__ import annotations

import mmap
import random
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest

from moc.errors import ClosedError, FencedError, IntegrityError, ObjectMissingError, UsageError
from moc.store.key import KEY_LENGTH_LIMIT, SEGMENT_LENGTH_LIMIT
from moc.store.port import Store


def put(store: Store, key: str, *parts: bytes, create_only: bool = False) -> None:
    store.put(key, [memoryview(part) for part in parts], create_only=create_only)


def keys(store: Store, prefix: str) -> list[str]:
    return [entry.key for entry in store.list(prefix)]


def test_an_object_is_the_concatenation_of_its_segments(store: Store) -> None:
    put(store, "objects/a", b"one", b"", b"two")

    assert store.read("objects/a", limit_bytes=6) == b"onetwo"
    assert store.size_bytes("objects/a") == 6


def test_segments_may_be_of_any_item_type(store: Store) -> None:
    words = memoryview(bytes(range(16))).cast("I")

    store.put("a", [words])

    assert store.read("a", limit_bytes=16) == bytes(range(16))


def test_a_segment_with_holes_is_refused(store: Store) -> None:
    with pytest.raises(UsageError, match="not contiguous"):
        store.put("a", [memoryview(b"abcdef")[::2]])

    assert store.list("") == []


def test_no_reference_to_a_segment_is_kept(store: Store) -> None:
    buffer = bytearray(b"before")
    view = memoryview(buffer)

    store.put("a", [view])
    view.release()
    buffer.clear()  # raises BufferError while any view exists

    assert store.read("a", limit_bytes=6) == b"before"


@pytest.mark.parametrize("parts", [(), (b"",), (b"", b"")])
def test_an_empty_object_exists(store: Store, parts: tuple[bytes, ...]) -> None:
    put(store, "empty", *parts)

    assert store.read("empty", limit_bytes=0) == b""
    assert store.size_bytes("empty") == 0
    assert keys(store, "") == ["empty"]
    store.read_into("empty", 0, memoryview(bytearray()))


@pytest.mark.parametrize("cuts", [(), (4096,), (4096, 2**20 + 4096), (1, 4097), (100, 200, 3_000_001)])
def test_a_large_object_is_stored_whole_however_it_is_cut(store: Store, cuts: tuple[int, ...]) -> None:
    content = random.Random(7).randbytes(3 * 2**20 + 123)
    memory = mmap.mmap(-1, len(content))  # starts at a page, so that some segments are aligned
    memory[:] = content
    whole = memoryview(memory)
    bounds = [0, *cuts, len(content)]

    store.put("large", [whole[begin:end] for begin, end in pairwise(bounds)])

    assert store.read("large", limit_bytes=len(content)) == content
    assert store.list("")[0].size_bytes == len(content)
    whole.release()
    memory.close()


def test_ranges_are_read_exactly(store: Store) -> None:
    put(store, "a", bytes(range(100)))

    for offset, length in [(0, 100), (0, 1), (99, 1), (10, 33), (100, 0)]:
        target = bytearray(length)
        store.read_into("a", offset, memoryview(target))
        assert target == bytes(range(offset, offset + length))


@pytest.mark.parametrize(("offset", "length"), [(0, 101), (99, 2), (100, 1), (5000, 1), (101, 0)])
def test_a_range_behind_the_end_is_an_integrity_error(store: Store, offset: int, length: int) -> None:
    put(store, "a", bytes(100))

    with pytest.raises(IntegrityError, match="ends early"):
        store.read_into("a", offset, memoryview(bytearray(length)))


@pytest.mark.parametrize("view", [memoryview(b"fixed"), memoryview(bytearray(8))[::2]])
def test_a_view_that_cannot_be_filled_is_refused(store: Store, view: memoryview) -> None:
    put(store, "a", bytes(100))

    with pytest.raises(UsageError, match="allowed=writable"):
        store.read_into("a", 0, view)
    with pytest.raises(UsageError, match="offset=-1"):
        store.read_into("a", -1, memoryview(bytearray(1)))


def test_a_read_is_limited(store: Store) -> None:
    put(store, "a", bytes(100))

    assert len(store.read("a", limit_bytes=100)) == 100
    with pytest.raises(IntegrityError, match="limit_bytes=99"):
        store.read("a", limit_bytes=99)


@pytest.mark.parametrize("key", ["a", "a/b", "a/b/c", "folder"])
def test_a_missing_key_is_reported_as_missing(store: Store, key: str) -> None:
    put(store, "folder/object", b"x")

    with pytest.raises(ObjectMissingError):
        store.read(key, limit_bytes=1)
    with pytest.raises(ObjectMissingError):
        store.size_bytes(key)
    with pytest.raises(ObjectMissingError):
        store.read_into(key, 0, memoryview(bytearray(1)))


def test_nothing_lies_below_an_object(store: Store) -> None:
    put(store, "a", b"x")

    with pytest.raises(ObjectMissingError):
        store.read("a/b", limit_bytes=1)
    assert store.list("a") == []
    store.delete("a/b")
    assert keys(store, "") == ["a"]


def test_a_listing_is_sorted_and_a_prefix_is_a_whole_folder(store: Store) -> None:
    for key in ["ab/x", "a/z", "a/b/c", "a-b", "a.b/y", "b"]:
        put(store, key, key.encode())

    assert keys(store, "") == ["a-b", "a.b/y", "a/b/c", "a/z", "ab/x", "b"]
    assert keys(store, "a") == ["a/b/c", "a/z"]
    assert keys(store, "a/b") == ["a/b/c"]
    assert keys(store, "ab") == ["ab/x"]
    assert keys(store, "b") == []
    assert keys(store, "none") == []
    assert [entry.size_bytes for entry in store.list("a")] == [5, 3]


def test_an_empty_store_lists_nothing(store: Store) -> None:
    assert store.list("") == []
    assert store.list("a") == []


def test_a_listing_is_never_stale(store: Store) -> None:
    for number in range(5):
        put(store, f"a/{number}", b"x")
        assert len(store.list("a")) == number + 1
    for number in range(5):
        store.delete(f"a/{number}")
        assert len(store.list("a")) == 4 - number


def test_delete_removes_one_object_and_may_be_repeated(store: Store) -> None:
    put(store, "a/b", b"x")
    put(store, "a/c", b"y")

    store.delete("a/b")
    store.delete("a/b")
    store.delete("never/there")

    assert keys(store, "") == ["a/c"]
    with pytest.raises(ObjectMissingError):
        store.read("a/b", limit_bytes=1)


def test_a_deleted_key_can_be_put_again(store: Store) -> None:
    put(store, "a/b/c", b"x")
    store.delete("a/b/c")

    put(store, "a/b/c", b"x")

    assert keys(store, "a") == ["a/b/c"]


def test_a_put_may_be_repeated(store: Store) -> None:
    for _ in range(3):
        put(store, "a", b"same")

    assert store.read("a", limit_bytes=4) == b"same"
    assert len(store.list("")) == 1


def test_create_only_accepts_a_retry_and_fences_other_bytes(store: Store) -> None:
    put(store, "a/b", b"first", create_only=True)

    put(store, "a/b", b"fi", b"rst", create_only=True)
    for other in (b"other", b"", b"first and more"):
        with pytest.raises(FencedError, match="other bytes"):
            put(store, "a/b", other, create_only=True)

    assert store.read("a/b", limit_bytes=5) == b"first"
    assert keys(store, "") == ["a/b"]


ILLEGAL_KEYS = [
    "",
    "/",
    "/etc/passwd",
    "../x",
    "a/../b",
    "a/..",
    ".",
    "./a",
    "a/./b",
    "a//b",
    "a/",
    "a\0b",
    "a\\b",
    "a b",
    "a\n",
    "~a",
    "a~b",
    "C:x",
    "a?b",
    "a%2fb",
    "ä",
    "a" * (SEGMENT_LENGTH_LIMIT + 1),
    "/".join(["a" * 99] * 9),
]


def test_an_illegal_key_is_refused_everywhere(store: Store) -> None:
    put(store, "present", b"x")

    for key in ILLEGAL_KEYS:
        with pytest.raises(UsageError, match="illegal key"):
            put(store, key, b"x")
        with pytest.raises(UsageError, match="illegal key"):
            store.read(key, limit_bytes=1)
        with pytest.raises(UsageError, match="illegal key"):
            store.read_into(key, 0, memoryview(bytearray(1)))
        with pytest.raises(UsageError, match="illegal key"):
            store.size_bytes(key)
        with pytest.raises(UsageError, match="illegal key"):
            store.delete(key)
        if key:
            with pytest.raises(UsageError, match="illegal key"):
                store.list(key)
    assert keys(store, "") == ["present"]


def test_the_longest_legal_key_works(store: Store) -> None:
    key = "/".join(["k" * SEGMENT_LENGTH_LIMIT] * 3)
    key += "/" + "k" * (KEY_LENGTH_LIMIT - len(key) - 1)
    assert len(key) == KEY_LENGTH_LIMIT

    put(store, key, b"x")

    assert keys(store, "") == [key]


@pytest.mark.parametrize("key", [".hidden", "...", "-", "a.tmp", "x.safetensors", "A/_/0"])
def test_unusual_legal_keys_work(store: Store, key: str) -> None:
    put(store, key, b"x")

    assert keys(store, "") == [key]
    assert store.read(key, limit_bytes=1) == b"x"


def test_concurrent_puts_of_one_key_leave_one_whole_object(store: Store) -> None:
    content = bytes(range(256)) * 2048

    with ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(put, store, "a/b/c", content) for _ in range(32)]:
            future.result(timeout=60)

    assert store.read("a/b/c", limit_bytes=len(content)) == content
    assert keys(store, "") == ["a/b/c"]


def test_concurrent_puts_and_deletes_in_one_folder_do_not_disturb_each_other(store: Store) -> None:
    def work(number: int) -> None:
        for turn in range(10):
            put(store, f"a/b/{number}", bytes([turn]))
            store.delete(f"a/b/{number}")
        put(store, f"a/b/{number}", b"last")

    with ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(work, number) for number in range(8)]:
            future.result(timeout=60)

    assert keys(store, "a/b") == [f"a/b/{number}" for number in range(8)]


def test_of_concurrent_creators_with_different_bytes_one_wins(store: Store) -> None:
    if not store.properties.create_only:
        return  # the property says that the store does not promise this

    def create(number: int) -> bool:
        try:
            put(store, "a", b"%d" % number, create_only=True)
        except FencedError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        winners = [number for number, won in enumerate(pool.map(create, range(16))) if won]

    assert len(winners) == 1
    assert store.read("a", limit_bytes=2) == b"%d" % winners[0]


def test_sync_takes_any_prefix_and_changes_nothing(store: Store) -> None:
    put(store, "a/b/c", b"x")
    put(store, "a/d", b"y")
    before = store.list("")

    for prefix in ("", "a", "a/b", "a/b/c", "a/d/e", "never/there"):
        store.sync(prefix)

    assert [entry.key for entry in store.list("")] == [entry.key for entry in before]


def test_free_space_is_a_number_or_unknown(store: Store) -> None:
    free_bytes = store.free_bytes()

    assert free_bytes is None or free_bytes > 0


def test_a_closed_store_refuses_every_call(store: Store) -> None:
    put(store, "a", b"x")

    store.close()
    store.close()

    for call in (
        lambda: put(store, "a", b"x"),
        lambda: store.read("a", limit_bytes=1),
        lambda: store.read_into("a", 0, memoryview(bytearray(1))),
        lambda: store.size_bytes("a"),
        lambda: store.list(""),
        lambda: store.delete("a"),
        lambda: store.sync("a"),
        store.free_bytes,
    ):
        with pytest.raises(ClosedError):
            call()
    assert store.properties.url
