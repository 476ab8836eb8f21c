"""Every way a command line can end, by its documented code."""

from __future__ import annotations

import ctypes
import json
import resource
import signal
import subprocess
from pathlib import Path

import pytest

from moc.cli.exits import EXIT_HELP
from moc.format.canonical import open_record, seal_record
from moc.store.local import LocalStore
from tests.cli.console import MOC, clean_env, flip_bit, manifest_path, moc, shard_place
from tests.support.repository import RepositoryBuilder

CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, PR_CAPBSET_DROP = 1, 2, 24


def test_success_is_zero(history: Path) -> None:
    for arguments in (("ls",), ("show", "20"), ("verify", "--read-data"), ("verify", "30", "--read-data=5%")):
        result = moc(*arguments, "-r", history)

        assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("list",),
        ("ls", "--bogus"),
        ("ls", "extra"),
        ("verify", "--read-data=0%"),
        ("verify", "--read-data=lots"),
        ("restore", "--format", "zip"),
        ("rewind",),
        ("run",),
        ("run", "--max-restarts", "-1", "--", "true"),
        ("agent",),
        ("agent", "start"),
    ],
)
def test_a_wrong_command_line_is_two(arguments: tuple[str, ...], history: Path) -> None:
    result = moc(*arguments, env={"MOC_STORAGE": str(history)})

    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr


@pytest.mark.parametrize("arguments", [("restore", "20"), ("status", "-r", "x"), ("ls", "--newest")])
def test_what_a_verb_does_not_know_is_said_with_its_own_usage(arguments: tuple[str, ...]) -> None:
    result = moc(*arguments)

    assert result.returncode == 2
    assert result.stderr.startswith(f"usage: moc {arguments[0]} [-h]")
    assert f"unrecognized arguments: {' '.join(arguments[1:])}" in result.stderr


def test_a_step_that_is_not_a_step_is_two(history: Path) -> None:
    result = moc("show", "newest", "-r", history)

    assert result.returncode == 2
    assert "STEP-ATTEMPT" in result.stderr


@pytest.mark.parametrize(
    "verb", [("show", "21"), ("verify", "21"), ("restore", "--step", "21"), ("rewind", "--step", "21")]
)
def test_an_unknown_step_is_three_and_names_the_others(verb: tuple[str, ...], history: Path, tmp_path: Path) -> None:
    result = moc(*verb, "-r", history, cwd=tmp_path)

    assert result.returncode == 3
    assert "available=10,20,30" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "verb", [("ls",), ("show", "1"), ("verify",), ("restore",), ("rewind", "--step", "1"), ("gc",)]
)
def test_a_folder_without_repository_is_three(verb: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not a repository")
    for url in (tmp_path, tmp_path / "missing"):
        result = moc(*verb, "-r", url)

        assert result.returncode == 3, result.stderr
        assert str(url) in result.stderr

    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_rewinding_to_an_abandoned_future_is_three(history: Path) -> None:
    result = moc("rewind", "--step", "40", "-r", history)

    assert result.returncode == 3
    assert "available=10,20,30" in result.stderr


def test_a_flipped_bit_in_data_is_four_and_names_key_and_shard(damaged: Path) -> None:
    path, shard, offset = shard_place(damaged, 2, 40, rank=1, piece="e00", index=3)
    flip_bit(path, offset + 5)

    whole = moc("verify", "--read-data", "-r", damaged)
    single = moc("verify", "40", "--read-data=100%", "-r", damaged)
    unread = moc("verify", "-r", damaged)
    other = moc("verify", "20", "--read-data", "-r", damaged)

    for result in (whole, single):
        assert result.returncode == 4
        assert str(path.relative_to(damaged)) in result.stdout
        assert shard in result.stdout
        assert "expected=" in result.stdout
        assert "actual=" in result.stdout
    assert (unread.returncode, other.returncode) == (0, 0)


@pytest.mark.parametrize("kind", ["header", "manifest", "record", "state"])
def test_a_flipped_bit_elsewhere_is_four_without_reading_data(kind: str, damaged: Path) -> None:
    path, _, offset = shard_place(damaged, 2, 40, rank=0, piece="d", index=-1)
    match kind:
        case "header":
            flip_bit(path, 700)
        case "state":
            flip_bit(path, offset + 4096)
        case "manifest":
            path = manifest_path(damaged, 2, 40)
            flip_bit(path, path.stat().st_size // 2)
        case "record":
            path = damaged / "incarnations" / "000002-run-7.json"
            flip_bit(path, 40)

    result = moc("verify", "-r", damaged)

    assert result.returncode == 4
    assert str(path.relative_to(damaged)) in result.stdout


def test_a_missing_or_short_object_is_four(damaged: Path) -> None:
    path, _, _ = shard_place(damaged, 2, 40, rank=0, piece="d", index=0)
    other, _, _ = shard_place(damaged, 1, 20, rank=1, piece="e00", index=0)
    path.unlink()
    other.write_bytes(other.read_bytes()[:-4096])

    result = moc("verify", "-r", damaged)

    assert result.returncode == 4
    assert str(path.relative_to(damaged)) in result.stdout
    assert str(other.relative_to(damaged)) in result.stdout


def test_showing_a_corrupt_manifest_is_four(damaged: Path) -> None:
    flip_bit(manifest_path(damaged, 1, 20), 100)

    result = moc("show", "20", "-r", damaged)

    assert result.returncode == 4


def test_restoring_a_corrupt_step_is_four_and_leaves_nothing(damaged: Path, tmp_path: Path) -> None:
    path, _, offset = shard_place(damaged, 1, 20, rank=1, piece="e00", index=3)
    flip_bit(path, offset)

    result = moc("restore", "--step", "20", "-r", damaged, "--to", tmp_path / "out")

    assert result.returncode == 4
    assert not list((tmp_path / "out").rglob("*.*"))


def test_a_hostile_manifest_cannot_name_other_paths(damaged: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim.safetensors"
    victim.write_bytes(bytes(4096))
    path = manifest_path(damaged, 2, 30)
    body = dict(open_record(path.read_bytes(), name="manifest").body)
    for key in ("../victim.safetensors", str(victim), f"objects/../../{victim.name}", "FORMAT", "objects/\0"):
        body |= {"version": 1, "objects": [{"key": key, "size": 8192, "header": 4096, "header_crc32c": 0}]}
        path.write_bytes(seal_record(body))

        verified = moc("verify", "30", "-r", damaged)
        restored = moc("restore", "--step", "30", "-r", damaged, "--to", tmp_path / "out")

        assert verified.returncode == 4, verified.stderr
        assert restored.returncode == 4, restored.stderr
    assert victim.read_bytes() == bytes(4096)


def test_hostile_names_in_a_manifest_are_four(damaged: Path) -> None:
    path = manifest_path(damaged, 2, 30)
    body = dict(open_record(path.read_bytes(), name="manifest").body)
    path.write_bytes(seal_record({**body, "run": "../.."}))

    result = moc("verify", "-r", damaged)

    assert result.returncode == 4
    assert str(path.relative_to(damaged)) in result.stdout


def test_a_folder_without_rights_is_five(damaged: Path) -> None:
    (damaged / "manifests").chmod(0)
    try:
        result = moc("ls", "-r", damaged, before_exec=give_up_root_rights)
    finally:
        (damaged / "manifests").chmod(0o755)

    assert result.returncode == 5, result.stderr
    assert "EACCES" in result.stderr


def test_a_link_inside_the_repository_is_five(damaged: Path) -> None:
    path, _, _ = shard_place(damaged, 2, 40, rank=0, piece="d", index=0)
    kept = path.rename(damaged / "elsewhere")
    path.symlink_to(kept)

    result = moc("verify", "40", "-r", damaged)

    assert result.returncode == 5
    assert "symbolic link" in result.stderr


def test_a_full_target_is_five_and_leaves_nothing(history: Path, tmp_path: Path) -> None:
    def limit_files() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, 64 * 1024))

    result = moc("restore", "-r", history, "--to", tmp_path / "out", before_exec=limit_files)

    assert result.returncode == 5, result.stderr
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_another_format_version_is_six(damaged: Path) -> None:
    (damaged / "FORMAT").write_text("moc repository 2\n")
    for verb in (("ls",), ("show", "10"), ("verify",), ("restore",), ("rewind", "--step", "10")):
        result = moc(*verb, "-r", damaged)

        assert result.returncode == 6
        assert "allowed=1" in result.stderr


def test_an_unknown_feature_is_six(damaged: Path) -> None:
    (damaged / "FORMAT").write_text("moc repository 1\nrequires holograms\n")

    assert moc("ls", "-r", damaged).returncode == 6


def test_an_interrupt_is_130(tmp_path: Path) -> None:
    long_enough_to_fill_a_pipe = {"seed": "7" * 200_000}
    builder = RepositoryBuilder(LocalStore(tmp_path), fingerprint=long_enough_to_fill_a_pipe)
    builder.begin(1)
    builder.commit(1, 10)
    # A shell starts what it puts into the background with SIGINT ignored, and children inherit that.
    heeding = ["env", "--default-signal=INT", MOC, "show", "--json", "-r", str(tmp_path)]
    with subprocess.Popen(heeding, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=clean_env()) as process:
        assert process.stdout is not None
        assert process.stdout.read(1) == b"{"
        process.send_signal(signal.SIGINT)

        assert process.wait(30) == 130


def test_a_reader_that_leaves_is_no_error(history: Path) -> None:
    piped = f"set -o pipefail; '{MOC}' ls -r '{history}' | true; echo ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", piped], capture_output=True, env=clean_env(), timeout=30, check=False)

    assert result.stdout == b"0\n"
    assert result.stderr == b""


def test_errors_are_json_too(tmp_path: Path) -> None:
    result = moc("ls", "--json", "-r", tmp_path)

    error = json.loads(result.stdout)["error"]
    assert error["kind"] == "NoCheckpointError"
    assert error["exit_code"] == result.returncode == 3
    assert str(tmp_path) in error["message"]


def test_help_names_the_exit_codes() -> None:
    result = moc("--help")

    assert result.returncode == 0
    assert EXIT_HELP in result.stdout
    for verb in ("ls", "show", "verify", "restore", "rewind", "gc", "diff", "trace", "status", "agent", "run"):
        text = moc(verb, "--help")
        assert text.returncode == 0
        assert "Exit codes:" in text.stdout
        assert max(map(len, text.stdout.splitlines())) <= 80, verb


def test_the_repository_comes_from_option_environment_or_folder(history: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").symlink_to(history)

    by_option = moc("show", "20", "-r", history, env={"MOC_STORAGE": "/nowhere"}, cwd=tmp_path)
    by_variable = moc("show", "20", env={"MOC_STORAGE": str(history)})
    by_folder = moc("show", "20", cwd=tmp_path)

    for result in (by_option, by_variable, by_folder):
        assert "000001-run-7/000000000020" in result.stdout


def give_up_root_rights() -> None:
    """Drop what lets root read everything, for the program that is executed next."""
    libc = ctypes.CDLL(None)
    for capability in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH):
        libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
