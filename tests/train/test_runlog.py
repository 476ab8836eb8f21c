"""What is read back from a log is what survived, and the comparison of two runs misses nothing."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from moc_train.compare import compare, main, read_lineage
from moc_train.data.order import digest_ids, sample_ids
from moc_train.runlog import RunLog, log_path, read_records, surviving_steps

BATCH, RANKS, EPOCH = 4, 2, 10


def start(incarnation: int, resume_step: int) -> dict[str, Any]:
    return {"event": "start", "incarnation": incarnation, "resume_step": resume_step}


def line(rank: int, step: int, incarnation: int, loss: float | None = None) -> dict[str, Any]:
    ids = sample_ids((step - 1) * BATCH, BATCH, count=EPOCH, seed=0)
    half = BATCH // RANKS
    loss = 1 / step if loss is None else loss
    return {
        "event": "step",
        "incarnation": incarnation,
        "step": step,
        "loss": loss,
        "loss_hex": loss.hex(),
        "samples": {
            "first": (step - 1) * BATCH,
            "count": BATCH,
            "epoch_size": EPOCH,
            "digest": digest_ids(ids),
            "rank_ids": [list(ids[rank * half : (rank + 1) * half])],
        },
    }


def write_run(folder: Path, incarnations: Iterable[tuple[int, range]], last_loss: float | None = None) -> Path:
    for rank in range(RANKS):
        with RunLog(log_path(folder, rank)) as log:
            for number, steps in incarnations:
                log.write(start(number, steps.start - 1))
                for step in steps:
                    log.write(line(rank, step, number, last_loss if step == 10 else None))
    return folder


def test_a_torn_last_line_is_left_out_and_cut_off_by_the_next_life(tmp_path: Path) -> None:
    path = tmp_path / "rank00000.jsonl"
    path.write_text('{"event": "step", "step": 1}\n{"event": "st')
    assert read_records(path) == [{"event": "step", "step": 1}]

    with RunLog(path) as log:
        log.write({"event": "step", "step": 2})

    assert [record["step"] for record in read_records(path)] == [1, 2]


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rank00000.jsonl"
    path.write_text('{"event": "step"}\n{"ev\n{"event": "step"}\n')

    with pytest.raises(ValueError, match=r"log line is not JSON path=.* line=2"):
        read_records(path)


def test_a_line_is_readable_as_soon_as_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "rank00000.jsonl"
    with RunLog(path) as log:
        log.write({"loss": 0.1, "loss_hex": (0.1).hex()})

        (record,) = read_records(path)

    assert float.fromhex(record["loss_hex"]) == record["loss"] == 0.1


def test_a_start_takes_back_the_steps_after_its_resume_step() -> None:
    records = [start(1, 0), *(line(0, step, 1) for step in range(1, 8)), start(2, 5), line(0, 6, 2)]

    surviving = surviving_steps(records)

    assert [(step, record["incarnation"]) for step, record in surviving.items()] == [
        *((step, 1) for step in range(1, 6)),
        (6, 2),
    ]


def test_a_disturbed_run_with_the_same_losses_is_equal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write_run(tmp_path / "a", [(1, range(1, 11))])
    b = write_run(tmp_path / "b", [(1, range(1, 8)), (2, range(6, 9)), (3, range(3, 11))])

    assert main([str(a), str(b)]) == 0
    assert capsys.readouterr().out.startswith("losses equal: 10 of 10 steps bit-equal")


def test_one_different_bit_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write_run(tmp_path / "a", [(1, range(1, 11))])
    b = write_run(tmp_path / "b", [(1, range(1, 11))], last_loss=0.1 + 2**-56)

    assert main([str(a), str(b)]) == 1
    captured = capsys.readouterr()
    assert captured.out.startswith("losses different: 9 of 10 steps bit-equal")
    assert "step 10: loss 0.1 in" in captured.err


def test_a_missing_step_is_found(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", [(1, range(1, 11))])
    b = write_run(tmp_path / "b", [(1, range(1, 10))])

    comparison = compare(read_lineage(a), read_lineage(b))

    assert comparison.differences == (f"step 10: not in {b}",)


def rewrite(path: Path, change: dict[int, dict[str, Any]]) -> None:
    records = read_records(path)
    for record in records:
        if record["event"] == "step" and record["step"] in change:
            record["samples"] |= change[record["step"]]
    path.write_text("".join(json.dumps(record) + os.linesep for record in records))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({4: {"first": 13}}, "step 4: samples from 13, expected 12"),
        ({4: {"rank_ids": [[0, 0]]}}, "step 4: the ranks did not consume the samples of the step once each"),
    ],
)
def test_left_out_or_repeated_samples_are_found(tmp_path: Path, change: dict[int, Any], named: str) -> None:
    a = write_run(tmp_path / "a", [(1, range(1, 11))])
    b = write_run(tmp_path / "b", [(1, range(1, 11))])
    rewrite(log_path(b, 0), change)

    comparison = compare(read_lineage(a), read_lineage(b))

    assert not comparison.is_equal
    assert any(named in difference for difference in comparison.differences)


def test_a_folder_without_logs_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), str(tmp_path)]) == 2
    assert "no rank*.jsonl in the log folder" in capsys.readouterr().err
