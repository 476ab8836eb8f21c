"""Foreign errors become the right class, and no secret gets into a message."""

from __future__ import annotations

import errno

import pytest

from moc.errors import ObjectMissingError, StorageError, StoreDeniedError, StoreFullError, StoreUnavailableError
from moc.store.redact import redact_text, redact_url, secret_values
from moc.store.remote import RemoteStore
from moc.store.translate import class_for_remote, is_precondition_failure, translate_os_error, translate_remote_error


class AnsweredError(Exception):
    """An error as HTTP clients raise it: with a status, or with botocore's dictionary."""

    def __init__(self, status: int | None = None, code: str | None = None) -> None:
        super().__init__("refused")
        if code is None:
            self.status = status
        else:
            self.response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (400, StorageError),
        (401, StoreDeniedError),
        (403, StoreDeniedError),
        (404, ObjectMissingError),
        (408, StoreUnavailableError),
        (409, StoreUnavailableError),
        (429, StoreUnavailableError),
        (500, StoreUnavailableError),
        (501, StorageError),
        (503, StoreUnavailableError),
        (507, StoreFullError),
    ],
)
def test_a_status_decides_the_class(status: int, expected: type[StorageError]) -> None:
    assert class_for_remote(AnsweredError(status)) is expected
    assert class_for_remote(AnsweredError(status, code="Whatever")) is expected


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (400, "RequestTimeout", StoreUnavailableError),
        (400, "ExpiredToken", StoreDeniedError),
        (403, "QuotaExceeded", StoreFullError),
        (404, "NoSuchBucket", StorageError),
        (404, "NoSuchKey", ObjectMissingError),
        (503, "SlowDown", StoreUnavailableError),
    ],
)
def test_a_code_outranks_the_status(status: int, code: str, expected: type[StorageError]) -> None:
    error = OSError(errno.EIO, "wrapped")
    error.__cause__ = AnsweredError(status, code)

    assert class_for_remote(error) is expected


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (PermissionError("no"), StoreDeniedError),
        (FileNotFoundError("a"), ObjectMissingError),
        (TimeoutError(), StoreUnavailableError),
        (ConnectionResetError(), StoreUnavailableError),
        (OSError(errno.EBUSY, "SlowDown"), StoreUnavailableError),
        (OSError(errno.ENOSPC, "full"), StoreFullError),
        (NotImplementedError("read only"), StorageError),
        (type("EndpointConnectionError", (type("HTTPClientError", (Exception,), {}),), {})(), StoreUnavailableError),
        (type("NoCredentialsError", (Exception,), {})(), StoreDeniedError),
    ],
)
def test_a_type_or_errno_decides_where_there_is_no_answer(error: Exception, expected: type[StorageError]) -> None:
    assert class_for_remote(error) is expected


def test_a_failed_condition_is_recognised() -> None:
    wrapped = OSError(errno.EINVAL, "precondition")
    wrapped.__cause__ = AnsweredError(412, "PreconditionFailed")

    assert is_precondition_failure(wrapped)
    assert is_precondition_failure(FileExistsError())
    assert not is_precondition_failure(AnsweredError(404))


def test_a_message_names_action_subject_code_and_reason() -> None:
    message = str(
        translate_remote_error(AnsweredError(503, "SlowDown"), action="put", subject="key='a' url=s3://b", secrets=())
    )

    assert message == "put failed key='a' url=s3://b error=AnsweredError code=SlowDown status=503 reason='refused'"


def test_an_errno_is_named() -> None:
    error = translate_os_error(OSError(errno.ENOSPC, "No space left on device"), action="put", subject="key='a'")

    assert isinstance(error, StoreFullError)
    assert str(error) == "put failed key='a' errno=ENOSPC reason='No space left on device'"


@pytest.mark.parametrize(
    "text",
    [
        "GET https://host/a?X-Amz-Signature=hunter2&X-Amz-Credential=hunter2 failed",
        "bad url sftp://me:hunter2@host/path",
        "Authorization: hunter2",
        "aws_secret_access_key=hunter2",
        "{'account_key': 'hunter2', 'x': 1}",
        "token = hunter2, more",
        "the server quoted hunter2 in plain words",
        "first line\nsecret=hunter2",
    ],
)
def test_secrets_are_removed_from_foreign_messages(text: str) -> None:
    secrets = secret_values("sftp://me:hunter2@host/path", {})

    assert "hunter2" not in redact_text(text, secrets)
    if "plain words" not in text:
        assert "hunter2" not in redact_text(text, ())


def test_secrets_are_found_in_urls_and_nested_options() -> None:
    options = {"key": "one", "client_kwargs": {"aws_session_token": "two"}, "anon": False, "endpoint_url": "http://x"}

    assert secret_values("s3://user:three@bucket/a", options) == {"one", "two", "three", "user:three"}


def test_a_url_is_shown_without_user_and_query() -> None:
    assert redact_url("sftp://me:pw@host:22/a/b?token=x#y") == "sftp://host:22/a/b"
    assert RemoteStore("memory://me:hunter2@place/a").properties.url == "memory://place/a"
