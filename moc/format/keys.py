"""The names of everything in a repository, built and parsed in one place (docs/format.md, "Layout")."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from moc.errors import ManifestCorruptError, UsageError

__all__ = [
    "ATTEMPT_PATTERN",
    "FORMAT_KEY",
    "INCARNATIONS",
    "INCARNATION_LIMIT",
    "LAST_STEP",
    "MANIFESTS",
    "OBJECTS",
    "PIECE_PATTERN",
    "RANK_LIMIT",
    "RUN_PATTERN",
    "VICTIMS",
    "CheckpointName",
    "check_run_id",
    "incarnation_key",
    "manifest_key",
    "object_file",
    "object_key",
    "parse_incarnation_key",
    "parse_manifest_key",
    "parse_object_key",
    "parse_object_keys",
    "parse_victims_key",
    "victims_key",
]

FORMAT_KEY = "FORMAT"
INCARNATIONS = "incarnations"
MANIFESTS = "manifests"
OBJECTS = "objects"
VICTIMS = "victims"

LAST_STEP = 10**12 - 1
"""The largest step that a key can name."""
INCARNATION_LIMIT = 10**6 - 1
RUN_PATTERN = r"[a-z0-9][a-z0-9-]{0,31}"
ATTEMPT_PATTERN = r"[0-9a-f]{8}"
PIECE_PATTERN = r"d|e\d\d"
RANK_LIMIT = 10**6

_LIFE = rf"(?P<incarnation>(?!000000)\d{{6}})-(?P<run>{RUN_PATTERN})"
_ATTEMPT = rf"(?P<step>\d{{12}})-(?P<attempt>{ATTEMPT_PATTERN})"
_INCARNATION_KEY = re.compile(rf"{INCARNATIONS}/{_LIFE}\.json", re.ASCII)
_VICTIMS_KEY = re.compile(rf"{VICTIMS}/{_LIFE}\.json", re.ASCII)
_MANIFEST_KEY = re.compile(rf"{MANIFESTS}/{_LIFE}/{_ATTEMPT}\.json", re.ASCII)
_OBJECT_KEY = re.compile(
    rf"{OBJECTS}/{_LIFE}/{_ATTEMPT}/r(?P<rank>\d{{5}}|[1-9]\d{{5}})-(?P<piece>{PIECE_PATTERN})\.safetensors", re.ASCII
)


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class CheckpointName:
    """What identifies one attempt to save one step: run id, incarnation, step and attempt (8 hex digits)."""

    run: str
    incarnation: int
    step: int
    attempt: str

    def __str__(self) -> str:
        return f"{self.incarnation:06d}-{self.run}/{self.step:012d}-{self.attempt}"


def check_run_id(run: str) -> str:
    """Return the run id, or raise UsageError: lower-case letters, digits and hyphens, at most 32."""
    if not re.fullmatch(RUN_PATTERN, run):
        raise UsageError(f"run id is not usable in keys: run_id={run!r} allowed=1 to 32 of a-z, 0-9 and '-', not first")
    return run


def incarnation_key(run: str, incarnation: int) -> str:
    return _built(_INCARNATION_KEY, f"{INCARNATIONS}/{incarnation:06d}-{run}.json")


def victims_key(run: str, incarnation: int) -> str:
    """Return the key of the list of objects that a life is about to delete."""
    return _built(_VICTIMS_KEY, f"{VICTIMS}/{incarnation:06d}-{run}.json")


def parse_victims_key(key: str) -> tuple[str, int] | None:
    """Return (run, incarnation), or None for a key of another kind."""
    match = _VICTIMS_KEY.fullmatch(key)
    return None if match is None else (match["run"], int(match["incarnation"]))


def manifest_key(name: CheckpointName) -> str:
    return _built(_MANIFEST_KEY, f"{MANIFESTS}/{name}.json")


def object_key(name: CheckpointName, rank: int, piece: str) -> str:
    """Return the key of one rank's object; `piece` is "d" (dense part and small state) or "e00" (experts)."""
    return _built(_OBJECT_KEY, f"{OBJECTS}/{name}/{object_file(rank, piece)}")


def object_file(rank: int, piece: str) -> str:
    """Return the last segment of an object's key."""
    return f"r{rank:05d}-{piece}.safetensors"


def parse_incarnation_key(key: str) -> tuple[str, int] | None:
    """Return (run, incarnation), or None for a key of another kind."""
    match = _INCARNATION_KEY.fullmatch(key)
    return None if match is None else (match["run"], int(match["incarnation"]))


def parse_manifest_key(key: str) -> CheckpointName | None:
    """Return the checkpoint's name, or None for a key of another kind."""
    match = _MANIFEST_KEY.fullmatch(key)
    return None if match is None else _name(match)


def parse_object_key(key: str) -> tuple[CheckpointName, int, str]:
    """Return (checkpoint, rank, piece).

    Raises ManifestCorruptError, so that a hostile manifest cannot name other paths.
    """
    match = _OBJECT_KEY.fullmatch(key)
    if match is None:
        raise ManifestCorruptError(f"not an object key: key={key!r}")
    return _name(match), int(match["rank"]), match["piece"]


def parse_object_keys(keys: Iterable[str]) -> Iterator[tuple[CheckpointName, int, str]]:
    """Yield what `parse_object_key` returns for each key; of many keys each folder and each file is parsed once."""
    owners: dict[str, CheckpointName] = {}
    places: dict[str, tuple[int, str]] = {}
    for key in keys:
        folder, _, file = key.rpartition("/")
        if folder not in owners or file not in places:
            owner, rank, piece = parse_object_key(key)
            owners.setdefault(folder, owner)
            places[file] = (rank, piece)
        yield owners[folder], *places[file]


def _built(grammar: re.Pattern[str], key: str) -> str:
    """Return the key; raises UsageError for one that no listing would find again (a number with too many digits)."""
    if grammar.fullmatch(key) is None:
        raise UsageError(f"not a key of this format: key={key!r} allowed={grammar.pattern}")
    return key


def _name(match: re.Match[str]) -> CheckpointName:
    return CheckpointName(
        run=match["run"], incarnation=int(match["incarnation"]), step=int(match["step"]), attempt=match["attempt"]
    )
