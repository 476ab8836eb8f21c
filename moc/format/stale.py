"""Experts of a checkpoint that are not of its own step and attempt: their rows in a manifest, and what rows must obey.

Every expert of a checkpoint has one (source, step): the attempt whose objects hold its bytes, and the step of these
bytes. Without a row it is the checkpoint itself and its step. Rows are sorted by expert, each once; what they name lies
in the checkpoint's own run and before it. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from moc.errors import InternalError, ManifestCorruptError, UsageError
from moc.format.canonical import FIELD_LIMIT, Fields
from moc.format.columns import Block
from moc.format.keys import ATTEMPT_PATTERN, INCARNATION_LIMIT, LAST_STEP, CheckpointName
from moc.state import Expert

__all__ = ["StaleExpert", "check_owners", "decode_stale", "encode_stale", "is_earlier", "sources"]

ROW_FIELDS = 5  # layer, index, step, number of the source, routed
STALE_LIMIT = 250_000  # 60 layers of 256 experts have 15,360; refuses hostile numbers before they take memory


@dataclass(frozen=True, slots=True, kw_only=True)
class StaleExpert:
    """Where the bytes of one expert are that a checkpoint has not written at its own step.

    `step` is the step of the bytes, below the checkpoint's. `source` is the attempt whose objects hold them; it may be
    the checkpoint itself. `routed` counts the tokens that these bytes have learned from since counting began, 0 where
    nothing counts them or counting began later.
    """

    expert: Expert
    step: int
    source: CheckpointName
    routed: int

    def __post_init__(self) -> None:
        if not 0 <= self.step <= self.source.step or not 0 <= self.routed <= FIELD_LIMIT:
            raise InternalError(
                f"stale expert is impossible: expert={self.expert} step={self.step} source={self.source} "
                f"routed={self.routed} allowed=step at most the source's, routed from 0"
            )

    def to_json(self) -> list[object]:
        """Return a row for programs, which names the source in full."""
        return [self.expert.layer, self.expert.index, self.step, str(self.source), self.routed]


def sources(stale: Iterable[StaleExpert]) -> tuple[CheckpointName, ...]:
    """Return the attempts that hold stale experts, sorted, each once."""
    return tuple(sorted({row.source for row in stale}))


def is_earlier(source: CheckpointName, checkpoint: CheckpointName) -> bool:
    """Return whether experts of a checkpoint can come from this attempt: an earlier one of its run, or itself."""
    return source.run == checkpoint.run and source <= checkpoint and source.step <= checkpoint.step


def encode_stale(stale: Sequence[StaleExpert]) -> dict[str, object]:
    """Return the fields of a manifest: `stale_experts`, and `sources` where there are any."""
    if not stale:
        return {"stale_experts": []}
    if len(stale) > STALE_LIMIT:
        raise UsageError(f"too many stale experts: given={len(stale)} allowed={STALE_LIMIT}")
    names = sources(stale)
    number = {name: index for index, name in enumerate(names)}
    return {
        "sources": [[name.incarnation, name.step, name.attempt] for name in names],
        "stale_experts": [
            [row.expert.layer, row.expert.index, row.step, number[row.source], row.routed] for row in stale
        ],
    }


def decode_stale(fields: Fields, checkpoint: CheckpointName) -> tuple[StaleExpert, ...]:
    """Return the rows of a manifest's body; raises ManifestCorruptError for what `encode_stale` never makes."""
    rows = fields.rows("stale_experts")
    if not rows and "sources" not in fields.body:
        return ()
    if len(rows) > STALE_LIMIT:
        raise _wrong(fields, "stale_experts", f"{len(rows)} rows", f"at most {STALE_LIMIT} rows")
    names = _sources(fields, checkpoint)
    stale = tuple(_row(row, names, checkpoint, fields) for row in rows)
    for first, second in pairwise(stale):
        if first.expert >= second.expert:
            raise _wrong(fields, "stale_experts", second.expert, "sorted by expert, each once")
    used = {row.source for row in stale}
    for name in names:
        if name not in used:
            raise _wrong(fields, "sources", name, "only attempts that a stale expert comes from")
    return stale


def check_owners(
    fields: Fields, checkpoint: CheckpointName, stale: Sequence[StaleExpert], blocks: Iterable[Block]
) -> None:
    """Raise ManifestCorruptError unless each object is the checkpoint's own, or has experts and is of a source, and
    each other source has one.
    """
    others = {name: 0 for name in sources(stale) if name != checkpoint}
    for block in blocks:
        if block.owner == checkpoint:
            continue
        if block.piece == "d" or block.owner not in others:
            raise ManifestCorruptError(f"object is of another attempt: name={fields.name} object={block.rows[0].key}")
        others[block.owner] += len(block.rows)
    for name, count in others.items():
        if not count:
            raise ManifestCorruptError(f"source of stale experts has no object: name={fields.name} source={name}")


def _sources(fields: Fields, checkpoint: CheckpointName) -> tuple[CheckpointName, ...]:
    names = []
    for index, row in enumerate(fields.rows("sources")):
        if not isinstance(row, list) or len(row) != 3:
            raise _wrong(fields, "sources", row, "lists of incarnation, step and attempt")
        cells = Fields(
            dict(zip(("incarnation", "step", "attempt"), row, strict=True)), f"{fields.name}.sources[{index}]"
        )
        names.append(
            CheckpointName(
                run=checkpoint.run,
                incarnation=cells.integer("incarnation", minimum=1, maximum=INCARNATION_LIMIT),
                step=cells.integer("step", maximum=LAST_STEP),
                attempt=cells.text("attempt", ATTEMPT_PATTERN),
            )
        )
    for first, second in pairwise(names):
        if first >= second:
            raise _wrong(fields, "sources", second, "sorted, each once")
    for name in names:
        if not is_earlier(name, checkpoint):
            raise _wrong(fields, "sources", name, f"no later moment than {checkpoint}")
    return tuple(names)


def _row(row: object, names: Sequence[CheckpointName], checkpoint: CheckpointName, fields: Fields) -> StaleExpert:
    is_row = isinstance(row, list) and len(row) == ROW_FIELDS
    if not isinstance(row, list) or not is_row or not all(type(n) is int and 0 <= n <= FIELD_LIMIT for n in row):
        raise _wrong(fields, "stale_experts", row, "lists of layer, expert, step, source and routed")
    layer, index, step, number, routed = row
    if number >= len(names):
        raise _wrong(fields, "stale_experts", row, f"a source below {len(names)}")
    if step >= checkpoint.step or step > names[number].step:
        raise _wrong(fields, "stale_experts", row, f"a step below {checkpoint.step}, at most that of {names[number]}")
    return StaleExpert(expert=Expert(layer=layer, index=index), step=step, source=names[number], routed=routed)


def _wrong(fields: Fields, field: str, given: object, expected: str) -> ManifestCorruptError:
    return ManifestCorruptError(
        f"record field is wrong: name={fields.name} field={field} given={str(given)[:80]} expected={expected}"
    )
