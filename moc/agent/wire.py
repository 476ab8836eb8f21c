"""Messages between trainers and their agent: one JSON object per SEQPACKET message, with file descriptors beside it.

A message that does not fit into a packet travels in a memfd, whose descriptor is then the first one.
"""

from __future__ import annotations

import json
import os
import socket
import stat
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from moc.errors import StoreUnavailableError, UsageError
from moc.host import Host

__all__ = [
    "Message",
    "connect",
    "integer",
    "integers",
    "mapping",
    "number",
    "peer_is_me",
    "receive",
    "send",
    "text",
    "texts",
]

PACKET_LIMIT_BYTES = 60_000
MESSAGE_LIMIT_BYTES = 1 << 28
DESCRIPTOR_LIMIT = 8

Message = dict[str, Any]


def send(sock: socket.socket, message: Mapping[str, object], descriptors: Sequence[int] = ()) -> None:
    """Send one message. Blocks: as the socket does. Raises: OSError."""
    text = json.dumps(message, separators=(",", ":")).encode()
    if len(text) <= PACKET_LIMIT_BYTES:
        socket.send_fds(sock, [text], list(descriptors))
        return
    spill = os.memfd_create("moc-message", os.MFD_CLOEXEC)
    try:
        with os.fdopen(os.dup(spill), "wb") as stream:
            stream.write(text)
        socket.send_fds(sock, [json.dumps({"spilled_bytes": len(text)}).encode()], [spill, *descriptors])
    finally:
        os.close(spill)


def receive(sock: socket.socket) -> tuple[Message, list[int]]:
    """Return the next message and its descriptors, which the caller closes.

    Raises ConnectionError at the end, OSError, ValueError.
    """
    text, descriptors, flags, _ = socket.recv_fds(
        sock, PACKET_LIMIT_BYTES + 1, DESCRIPTOR_LIMIT, socket.MSG_CMSG_CLOEXEC
    )
    try:
        if not text:
            raise ConnectionResetError("the other side closed the connection")
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise ValueError(f"message was truncated: flags={flags}")
        message = _parse(text)
        if "spilled_bytes" in message:
            length = message["spilled_bytes"]
            if type(length) is not int or not 0 <= length <= MESSAGE_LIMIT_BYTES or not descriptors:
                raise ValueError(f"message has an impossible length: allowed={MESSAGE_LIMIT_BYTES}")
            spill = descriptors.pop(0)
            try:
                message = _parse(_read_spill(spill, length))
            finally:
                os.close(spill)
    except BaseException:
        for descriptor in descriptors:
            os.close(descriptor)
        raise
    return message, descriptors


def _parse(text: bytes) -> Message:
    try:
        message = json.loads(text)
    except RecursionError as error:
        raise ValueError("message is nested too deep") from error
    if not isinstance(message, dict):
        raise ValueError("message is not an object")
    return message


def _read_spill(spill: int, length: int) -> bytes:
    """Return the bytes of a memfd; raises ValueError if it is something else or holds another number of bytes."""
    facts = os.fstat(spill)
    if not stat.S_ISREG(facts.st_mode) or facts.st_size != length:
        raise ValueError(f"spilled message has another length: bytes={facts.st_size} expected={length}")
    return os.pread(spill, length, 0)


def integer(message: Mapping[str, Any], field: str) -> int:
    """Return a number of a message that counts something; raises UsageError."""
    value = message.get(field)
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise _wrong(message, field, "an integer >= 0")
    return value


def number(message: Mapping[str, Any], field: str) -> float:
    """Return a finite number of a message; raises UsageError."""
    value = message.get(field)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e18:  # nor is NaN smaller
        raise _wrong(message, field, "a finite number")
    return float(value)


def text(message: Mapping[str, Any], field: str) -> str:
    """Return a text of a message; raises UsageError."""
    value = message.get(field)
    if not isinstance(value, str):
        raise _wrong(message, field, "a text")
    return value


def integers(message: Mapping[str, Any], field: str) -> list[int]:
    """Return a list of integers of a message; raises UsageError."""
    value = message.get(field)
    if not isinstance(value, list) or not all(type(item) is int for item in value):
        raise _wrong(message, field, "a list of integers")
    return value


def texts(message: Mapping[str, Any], field: str) -> list[str]:
    """Return a list of texts of a message; raises UsageError."""
    value = message.get(field)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise _wrong(message, field, "a list of texts")
    return value


def mapping(message: Mapping[str, Any], field: str) -> Message:
    """Return an object inside a message; raises UsageError."""
    value = message.get(field)
    if not isinstance(value, dict):
        raise _wrong(message, field, "an object")
    return value


def _wrong(message: Mapping[str, Any], field: str, allowed: str) -> UsageError:
    return UsageError(f"field of a message is wrong: field={field} given={repr(message.get(field))[:80]} {allowed=}")


def peer_is_me(sock: socket.socket) -> bool:
    """Return whether the other side of a Unix socket runs as this user."""
    _, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return bool(uid == os.getuid())


def connect(path: str, timeout_s: float, *, host: Host) -> socket.socket:
    """Return a connection to an agent.

    Raises UsageError for somebody else's socket, StoreUnavailableError where nobody listens.
    """
    try:
        sock = host.connect(path, timeout_s)
    except OSError as error:
        raise StoreUnavailableError(f"agent does not answer: socket={path} reason={error}") from error
    if not peer_is_me(sock):
        sock.close()
        raise UsageError(f"agent belongs to another user: socket={path}")
    return sock
