"""Removal of secrets from URLs and from other people's error messages."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from urllib.parse import unquote

__all__ = ["ambient_secrets", "redact_text", "redact_url", "scrub", "scrub_value", "secret_values"]

REASON_LENGTH_LIMIT = 200
SECRET_LENGTH_MINIMUM = 3  # replacing every "a" of a message hides nothing but its meaning
AMBIENT_LENGTH_MINIMUM = 6  # what the environment calls a key is often a number or a word

_SECRET_NAME = re.compile(r"key|secret|token|password|passwd|credential|signature|sas|connection_string", re.IGNORECASE)
_SECRET_PAIR = re.compile(
    r"\b([\w-]*(?:key|secret|token|password|passwd|credential|signature|sig|authorization)[\w-]*)"
    r"(['\"]?\s*[=:]\s*['\"]?)(?:(?:bearer|basic|token)\s+)?"
    r"(?!(?:incarnations|manifests|objects|victims)/|FORMAT\b)"  # keys of a repository are none
    r"[^\s,;&'\"]+",
    re.IGNORECASE,
)
_ACCESS_KEY = re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{12,}\b")  # as AWS gives them
_HARMLESS = re.compile(r"(?:incarnations|manifests|objects|victims)/.*|[0-9a-f]{8}|")  # keys and tokens of a repository
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/{1,2}[^\s'\"<>]+")
_SCHEME = re.compile(r"(?:[A-Za-z][A-Za-z0-9+.-]*::)*[A-Za-z][A-Za-z0-9+.-]*:/{1,2}(?!/)")  # chains too
# A colon, but not one before a port, inside an IPv6 address, or of an access point's name on AWS.
_PASSWORD = re.compile(r"^(?!arn:).*:(?!\d{1,5}(?:$|[/?#]))(?![^\[]*\])")


def redact_url(url: str) -> str:
    """Return the URL without user information, query and fragment."""
    match = _SCHEME.match(url)
    if match is None:
        return re.split(r"[?#]", url, maxsplit=1)[0]
    _, place = _split_user(url[match.end() :])
    return match.group() + re.split(r"[?#]", place, maxsplit=1)[0]


def redact_text(text: str, secrets: Iterable[str]) -> str:
    """Return the first line of a foreign message, shortened, without the given secrets and whatever looks like one."""
    return scrub(text.strip().partition("\n")[0], secrets)[:REASON_LENGTH_LIMIT]


def scrub(text: str, secrets: Iterable[str] = ()) -> str:
    """Return a text of any length without the given secrets and whatever looks like one."""
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, "***")
    text = _URL.sub(lambda match: redact_url(match.group()), _ACCESS_KEY.sub("***", text))
    return _SECRET_PAIR.sub(r"\1\2***", text)


def scrub_value(value: object, secrets: Iterable[str] = ()) -> object:
    """Return a JSON value without secrets: in every text, and in every field whose name says that it is one."""
    if isinstance(value, str):
        return scrub(value, secrets)
    if isinstance(value, Mapping):
        return {
            scrub(str(name), secrets): "***"
            if isinstance(item, str) and _SECRET_NAME.search(str(name)) and not _HARMLESS.fullmatch(item)
            else scrub_value(item, secrets)
            for name, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [scrub_value(item, secrets) for item in value]
    return value


def secret_values(url: str, options: Mapping[str, object]) -> frozenset[str]:
    """Return the strings among URL and options that must not be shown."""
    found = set(_named_secrets(options))
    match = _SCHEME.match(url)
    if match is not None:
        user, place = _split_user(url[match.end() :])
        query = re.split(r"[?#&]", place)[1:]
        found |= {user, *user.split(":", 1)[1:], *query, *(pair.partition("=")[2] for pair in query)}
        found |= {unquote(value) for value in found}
    return frozenset(value for value in found if len(value) >= SECRET_LENGTH_MINIMUM)


def _split_user(rest: str) -> tuple[str, str]:
    """Return user information and place of what follows a URL's scheme.

    Secret keys may hold "/", "?" and "@", and people do not escape them. So a ":" before the first "/" that begins no
    port number begins a password, which then ends at the last "@"; without an "@" nothing of it may be shown.
    """
    host = rest.partition("/")[0]
    before, at, after = host.rpartition("@")
    if at and not _PASSWORD.search(after):
        return before, after + rest[len(host) :]
    if not _PASSWORD.search(host):
        return "", rest
    user, at, place = rest.rpartition("@")
    return (user, place) if at else (rest, "***")


def ambient_secrets() -> frozenset[str]:
    """Return what must not be shown among the things that client libraries take from around the process.

    These are environment variables and fsspec's configuration; what profiles and roles give is not known here.
    """
    from fsspec.config import conf

    found = {*_named_secrets(os.environ), *_named_secrets(conf)}
    return frozenset(value for value in found if len(value) >= AMBIENT_LENGTH_MINIMUM)


def _named_secrets(options: Mapping[str, object]) -> Iterator[str]:
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from _named_secrets(value)
        elif isinstance(value, str) and _SECRET_NAME.search(str(name)):
            yield value
