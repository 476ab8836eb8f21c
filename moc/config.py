"""The settings a user tunes, validated when constructed.

Components (store, clock, trace) are arguments, not settings.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from moc.errors import ConfigError

__all__ = ["Config"]

MODES = ("full", "partial", "partial_by_load")
LONGEST_TIMEOUT_S = 1e6  # what socket, lock and collective timeouts all take; 11 days


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """All settings of a `CheckpointManager`.

    snapshot_every / persist_every: steps between snapshots in memory / commits to storage; the latter a multiple of the
    former, 0 = never. mode: "full" saves all experts; "partial" lets them take turns, "partial_by_load" prefers those
    with the most tokens since their last commit. k_snapshot / k_persist: experts per MoE layer in a snapshot / a
    commit, the latter at most the former; None means all, the only value in mode `full`. versions: copies of the
    changing state that the arena holds (2..8). replicas: copies on peer nodes. keep_last / keep_every: retention keeps
    the newest n checkpoints, and those whose step is a multiple of the latter (0: none). memory_budget_bytes: most host
    memory the arena of one node may take; None means what is free. timeout_s: bound of every wait for other ranks,
    agents or a commit. plt_limit: alarm threshold of lost tokens (0..1).
    """

    snapshot_every: int = 1
    persist_every: int = 100
    k_snapshot: int | None = None
    k_persist: int | None = None
    mode: str = "full"
    versions: int = 3
    replicas: int = 0
    keep_last: int = 3
    keep_every: int = 0
    memory_budget_bytes: int | None = None
    timeout_s: float = 600.0
    plt_limit: float = 0.0375

    def __new__(cls, **settings: object) -> Config:
        """Refuse unknown settings by name, before Python would with a TypeError."""
        allowed = [field.name for field in fields(cls)]
        unknown = sorted(set(settings) - set(allowed))
        if unknown:
            raise ConfigError(f"unknown setting: {', '.join(unknown)} allowed={', '.join(allowed)}")
        return object.__new__(cls)

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            optional = field.name in ("k_snapshot", "k_persist", "memory_budget_bytes")
            expected: tuple[type, ...] = (int, float) if field.name in ("timeout_s", "plt_limit") else (int,)
            if (
                field.name != "mode"
                and not (optional and value is None)
                and (isinstance(value, bool) or not isinstance(value, expected))
            ):
                raise ConfigError(
                    f"setting has a wrong type: {field.name}={value!r} allowed={'/'.join(t.__name__ for t in expected)}"
                )
        self._check(self.snapshot_every >= 1, "snapshot_every", ">= 1")
        self._check(self.persist_every >= 0, "persist_every", ">= 0")
        self._check(
            self.persist_every % self.snapshot_every == 0,
            "persist_every",
            f"a multiple of snapshot_every={self.snapshot_every}",
        )
        self._check(self.mode in MODES, "mode", ", ".join(map(repr, MODES)))
        self._check_k()
        self._check(2 <= self.versions <= 8, "versions", "2..8")
        self._check(self.replicas >= 0, "replicas", ">= 0")
        self._check(self.keep_last >= 1, "keep_last", ">= 1")
        self._check(self.keep_every >= 0, "keep_every", ">= 0")
        self._check(
            self.memory_budget_bytes is None or self.memory_budget_bytes > 0, "memory_budget_bytes", "> 0 or None"
        )
        self._check(0 < self.timeout_s <= LONGEST_TIMEOUT_S, "timeout_s", f"0 < x <= {LONGEST_TIMEOUT_S:g}")
        self._check(0 < self.plt_limit <= 1, "plt_limit", "0 < x <= 1")

    @property
    def arena_versions(self) -> int:
        """The versions of an arena: one more while something is persisted, so that a save costs no snapshots, and one
        more for the newest snapshot that has replicas, which is older than the newest.
        """
        return self.versions + (1 if self.persist_every else 0) + (1 if self.replicas else 0)

    def _check_k(self) -> None:
        if self.mode == "full":
            self._check(self.k_snapshot is None, "k_snapshot", "None in mode 'full'")
            self._check(self.k_persist is None, "k_persist", "None in mode 'full'")
        any_k = "1..the experts of a layer, or None"
        self._check(self.k_snapshot is None or self.k_snapshot >= 1, "k_snapshot", any_k)
        if self.k_snapshot is None:
            self._check(self.k_persist is None or self.k_persist >= 1, "k_persist", any_k)
            return
        is_within = self.k_persist is not None and 1 <= self.k_persist <= self.k_snapshot
        self._check(is_within, "k_persist", f"1..k_snapshot={self.k_snapshot}")

    def _check(self, is_legal: bool, name: str, allowed: str) -> None:
        if not is_legal:
            raise ConfigError(f"setting is out of range: {name}={getattr(self, name)!r} allowed={allowed}")
