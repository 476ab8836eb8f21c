"""Messages between trainers and their agent: one JSON object per SEQPACKET message, with file descriptors beside it.

A message that does not fit into a packet travels in a memfd, whose descriptor is then the first one.
"""

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from moc.errors import StoreUnavailableError, UsageError
from moc.host import Host

__all__ = ["Message", "connect", "peer_is_me", "receive", "send"]

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
        message = json.loads(text)
        if isinstance(message, dict) and "spilled_bytes" in message:
            length = message["spilled_bytes"]
            if type(length) is not int or not 0 <= length <= MESSAGE_LIMIT_BYTES or not descriptors:
                raise ValueError(f"message has an impossible length: bytes={length} allowed={MESSAGE_LIMIT_BYTES}")
            spill = descriptors.pop(0)
            try:
                message = json.loads(os.pread(spill, length, 0))
            finally:
                os.close(spill)
        if not isinstance(message, dict):
            raise ValueError("message is not an object")
    except BaseException:
        for descriptor in descriptors:
            os.close(descriptor)
        raise
    return message, descriptors


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
