"""What a recovery tells of stale experts: short lines, bounded, and nothing where there are none."""

from __future__ import annotations

from moc.report import LINE_EXPERTS, STALE_LINES, RecoveryReport, StaleVersion
from moc.state import Expert


def _report(stale: tuple[StaleVersion, ...], *, plt: float | None, lost: tuple[int, ...] = ()) -> RecoveryReport:
    return RecoveryReport(
        step=20,
        source="memory",
        incarnation=2,
        parent_incarnation=1,
        run="run-7",
        lineage=((1, None),),
        bytes_per_rank=(10, 10),
        seconds={"restore": 0.5},
        rejected=(),
        notes=(),
        stale=stale,
        lost=lost,
        plt=plt,
    )


def _stale(step: int, *indices: int) -> tuple[StaleVersion, ...]:
    return tuple(StaleVersion(expert=Expert(layer=0, index=i), step=step, source="storage x") for i in indices)


def test_stale_experts_are_told_by_step_with_what_they_cost() -> None:
    text = str(_report((*_stale(12, 1), *_stale(16, 0, 3)), plt=0.0125, lost=(120, 0)))

    assert text.splitlines()[2:] == [
        "  3 expert(s) are stale, so the run is not bit-exact:",
        "    step 16 from storage x: layer/expert 0/0 0/3",
        "    step 12 from storage x: layer/expert 0/1",
        "  routes lost by layer: 120 0; PLT of the run so far 1.250%",
    ]


def test_a_state_without_stale_experts_tells_only_of_earlier_losses() -> None:
    assert "stale" not in str(_report((), plt=None))
    assert "stale" not in str(_report((), plt=0.0))
    assert "PLT of the run so far 2.000%" in str(_report((), plt=0.02))
    assert "not counted" in str(_report(_stale(3, 1), plt=None))


def test_a_report_stays_short_whatever_is_stale() -> None:
    many = tuple(row for step in range(20) for row in _stale(step, *range(2 * LINE_EXPERTS)))

    lines = str(_report(many, plt=None)).splitlines()

    assert len(lines) == 2 + 1 + STALE_LINES + 1 + 1
    assert all(len(line) < 120 for line in lines)
    assert f"and {LINE_EXPERTS} more" in lines[3]
    assert "and 12 older step(s)" in lines[-2]
