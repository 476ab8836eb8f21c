"""Copies, checksums and direct I/O on raw memory, built from csrc/.

Addresses, lengths and offsets are in bytes. The caller guarantees that each range is mapped, stays mapped, and is not
written by anybody else during the call. Every function that works on a range releases the GIL while it does.
A negative number raises ValueError, one that is too large OverflowError; both name the argument and its value.
`Words` parameters are C-contiguous buffers of uint64 (or uint32 for `crcs`): numpy arrays, array.array("Q" or "I").
"""

import sys
from typing import Any, Literal, SupportsIndex, TypeAlias

if sys.version_info >= (3, 12):
    from collections.abc import Buffer
else:
    Buffer: TypeAlias = Any

Words: TypeAlias = Buffer
FloatKind: TypeAlias = Literal["F16", "BF16", "F32", "F64"]

KERNELS: tuple[str, ...]
"""Names of the checksum kernels this CPU supports, the fastest (the default) first."""

def crc32c(buffer: Buffer, initial: SupportsIndex = 0, *, kernel: str | None = None) -> int:
    """Return the CRC-32C of any contiguous buffer; `initial` is the checksum of the bytes before it."""

def crc32c_at(
    address: SupportsIndex, length: SupportsIndex, initial: SupportsIndex = 0, *, kernel: str | None = None
) -> int:
    """Return the CRC-32C of a range of memory; `initial` is the checksum of the bytes before it."""

def crc32c_combine(crc_a: SupportsIndex, crc_b: SupportsIndex, length_b: SupportsIndex) -> int:
    """Return the CRC-32C of A followed by B from their checksums and the length of B."""

def crc32c_gather(addresses: Words, lengths: Words, crcs: Words, *, kernel: str | None = None) -> None:
    """Write the CRC-32C of each range into `crcs`."""

def copy_crc32c(sources: Words, targets: Words, lengths: Words, crcs: Words, *, kernel: str | None = None) -> None:
    """Copy each source range to its target and write its CRC-32C into `crcs`, in one pass.

    Sources and targets must not overlap. Ranges may have any alignment and may be empty. When the call returns, the
    copies are ordered before anything this thread stores next.
    """

def all_finite(address: SupportsIndex, count: SupportsIndex, kind: FloatKind) -> bool:
    """Return whether none of `count` values is infinite or NaN."""

def write_aligned(fd: int, file_offset: SupportsIndex, addresses: Words, lengths: Words) -> int:
    """Write the segments one after the other from `file_offset` on and return their total length.

    With O_DIRECT the caller aligns the offset and every address and length. Blocks: until all is written.
    Raises: OSError; part of the range may then have been written.
    """

def read_aligned(fd: int, file_offset: SupportsIndex, address: SupportsIndex, length: SupportsIndex) -> int:
    """Read into a range of memory and return the number of bytes read: fewer than `length` only at the end of the file.

    With O_DIRECT the caller aligns all three numbers. Raises: OSError.
    """

def load_acquire_u64(address: SupportsIndex) -> int:
    """Load a 64-bit word with acquire order; raises ValueError unless the address is a multiple of 8."""

def store_release_u64(address: SupportsIndex, value: SupportsIndex) -> None:
    """Store a 64-bit word with release order; raises ValueError unless the address is a multiple of 8."""

def populate(address: SupportsIndex, length: SupportsIndex) -> None:
    """Make every page of a range present and writable in this process; the bytes keep their values.

    Raises: OSError, with ENOMEM when a page is not mapped or there is no memory for it.
    """

def touch(address: SupportsIndex, length: SupportsIndex) -> None:
    """Do what `populate` does by one atomic write per page: what it falls back to on kernels before 5.14."""

def advise_dontfork(address: SupportsIndex, length: SupportsIndex) -> None:
    """Keep a range out of children made by fork; raises ValueError unless the address is that of a page."""
