"""Removal of secrets from URLs and from other people's error messages: pure functions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

__all__ = ["redact_text", "redact_url", "secret_values"]

REASON_LENGTH_LIMIT = 200

_SECRET_NAME = re.compile(r"key|secret|token|password|passwd|credential|signature|sas|connection_string", re.IGNORECASE)
_SECRET_PAIR = re.compile(
    r"\b([\w-]*(?:key|secret|token|password|credential|signature|sig|authorization)[\w-]*)(['\"]?\s*[=:]\s*['\"]?)[^\s,;&'\"]+",
    re.IGNORECASE,
)
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>]+")


def redact_url(url: str) -> str:
    """Return the URL without user information, query and fragment."""
    scheme, separator, rest = re.split(r"[?#]", url, maxsplit=1)[0].partition("://")
    if not separator:
        return scheme
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def redact_text(text: str, secrets: Iterable[str]) -> str:
    """Return the first line of a foreign message, shortened, without the given secrets and whatever looks like one."""
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, "***")
    text = _URL.sub(lambda match: redact_url(match.group()), text.strip().partition("\n")[0])
    return _SECRET_PAIR.sub(r"\1\2***", text)[:REASON_LENGTH_LIMIT]


def secret_values(url: str, options: Mapping[str, object]) -> frozenset[str]:
    """Return the strings among URL and options that must not be shown."""
    found = set(_named_secrets(options))
    user, at, _ = url.partition("://")[2].partition("/")[0].rpartition("@")
    if at:
        found.add(user)
        found.update(user.split(":", 1)[1:])
    return frozenset(value for value in found if value)


def _named_secrets(options: Mapping[str, object]) -> Iterator[str]:
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from _named_secrets(value)
        elif isinstance(value, str) and _SECRET_NAME.search(str(name)):
            yield value
