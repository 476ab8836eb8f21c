"""The parsers of stored and received bytes, each with its property.

An input either parses to a value that encodes to the same bytes, or raises the parser's documented error. Whatever else
flies out of a target is a finding.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from moc.agent import wire
from moc.errors import FormatUnsupportedError, IntegrityError, ManifestCorruptError, ShardCorruptError
from moc.format import keys
from moc.format.canonical import open_record, seal_record
from moc.format.manifest import (
    MANIFEST_VERSION,
    decode_format,
    decode_incarnation,
    decode_manifest,
    decode_victims,
    encode_format,
    encode_incarnation,
    encode_manifest,
    encode_victims,
)
from moc.format.object import encode_header, parse_header
from moc.format.relative import whole_state
from moc.format.tagged import decode_state, encode_state
from moc.snapshot.arena import Arena
from moc.snapshot.seal import decode_seal, encode_seal
from tests.fuzz import seeds
from tests.support.forge import sealed

__all__ = ["TARGETS", "Target"]

PACKET_BYTES = 60_000


@dataclass(frozen=True, slots=True)
class Target:
    """`check` raises for a finding; `seeds` are valid inputs; `is_json` says that inputs are JSON texts."""

    check: Callable[[bytes], None]
    seeds: Callable[[], tuple[bytes, ...]]
    is_json: bool = False


def record(content: bytes) -> None:
    try:
        fields = open_record(content, name="fuzz")
    except ManifestCorruptError:
        return
    assert seal_record(fields.body) == content


def manifest(content: bytes) -> None:
    try:
        value = decode_manifest(content, name="fuzz")
    except (ManifestCorruptError, FormatUnsupportedError):
        return
    if json.loads(content)["body"]["version"] == MANIFEST_VERSION:  # older ones are read, and not written any more
        _same_record(encode_manifest(value), content)
    assert decode_manifest(encode_manifest(value), name="again") == value


def incarnation(content: bytes) -> None:
    try:
        value = decode_incarnation(content, name="fuzz")
    except (ManifestCorruptError, FormatUnsupportedError):
        return
    _same_record(encode_incarnation(value), content)


def victims(content: bytes) -> None:
    try:
        value = decode_victims(content, name="fuzz", run="golden-1")
    except ManifestCorruptError:
        return
    _same_record(encode_victims(value), content)


def repository_format(content: bytes) -> None:
    try:
        decode_format(content, url="fuzz")
    except FormatUnsupportedError:
        return
    assert content == encode_format()


def key(content: bytes) -> None:
    text = content.decode("utf-8", "surrogateescape")
    name = keys.parse_manifest_key(text)
    assert name is None or keys.manifest_key(name) == text
    for parse, build in (
        (keys.parse_incarnation_key, keys.incarnation_key),
        (keys.parse_victims_key, keys.victims_key),
    ):
        life = parse(text)
        assert life is None or build(*life) == text
    try:
        parsed = keys.parse_object_key(text)
    except ManifestCorruptError:
        return
    assert keys.object_key(*parsed) == text


def header(content: bytes) -> None:
    try:
        value = parse_header(content, key="fuzz")
    except ShardCorruptError:
        return
    assert encode_header(value) == content


def state(content: bytes) -> None:
    try:
        tree = decode_state(content)
    except ManifestCorruptError:
        return
    again = encode_state(tree)
    assert (len(again.text).to_bytes(8, "little") + again.text) == content[: 8 + len(again.text)]
    assert again.size_bytes == len(content)


def relative_state(content: bytes) -> None:
    blobs = {0: seeds.relative_states()[1], 1: content}
    try:
        tree = whole_state(1, blobs, blobs.__getitem__)
    except ManifestCorruptError:
        return
    encode_state(tree)


def seal(content: bytes) -> None:
    value = decode_seal(memoryview(content))
    if value is not None:
        encoded = encode_seal(value)
        assert encoded[8:] == content[8 : len(encoded)]


def arena(content: bytes) -> None:
    before = _open_descriptors()
    fd = os.memfd_create("fuzz", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(fd, content)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    try:
        attached = Arena.attach(fd)
    except IntegrityError:
        assert _open_descriptors() == before
        return
    for catalog in attached.catalogs:
        attached.words(catalog.rank)
        attached.seals(catalog.rank)
    if attached.has_room(attached.descriptor):
        attached.describe(attached.descriptor)
    attached.close()
    assert _open_descriptors() == before


def packet(content: bytes) -> None:
    """The first byte says how many descriptors come along and whether the rest is spilled into the first of them."""
    before = _open_descriptors()
    count, is_spilled = content[0] % 4 if content else 0, bool(content and content[0] & 128)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        files = [os.memfd_create("fuzz", os.MFD_CLOEXEC) for _ in range(count)]
        text = content[1:]
        if is_spilled and files:
            os.write(files[0], text)
            text = b'{"spilled_bytes":%d}' % (len(text) - (content[0] >> 4 & 1))
        socket.send_fds(ours, [text[:PACKET_BYTES]], files)
        for file in files:
            os.close(file)
        try:
            message, received = wire.receive(theirs)
        except (OSError, ValueError):
            received = []
        else:
            assert isinstance(message, dict)
        for file in received:
            os.close(file)
    assert _open_descriptors() == before


def _same_record(encoded: bytes, content: bytes) -> None:
    """Unknown fields are ignored; without them the bytes are the same."""
    known, given = json.loads(encoded)["body"], json.loads(content)["body"]
    if _contains(known, given):
        assert encoded == content
    assert all(_contains(given[field], value) for field, value in known.items())


def _contains(given: object, value: object) -> bool:
    if isinstance(value, dict) and isinstance(given, dict):
        return all(name in given and _contains(given[name], item) for name, item in value.items())
    if isinstance(value, list) and isinstance(given, list):
        return len(value) == len(given) and all(map(_contains, given, value))
    return given == value and type(given) is type(value)


def _open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def _sealed(check: Callable[[bytes], None]) -> Callable[[bytes], None]:
    return lambda body: check(sealed(body))


def _metadata() -> tuple[bytes, ...]:
    return tuple(json.loads(content[8:])["__metadata__"]["moc"].encode() for content in seeds.headers())


def _state_texts() -> tuple[bytes, ...]:
    return tuple(blob[8 : 8 + int.from_bytes(blob[:8], "little")] for blob in seeds.states())


TARGETS: Mapping[str, Target] = {
    "record": Target(record, lambda: seeds.golden_files("*/*.json")),
    "manifest": Target(manifest, lambda: seeds.golden_files("manifests/*/*.json")),
    "manifest-body": Target(_sealed(manifest), lambda: seeds.golden_bodies("manifests/*/*.json"), is_json=True),
    "stale-experts": Target(lambda text: manifest(seeds.with_stale(text)), lambda: (seeds.stale(),), is_json=True),
    "incarnation-body": Target(_sealed(incarnation), lambda: seeds.golden_bodies("incarnations/*.json"), is_json=True),
    "victims-body": Target(_sealed(victims), lambda: seeds.golden_bodies("victims/*.json"), is_json=True),
    "format": Target(repository_format, lambda: seeds.golden_files("FORMAT")),
    "key": Target(
        key,
        lambda: (
            b"objects/000001-golden-1/000000000003-01010003/r00000-e00.safetensors",
            b"manifests/000001-golden-1/000000000003-01010003.json",
            b"incarnations/000001-golden-1.json",
            b"victims/000004-golden-1.json",
        ),
    ),
    "header": Target(header, seeds.headers),
    "header-metadata": Target(
        lambda text: header(seeds.with_metadata(seeds.headers()[0], text)), _metadata, is_json=True
    ),
    "state": Target(state, seeds.states),
    "state-text": Target(
        lambda text: state(len(text).to_bytes(8, "little") + text + bytes(-(8 + len(text)) % 64 + 512)),
        _state_texts,
        is_json=True,
    ),
    "relative-state": Target(relative_state, lambda: seeds.relative_states()[:1]),
    "seal": Target(seal, seeds.seals),
    "seal-body": Target(lambda content: seal(seeds.reseal_seal(content)), seeds.seals),
    "arena": Target(
        lambda content: arena(content + seeds.arena_bytes()[len(content) :]),
        lambda: (seeds.arena_bytes()[: seeds.DESCRIPTOR_PAGES],),
    ),
    "arena-descriptor": Target(
        lambda text: arena(seeds.reseal_arena(text)),
        lambda: (json.dumps(seeds.descriptor(), separators=(",", ":")).encode(),),
        is_json=True,
    ),
    "packet": Target(
        packet,
        lambda: tuple(bytes([first]) + b'{"verb":"hello","rank":0,"pid":1}' for first in (1, 0x81, 0x91)),
    ),
}
