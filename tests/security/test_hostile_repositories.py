"""A repository from somebody else can be looked at: no code runs, no path leads out, time and memory are bounded."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from moc.errors import IntegrityError, ManifestCorruptError, MocError
from moc.format.canonical import seal_record
from moc.format.keys import FORMAT_KEY, object_key, victims_key
from moc.repository import Repository
from moc.store.local import LocalStore
from tests.cli.console import moc
from tests.security.hostile import CASES, ESCAPES, OLD_ROW, Hostile
from tests.support.other_user import needs_root
from tests.support.repository import Model

LIMITED = Path(__file__).with_name("limited.py")
ADDRESS_SPACE_BYTES = 3 << 29  # 1.5 GiB, of which the interpreter with its threads reserves a third
GROWN_BYTES = 1 << 30
SECONDS = 20.0
CODES = {0, 1, 2, 3, 4, 5}
LARGE = {case for case in CASES if "million" in case}
Limited = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def limited() -> Iterator[Limited]:
    """Runs command lines of moc in one process with little memory."""
    with subprocess.Popen(
        [sys.executable, LIMITED, str(ADDRESS_SPACE_BYTES)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def run(*arguments: object) -> dict[str, Any]:
            process.stdin.write(json.dumps([str(argument) for argument in arguments]) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
            assert line, f"the process ended: {arguments}"
            return {"arguments": arguments, **json.loads(line)}

        yield run
        process.stdin.close()


@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.slow] * (c in LARGE)) for c in CASES])
def test_every_verb_ends_soon_with_little_memory_and_a_plain_answer(
    tmp_path: Path, limited: Limited, case: str
) -> None:
    root = tmp_path / "hostile"
    CASES[case](Hostile(root))
    verbs = [["ls"], ["show", "10"], ["show", "10", "--json"], ["verify"], ["restore", "--to", tmp_path / "copy"]]
    if "state" in case or "plt" in case:
        verbs.append(["restore", "--to", tmp_path / "weights", "--format", "safetensors"])

    for answer in [limited(*verb, "-r", root) for verb in verbs]:
        assert answer["code"] in CODES, answer
        assert answer["seconds"] < SECONDS, answer
        assert answer["grown_bytes"] < GROWN_BYTES, answer
        for letter in answer["stdout"] + answer["stderr"]:
            assert letter.isprintable() or letter == "\n", (repr(letter), answer)
    assert {path.name for path in tmp_path.iterdir()} <= {"hostile", "copy", "weights"}


def test_what_a_terminal_would_obey_is_shown_and_not_sent(tmp_path: Path) -> None:
    model = Model(world_size=1, moe_layers=0, dense=((f"w{ESCAPES}", (8, 8)),))
    repository = Hostile(tmp_path, model=model, fingerprint={f"a{ESCAPES}": ESCAPES})
    key = object_key(repository.name, 0, "d")
    content = bytearray((tmp_path / key).read_bytes())
    content[repository.manifest.objects[0].header_bytes] ^= 1
    (tmp_path / key).write_bytes(content)

    shown = moc("show", "-r", tmp_path)
    found = moc("verify", "--read-data", "-r", tmp_path)

    for result in (shown, found):
        assert all(letter.isprintable() or letter == "\n" for letter in result.stdout + result.stderr), result
    assert "\\x1b]8;;http://x" in shown.stdout, "what was there can be seen"
    assert "w\\x1b[2J" in found.stdout


# Paths


@pytest.mark.parametrize(
    "key",
    [
        "../../outside",
        "/etc/passwd",
        "objects/../../outside",
        "objects/000001-run-7/000000000010-0123abcd/../../../../r00000-d.safetensors",
        "objects/000001-run-7/000000000010-0123abcd/r00000-d.safetensors\n",
        "objects/000001-run-7/000000000010-0123abcd/r00000-d.safetensors\0",
        "FORMAT",
        "manifests/000001-run-7/000000000010-0123abcd.json",
    ],
)
def test_a_manifest_or_victim_list_names_objects_and_nothing_else(tmp_path: Path, key: str) -> None:
    hostile = Hostile(tmp_path / "repository")
    (tmp_path / "outside").write_text("precious")
    (tmp_path / "repository" / "victims").mkdir()
    (tmp_path / "repository" / victims_key("run-7", 1)).write_bytes(seal_record({"victims": [key]}))
    hostile.rewrite(version=1, objects=[OLD_ROW | {"key": key}])
    repository = Repository(LocalStore(tmp_path / "repository"))

    with pytest.raises(ManifestCorruptError, match="not an object key"):
        repository.read_manifest(hostile.name)
    with pytest.raises(ManifestCorruptError, match="not an object key"):
        repository.read_victims("run-7", 1)
    assert (tmp_path / "outside").read_text() == "precious"


@pytest.mark.parametrize("form", ["moc", "safetensors"])
def test_names_of_tensors_are_no_paths(tmp_path: Path, limited: Limited, form: str) -> None:
    names = ("../../outside", "/etc/cron.d/x", "a/../../b", "con\\..\\x")
    Hostile(tmp_path / "repository", model=Model(world_size=1, moe_layers=0, dense=tuple((n, (8,)) for n in names)))
    before = sorted(os.listdir("/etc"))

    answer = limited("restore", "--format", form, "-r", tmp_path / "repository", "--to", tmp_path / "out" / "copy")

    assert answer["code"] == 0, answer
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "repository"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["copy"]
    assert sorted(os.listdir("/etc")) == before
    outside = [p for p in (tmp_path / "out").rglob("*") if not p.resolve().is_relative_to(tmp_path / "out" / "copy")]
    assert outside in ([], [tmp_path / "out" / "copy"])


def _replace(path: Path, kind: str, target: Path) -> None:
    if path.is_dir():
        path.rename(target)
    else:
        target.write_bytes(path.read_bytes())
        path.unlink()
    match kind:
        case "link":
            path.symlink_to(target)
        case "fifo":
            os.mkfifo(path)
        case _:
            with socket.socket(socket.AF_UNIX) as listener:
                os.chdir(path.parent)  # the path itself may be too long for a socket
                listener.bind(path.name)


@pytest.mark.parametrize("kind", ["link", "fifo", "socket"])
@pytest.mark.parametrize("where", ["FORMAT", "manifests", "manifest", "objects", "object", "incarnation"])
def test_links_and_special_files_in_a_repository_are_refused(
    tmp_path: Path, limited: Limited, monkeypatch: pytest.MonkeyPatch, kind: str, where: str
) -> None:
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "repository"
    hostile = Hostile(root)
    places = {
        "FORMAT": root / FORMAT_KEY,
        "manifest": hostile.manifest_path,
        "object": root / object_key(hostile.name, 0, "d"),
        "incarnation": next((root / "incarnations").iterdir()),
    }
    _replace(places.get(where, root / where), kind, tmp_path / "outside")

    for verb in (["verify"], ["restore", "--to", tmp_path / "copy"], ["ls"]):
        answer = limited(*verb, "-r", root)
        assert answer["code"] in CODES, answer
        assert answer["code"] != 0 or verb == ["ls"], answer
        assert answer["seconds"] < SECONDS, answer
    assert not (tmp_path / "copy").exists()


def test_the_root_itself_may_be_a_link_because_the_user_named_it(tmp_path: Path) -> None:
    Hostile(tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")

    assert moc("verify", "-r", tmp_path / "link").returncode == 0


def test_an_object_that_becomes_a_link_between_look_and_open_is_not_followed(tmp_path: Path) -> None:
    """The last part of a path is opened without following links, so that the look before decides nothing."""
    from moc.store.filesystem import PosixFilesystem

    (tmp_path / "outside").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "outside")
    files = PosixFilesystem()

    for act in (files.open_read, files.create, files.open_direct):
        with pytest.raises(OSError, match=r"symbolic links|File exists"):
            act(str(tmp_path / "link"))
    assert (tmp_path / "outside").read_text() == "precious"


@needs_root
def test_a_repository_is_read_without_writing_to_it(tmp_path: Path) -> None:
    hostile = Hostile(tmp_path / "repository")
    before = {path: path.lstat().st_mtime_ns for path in (tmp_path / "repository").rglob("*")}

    for verb in (["ls"], ["show"], ["verify", "--read-data"], ["restore", "--to", tmp_path / "copy"]):
        assert moc(*verb, "-r", tmp_path / "repository").returncode == 0

    assert {path: path.lstat().st_mtime_ns for path in (tmp_path / "repository").rglob("*")} == before
    assert hostile.manifest_path in before


def test_errors_about_hostile_values_stay_short(tmp_path: Path) -> None:
    hostile = Hostile(tmp_path)
    hostile.rewrite(tensors="9" * 1_000_000, objects=[])

    with pytest.raises(IntegrityError) as caught:
        Repository(LocalStore(tmp_path)).read_manifest(hostile.name)

    assert isinstance(caught.value, MocError)
    assert len(str(caught.value)) < 1000
