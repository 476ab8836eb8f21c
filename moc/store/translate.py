"""From foreign exceptions to moc's storage errors: the one place where errno values and HTTP codes are read."""

from __future__ import annotations

import errno

from moc.errors import ObjectMissingError, StorageError, StoreDeniedError, StoreFullError, StoreUnavailableError

__all__ = ["class_for_errno", "translate_os_error"]

_DENIED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ELOOP})  # ELOOP: O_NOFOLLOW met a symbolic link
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_MISSING = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR})
_UNAVAILABLE = frozenset(
    {
        errno.EIO,
        errno.EREMOTEIO,
        errno.ESTALE,
        errno.ENODEV,
        errno.ENXIO,
        errno.ETIMEDOUT,
        errno.EAGAIN,
        errno.EBUSY,
        errno.EINTR,
        errno.EMFILE,
        errno.ENFILE,
        errno.ENOMEM,
        errno.ENOLCK,
        errno.ENOTCONN,
        errno.ECONNRESET,
        errno.ECONNREFUSED,
        errno.ECONNABORTED,
        errno.EPIPE,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.ENETRESET,
    }
)


def class_for_errno(number: int | None) -> type[StorageError]:
    """Return the class of storage error that an errno value belongs to; StorageError itself for one that fits none."""
    if number in _DENIED:
        return StoreDeniedError
    if number in _FULL:
        return StoreFullError
    if number in _MISSING:
        return ObjectMissingError
    if number in _UNAVAILABLE:
        return StoreUnavailableError
    return StorageError


def translate_os_error(error: OSError, *, action: str, subject: str) -> StorageError:
    """Return the storage error for a failed system call; `subject` is ``key=value`` text that says on what."""
    number = error.errno
    if number is None and isinstance(error, TimeoutError):
        number = errno.ETIMEDOUT
    name = errno.errorcode.get(number, str(number)) if number is not None else type(error).__name__
    reason = error.strerror or type(error).__name__
    return class_for_errno(number)(f"{action} failed {subject} errno={name} reason={reason!r}")
