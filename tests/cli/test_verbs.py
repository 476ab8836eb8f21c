"""What each verb prints and does: the JSON that scripts rely on, and the text that people read."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import subprocess
from pathlib import Path

from moc.format.manifest import Parent
from moc.repository import Repository
from moc.store.local import LocalStore
from tests.cli.console import MOC, clean_env, flip_bit, manifest_path, moc, moc_json, shard_place
from tests.support.repository import Model, RepositoryBuilder

NAME = {"name", "run", "incarnation", "step", "attempt"}


def test_ls_marks_the_newest_the_lineage_and_abandoned_futures(history: Path) -> None:
    listing = moc_json("ls", "-r", history)

    assert set(listing) == {"repository", "lineage", "checkpoints", "findings"}
    assert [(link["incarnation"], link["last_step"]) for link in listing["lineage"]] == [(3, None), (2, 30), (1, 20)]
    rows = [(c["incarnation"], c["step"], c["is_on_lineage"], c["is_newest"]) for c in listing["checkpoints"]]
    assert rows == [
        (1, 10, True, False),
        (1, 20, True, False),
        (1, 30, False, False),
        (2, 30, True, True),
        (2, 40, False, False),
    ]
    for row in listing["checkpoints"]:
        extra = {
            "size_bytes",
            "written_bytes",
            "objects",
            "stale_experts",
            "modified_s",
            "is_on_lineage",
            "is_newest",
            "is_finite",
            "error",
        }
        assert set(row) == NAME | extra
        assert (row["size_bytes"] > 0, row["objects"], row["is_finite"], row["error"]) == (True, 4, True, None)


def test_ls_fits_80_columns_and_says_what_is_wrong_on_stderr(damaged: Path) -> None:
    flip_bit(manifest_path(damaged, 2, 30), 100)
    RepositoryBuilder(LocalStore(damaged)).commit(3, 35, is_finite=False)

    result = moc("ls", "-r", damaged)
    listing = moc_json("ls", "-r", damaged)

    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == ["STEP", "INCARNATION", "ATTEMPT", "SIZE", "AGE", "IS"]
    assert lines[4].split()[0] == "30"
    assert lines[4].endswith("lineage corrupt")
    assert lines[6].endswith("newest not-finite")
    assert "manifests/000002-run-7/000000000030" in result.stderr
    corrupt = listing["checkpoints"][3]
    assert (corrupt["size_bytes"], corrupt["objects"], corrupt["is_finite"]) == (None, None, None)
    assert "manifests/000002-run-7/000000000030" in corrupt["error"]


def test_an_empty_repository_is_listed_as_such(tmp_path: Path) -> None:
    RepositoryBuilder(LocalStore(tmp_path))

    result = moc("ls", "-r", tmp_path)

    assert (result.returncode, result.stdout) == (0, "")
    assert "no checkpoints yet" in result.stderr
    assert moc_json("ls", "-r", tmp_path)["checkpoints"] == []
    assert moc("verify", "-r", tmp_path).returncode == 0
    assert moc("restore", "-r", tmp_path).returncode == 3


def test_show_tells_everything_in_the_manifest(history: Path) -> None:
    shown = moc_json("show", "30", "-r", history)

    assert set(shown) == NAME | {
        "repository",
        "parent",
        "is_on_lineage",
        "is_finite",
        "modified_s",
        "size_bytes",
        "tensors",
        "catalog_digest",
        "topology",
        "fingerprint",
        "versions",
        "plt",
        "stale_experts",
        "written_bytes",
        "experts",
        "staleness",
        "lives",
        "objects",
    }
    assert (shown["incarnation"], shown["step"], shown["is_on_lineage"]) == (2, 30, True)
    assert shown["topology"]["world_size"] == 2
    assert [(life["number"], life["reason"], life["last_step"]) for life in shown["lives"]] == [
        (2, "recover", None),
        (1, "start", 20),
    ]
    assert [(row["rank"], row["piece"]) for row in shown["objects"]] == [(0, "d"), (0, "e00"), (1, "d"), (1, "e00")]
    assert sum(row["size_bytes"] for row in shown["objects"]) == shown["size_bytes"]


def test_show_takes_steps_attempts_and_names(history: Path) -> None:
    other = next(c for c in moc_json("ls", "-r", history)["checkpoints"] if (c["incarnation"], c["step"]) == (1, 30))

    by_attempt = moc_json("show", f"30-{other['attempt']}", "-r", history)
    by_name = moc_json("show", other["name"], "-r", history)
    newest = moc_json("show", "-r", history)
    text = moc("show", "30", "--objects", "-r", history)

    assert by_attempt["name"] == by_name["name"] == other["name"]
    assert newest["name"] == moc_json("show", "30", "-r", history)["name"] != other["name"]
    assert "all of step 30" in text.stdout
    assert "r00001-e00.safetensors" in text.stdout


def test_verify_reports_each_checkpoint(damaged: Path) -> None:
    path, shard, offset = shard_place(damaged, 1, 20, rank=0, piece="e00", index=2)
    flip_bit(path, offset)
    (damaged / "objects" / "stray.txt").write_text("x")

    report = moc_json("verify", "--read-data", "-r", damaged, code=4)

    fields = {"repository", "is_sound", "read_data_fraction", "seed", "seconds", "checkpoints", "findings", "notes"}
    assert set(report) == fields
    assert (report["is_sound"], report["read_data_fraction"], report["findings"]) == (False, 1.0, [])
    for row in report["checkpoints"]:
        assert set(row) == NAME | {"is_sound", "objects", "shards_read", "bytes_read", "findings"}
        assert (row["objects"], row["shards_read"]) == (4, 36)
    (finding,) = next(c for c in report["checkpoints"] if not c["is_sound"])["findings"]
    assert finding["key"] == str(path.relative_to(damaged))
    assert finding["kind"] == "ShardCorruptError"
    assert shard in finding["message"]
    assert report["notes"] == ["unknown file: key=objects/stray.txt size_bytes=1"]


def test_a_part_of_the_data_is_always_the_same_part(history: Path) -> None:
    first = moc_json("verify", "--read-data=30%", "-r", history)
    second = moc_json("verify", "--read-data=30%", "-r", history)
    other = moc_json("verify", "--read-data=30%", "--seed", "1", "-r", history)

    assert first["checkpoints"] == second["checkpoints"] != other["checkpoints"]
    assert (first["seed"], other["seed"]) == (0, 1)
    assert 0 < sum(c["shards_read"] for c in first["checkpoints"]) < 5 * 36


def test_reading_data_tells_the_rate_and_the_sample(history: Path) -> None:
    whole = moc("verify", "--read-data", "-r", history)
    part = moc("verify", "--read-data=30%", "--seed", "7", "-r", history)

    assert re.search(r"moc verify: read \S+ \S+ in [\d.]+ s, \S+ [KMG]iB/s\n", whole.stderr), whole.stderr
    assert "30 % of the shards, seed 7" in part.stderr


def test_a_bar_is_shown_to_who_looks_at_stderr(history: Path) -> None:
    master, slave = pty.openpty()
    with subprocess.Popen(
        [MOC, "verify", "--read-data", "-r", str(history)], stdout=subprocess.PIPE, stderr=slave, env=clean_env()
    ) as process:
        os.close(slave)
        shown = b""
        with contextlib.suppress(OSError):  # EIO: nobody has the other end open any more
            while chunk := os.read(master, 4096):
                shown += chunk
        os.close(master)
        assert process.stdout is not None
        assert process.stdout.read().count(b"ok;") == 5

    assert process.returncode == 0
    assert b"\x1b[" in shown
    assert b"verify" in shown


def test_restore_takes_the_newest_on_the_lineage(history: Path, tmp_path: Path) -> None:
    result = moc("restore", "-r", history, cwd=tmp_path)
    report = moc_json("restore", "-r", history, cwd=tmp_path)

    assert result.returncode == 0
    assert "MoE layer 0  all 4 experts of step 30" in result.stdout
    assert set(report) == NAME | {
        "repository",
        "format",
        "target",
        "size_bytes",
        "files",
        "experts",
        "staleness",
        "plt",
        "rejected",
    }
    assert (report["incarnation"], report["step"], report["target"]) == (2, 30, str(tmp_path / "restored" / "30"))
    assert report["experts"] == [{"layer": layer, "steps": [30] * 4} for layer in (0, 1)]
    assert (report["plt"], report["rejected"], report["format"]) == (None, [], "moc")
    assert moc("verify", "--read-data", "-r", report["target"]).returncode == 0


def test_restore_falls_back_past_corrupt_checkpoints_and_says_so(damaged: Path, tmp_path: Path) -> None:
    path, shard, offset = shard_place(damaged, 2, 30, rank=1, piece="d", index=1)
    flip_bit(path, offset)
    flip_bit(manifest_path(damaged, 1, 20), 77)

    result = moc("restore", "-r", damaged, cwd=tmp_path)
    report = moc_json("restore", "-r", damaged, "--to", tmp_path / "again")

    assert result.returncode == 0
    assert shard in result.stderr
    assert "step 10" in result.stdout
    assert [row["kind"] for row in report["rejected"]] == ["ShardCorruptError", "ManifestCorruptError"]
    assert report["step"] == 10
    assert moc("verify", "--read-data", "-r", tmp_path / "again").returncode == 0


def test_restore_without_any_sound_checkpoint_is_an_integrity_problem(damaged: Path, tmp_path: Path) -> None:
    for incarnation, step in ((1, 10), (1, 20), (2, 30)):
        flip_bit(manifest_path(damaged, incarnation, step), 77)

    result = moc("restore", "-r", damaged, cwd=tmp_path)

    assert result.returncode == 4
    assert "tried=3" in result.stderr


def test_restore_leaves_folders_with_other_files_alone(history: Path, tmp_path: Path) -> None:
    (tmp_path / "my thesis.tex").write_text("chapter 1")

    result = moc("restore", "-r", history, "--to", tmp_path)

    assert result.returncode == 2
    assert "my thesis.tex" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["my thesis.tex"]


def test_restore_does_not_mix_checkpoints(history: Path, tmp_path: Path) -> None:
    assert moc("restore", "--step", "10", "-r", history, "--to", tmp_path / "out").returncode == 0

    result = moc("restore", "--step", "20", "-r", history, "--to", tmp_path / "out")

    assert result.returncode == 2
    assert moc_json("ls", "-r", tmp_path / "out")["checkpoints"][0]["step"] == 10


def test_a_restored_repository_resumes_from_its_step(history: Path, tmp_path: Path) -> None:
    moc("restore", "--step", "20", "-r", history, "--to", tmp_path / "out")
    copy = Repository(LocalStore(tmp_path / "out"))

    (record,), _ = copy.incarnations()

    assert (record.run, record.number, record.parent, record.reason) == ("run-7", 1, None, "start")
    assert moc_json("show", "-r", tmp_path / "out")["step"] == 20


def test_rewind_starts_a_life_at_an_earlier_step(damaged: Path) -> None:
    report = moc_json("rewind", "--step", "20", "-r", damaged)
    again = moc_json("rewind", "--step", "20", "-r", damaged)
    text = moc("rewind", "--step", "20", "-r", damaged)

    assert set(report) == NAME | {"repository", "new_incarnation", "is_written"}
    assert (report["step"], report["new_incarnation"], report["is_written"]) == (20, 4, True)
    assert (again["new_incarnation"], again["is_written"]) == (4, False)
    assert text.stdout.startswith("already rewound to step 20")
    newest = next(c for c in moc_json("ls", "-r", damaged)["checkpoints"] if c["is_newest"])
    assert (newest["incarnation"], newest["step"]) == (1, 20)
    records, findings = Repository(LocalStore(damaged)).incarnations()
    assert findings == ()
    assert records[-1].parent == Parent(incarnation=1, step=20, attempt=report["attempt"])
    assert records[-1].reason == "rewind"


def test_a_rewind_is_undone_by_naming_the_attempt(damaged: Path) -> None:
    before = next(c for c in moc_json("ls", "-r", damaged)["checkpoints"] if c["is_newest"])
    moc("rewind", "--step", "10", "-r", damaged)

    result = moc("rewind", "--step", f"{before['step']}-{before['attempt']}", "-r", damaged)

    assert result.returncode == 0
    after = next(c for c in moc_json("ls", "-r", damaged)["checkpoints"] if c["is_newest"])
    assert after["name"] == before["name"]


def test_rewind_to_a_broken_checkpoint_is_refused(damaged: Path) -> None:
    path, _, _ = shard_place(damaged, 1, 20, rank=0, piece="d", index=0)
    path.unlink()

    result = moc("rewind", "--step", "20", "-r", damaged)

    assert result.returncode == 4
    assert len(list((damaged / "incarnations").iterdir())) == 3


def test_a_dense_model_has_no_experts_to_report(tmp_path: Path) -> None:
    builder = RepositoryBuilder(LocalStore(tmp_path / "dense"), model=Model(world_size=3, moe_layers=0))
    builder.begin(1)
    builder.commit(1, 5)

    report = moc_json("restore", "-r", tmp_path / "dense", cwd=tmp_path)

    assert report["experts"] == []
    assert moc("verify", "--read-data", "-r", report["target"]).returncode == 0
    assert moc("show", "5", "-r", tmp_path / "dense").returncode == 0
