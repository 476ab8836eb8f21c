"""From foreign exceptions to moc's storage errors: the one place where errno values and HTTP codes are read."""

from __future__ import annotations

import errno
from collections.abc import Collection, Iterator, Mapping

from moc.errors import ObjectMissingError, StorageError, StoreDeniedError, StoreFullError, StoreUnavailableError
from moc.store.redact import redact_text

__all__ = [
    "class_for_errno",
    "class_for_remote",
    "is_precondition_failure",
    "translate_os_error",
    "translate_remote_error",
]

CHAIN_LIMIT = 8  # causes of causes that are looked at for a code

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


_CLASS_BY_CODE: Mapping[str, type[StorageError]] = {
    "ExpiredToken": StoreDeniedError,
    "InvalidToken": StoreDeniedError,
    "TokenRefreshRequired": StoreDeniedError,
    "NoSuchBucket": StorageError,  # comes as 404, but no object is missing: the URL is wrong
    "RequestTimeout": StoreUnavailableError,  # comes as 400
    "SlowDown": StoreUnavailableError,
    "ServiceUnavailable": StoreUnavailableError,
    "InternalError": StoreUnavailableError,
    # Bytes that were damaged or lost on the way there: they come as 400, and sending them again helps.
    "BadDigest": StoreUnavailableError,
    "IncompleteBody": StoreUnavailableError,
    "InvalidPart": StoreUnavailableError,
    "XAmzContentChecksumMismatch": StoreUnavailableError,
    "XAmzContentSHA256Mismatch": StoreUnavailableError,
    "QuotaExceeded": StoreFullError,
    "InsufficientStorage": StoreFullError,
    "XMinioStorageFull": StoreFullError,
    "XMinioAdminBucketQuotaExceeded": StoreFullError,
}
_CLASS_BY_NAME: Mapping[str, type[StorageError]] = {
    # botocore
    "NoCredentialsError": StoreDeniedError,
    "PartialCredentialsError": StoreDeniedError,
    "CredentialRetrievalError": StoreDeniedError,
    "TokenRetrievalError": StoreDeniedError,
    "FlexibleChecksumError": StoreUnavailableError,
    "HTTPClientError": StoreUnavailableError,
    "IncompleteReadError": StoreUnavailableError,
    "ResponseParserError": StoreUnavailableError,
    # google.auth
    "DefaultCredentialsError": StoreDeniedError,
    "RefreshError": StoreDeniedError,
    "TransportError": StoreUnavailableError,
    # aiohttp
    "ClientConnectionError": StoreUnavailableError,
    "ClientPayloadError": StoreUnavailableError,
    "ServerTimeoutError": StoreUnavailableError,
    # requests
    "ConnectionError": StoreUnavailableError,
    "Timeout": StoreUnavailableError,
    "ChunkedEncodingError": StoreUnavailableError,
    # asyncio, fsspec and the language
    "TimeoutError": StoreUnavailableError,
    "PermissionError": StoreDeniedError,
    "FileNotFoundError": ObjectMissingError,
    "IsADirectoryError": ObjectMissingError,
    "NotADirectoryError": ObjectMissingError,
}
_DENIED_STATUS = frozenset({401, 403, 407})
_MISSING_STATUS = frozenset({404, 410})
_LATER_STATUS = frozenset({408, 409, 423, 425, 429})
_FULL_STATUS = frozenset({507})
_REFUSED_STATUS = frozenset({501, 505})  # server errors that no repetition mends


def class_for_remote(error: BaseException) -> type[StorageError]:
    """Return the class for what a client library raised: by its code, HTTP status, errno or type, in this order."""
    chain = list(_causes(error))
    for part in chain:
        found = _CLASS_BY_CODE.get(_code(part))
        if found is not None:
            return found
    for part in chain:
        found = _class_for_status(_status(part))
        if found is not None:
            return found
    for part in chain:
        if isinstance(part, OSError) and part.errno is not None and class_for_errno(part.errno) is not StorageError:
            return class_for_errno(part.errno)
        for ancestor in type(part).__mro__:
            if ancestor.__name__ in _CLASS_BY_NAME:
                return _CLASS_BY_NAME[ancestor.__name__]
    return StorageError


def is_precondition_failure(error: BaseException) -> bool:
    """Return whether a create-only put met an existing object."""
    return any(isinstance(part, FileExistsError) or _status(part) == 412 for part in _causes(error))


def translate_remote_error(
    error: BaseException, *, action: str, subject: str, secrets: Collection[str]
) -> StorageError:
    """Return the storage error for what a client library raised, without the secrets its message may quote."""
    chain = list(_causes(error))
    code = next((code for code in map(_code, chain) if code), None)
    status = next((status for status in map(_status, chain) if status is not None), None)
    facts = "".join(f" {name}={value}" for name, value in (("code", code), ("status", status)) if value is not None)
    reason = redact_text(str(error), secrets)
    return class_for_remote(error)(f"{action} failed {subject} error={type(error).__name__}{facts} {reason=}")


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield the error, its cause, and so on."""
    part: BaseException | None = error
    for _ in range(CHAIN_LIMIT):
        if part is None:
            return
        yield part
        part = part.__cause__ or (None if part.__suppress_context__ else part.__context__)


def _response_field(error: BaseException, group: str, name: str) -> object:
    """Return a field of the dictionary that botocore's ClientError carries."""
    response = getattr(error, "response", None)
    fields = response.get(group) if isinstance(response, Mapping) else None
    return fields.get(name) if isinstance(fields, Mapping) else None


def _code(error: BaseException) -> str:
    return str(_response_field(error, "Error", "Code") or "")


def _status(error: BaseException) -> int | None:
    response = getattr(error, "response", None)
    for value in (
        _response_field(error, "ResponseMetadata", "HTTPStatusCode"),
        getattr(error, "status", None),
        getattr(error, "status_code", None),
        getattr(response, "status_code", None),
        getattr(error, "code", None),
    ):
        if isinstance(value, int | str) and str(value).isdecimal() and 100 <= int(value) < 600:
            return int(value)
    return None


def _class_for_status(status: int | None) -> type[StorageError] | None:
    if status is None or status < 400:
        return None
    if status in _DENIED_STATUS:
        return StoreDeniedError
    if status in _MISSING_STATUS:
        return ObjectMissingError
    if status in _FULL_STATUS:
        return StoreFullError
    if status in _LATER_STATUS or (status >= 500 and status not in _REFUSED_STATUS):
        return StoreUnavailableError
    return None
