"""Every error that moc raises, grouped by what the caller should do.

    MocError
      UsageError           fix the call or the configuration and try again
        ConfigError          a setting is unknown or out of range
        TopologyError        the rank grid cannot be served
        MismatchError        the stored state belongs to another model, experiment or run
        ClosedError          the object was already closed
      StorageError         the store refused; `retryable` says whether the same call may succeed later
        StoreUnavailableError  no answer, or an answer that asks to come back later
        StoreDeniedError       no rights
        StoreFullError         no space or quota
        ObjectMissingError     the key does not exist
      IntegrityError       stored bytes are not what was written: use another source
        ManifestCorruptError   a manifest or incarnation record fails its self-checksum or its schema
        ShardCorruptError      bytes of a shard do not match their crc32c
        FormatUnsupportedError the repository needs a feature that this version does not have
        CoverageError          elements of a tensor are missing or stored twice
      CoordinationError    the ranks, agents or lives of the job disagree
        RankFailedError        at least one rank failed; carries each rank's reason, the same on all ranks
        WaitTimeoutError       a bounded wait expired
        PlanDivergedError      ranks planned different saves
        FencedError            a newer life of the job has taken over
      SaveFailedError      one save failed; training may go on
      NoCheckpointError    nothing to recover from, or the step asked for does not exist
      InternalError        a defect in moc: please report it

Messages are lowercase facts that end in ``key=value`` pairs and name what is allowed. They are not part of the API; the
classes are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

__all__ = [
    "ClosedError",
    "ConfigError",
    "CoordinationError",
    "CoverageError",
    "FencedError",
    "FormatUnsupportedError",
    "IntegrityError",
    "InternalError",
    "ManifestCorruptError",
    "MismatchError",
    "MocError",
    "NoCheckpointError",
    "ObjectMissingError",
    "PlanDivergedError",
    "RankFailedError",
    "SaveFailedError",
    "ShardCorruptError",
    "StorageError",
    "StoreDeniedError",
    "StoreFullError",
    "StoreUnavailableError",
    "TopologyError",
    "UsageError",
    "WaitTimeoutError",
]


class MocError(Exception):
    """The root of all errors that moc raises on purpose."""


class UsageError(MocError):
    """The call or the configuration is wrong."""


class ConfigError(UsageError):
    """A setting is unknown, out of range, or contradicts another."""


class TopologyError(UsageError):
    """The rank grid cannot be served."""


class MismatchError(UsageError):
    """The stored state belongs to another model, experiment or run."""


class ClosedError(UsageError):
    """The object was closed or detached before this call."""


class StorageError(MocError):
    """The store refused an operation."""

    retryable = False


class StoreUnavailableError(StorageError):
    """The store gave no answer, or asked to come back later."""

    retryable = True


class StoreDeniedError(StorageError):
    """The store denies the rights for this operation."""


class StoreFullError(StorageError):
    """The store has no space or quota left."""


class ObjectMissingError(StorageError):
    """The key does not exist."""


class IntegrityError(MocError):
    """Stored bytes are not what was written."""


class ManifestCorruptError(IntegrityError):
    """A manifest or incarnation record fails its self-checksum or its schema."""


class ShardCorruptError(IntegrityError):
    """Bytes of a shard or an object header do not match their crc32c."""


class FormatUnsupportedError(IntegrityError):
    """The repository needs a format version or feature that this version does not have."""


class CoverageError(IntegrityError):
    """Elements of a tensor are missing or stored more than once."""


class CoordinationError(MocError):
    """The ranks, agents or lives of the job disagree."""


class RankFailedError(CoordinationError):
    """At least one rank failed; every rank raises this same error."""

    def __init__(self, failures: Mapping[int, str], kinds: Iterable[str] = ()) -> None:
        """`kinds` names the error classes of the failed ranks."""
        self.failures = dict(sorted(failures.items()))
        self.kinds = frozenset(kinds)
        listed = "; ".join(f"rank {rank}: {reason}" for rank, reason in self.failures.items())
        super().__init__(f"{len(self.failures)} rank(s) failed: {listed}")


class WaitTimeoutError(CoordinationError):
    """A bounded wait expired."""


class PlanDivergedError(CoordinationError):
    """Ranks planned different saves of the same step."""


class FencedError(CoordinationError):
    """A newer life of the job has taken over; this one must not write."""


class SaveFailedError(MocError):
    """One save failed; the training state is untouched and training may go on."""


class NoCheckpointError(MocError):
    """There is nothing to recover from, or the step asked for does not exist."""


class InternalError(MocError):
    """A defect in moc."""
