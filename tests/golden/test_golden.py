"""The format stays what it is: golden repositories of every version of manifests are read to equal values, and those of
the present one written again to equal bytes.
"""

from __future__ import annotations

import ast
import hashlib
import json
import subprocess
import sys
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moc.cli.choose import read_catalogue
from moc.format.contents import live_shards
from moc.format.keys import CheckpointName
from moc.format.relative import whole_state
from moc.repository import Repository
from moc.state import DTYPE_BYTES
from moc.store.local import LocalStore
from moc.store.memory import MemoryStore
from moc.verify import verify_repository
from tests.golden import reader
from tests.golden.describe import describe
from tests.golden.scenarios import SCENARIOS, expected
from tests.golden.write import FOLDERS, PRESENT

ROOT = Path(__file__).resolve().parents[2]
names = pytest.mark.parametrize("name", SCENARIOS)
roots = pytest.mark.parametrize(
    "root",
    sorted(path for folder in FOLDERS for path in folder.iterdir() if path.is_dir()),
    ids=lambda root: f"{root.parent.name}-{root.name}",
)


def _expected(root: Path) -> Any:
    return json.loads(root.with_suffix(".json").read_text(encoding="utf-8"))


def _repository(root: Path) -> Repository:
    return Repository(LocalStore(root))


@roots
def test_todays_reader_reads_equal_bytes(root: Path) -> None:
    repository = _repository(root)

    found = {str(c.name): _contents(repository, c.name) for c in repository.checkpoints()}

    assert found == _expected(root)["checkpoints"]


@roots
def test_todays_lineage_is_the_same(root: Path) -> None:
    catalogue = read_catalogue(_repository(root))

    assert [str(stored.name) for stored in catalogue.lineage] == _expected(root)["lineage"]


@roots
def test_golden_repositories_are_sound(root: Path) -> None:
    report = verify_repository(_repository(root), read_data_fraction=1.0)

    assert report.all_findings == ()


@names
def test_todays_writer_writes_equal_bytes(name: str) -> None:
    store = MemoryStore()

    golden = SCENARIOS[name](store)

    assert json.loads(json.dumps(expected(golden))) == _expected(PRESENT / name)
    written = {entry.key: store.read(entry.key, limit_bytes=1 << 20) for entry in store.list("")}
    root = PRESENT / name
    stored = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    assert written.keys() == stored.keys()
    for key, content in stored.items():
        assert written[key] == content, f"the writer has changed: key={key}"


@roots
def test_a_reader_made_from_the_document_alone_finds_the_same(root: Path) -> None:
    checkpoints = reader.read_repository(root)

    wanted = _expected(root)
    assert reader.lineage(root) == wanted["lineage"]
    assert {key: _plain(contents) for key, contents in checkpoints.items()} == wanted["checkpoints"]


def test_that_reader_knows_nothing_of_moc() -> None:
    imported = {
        (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name) or ""
        for node in ast.walk(ast.parse(Path(reader.__file__).read_text(encoding="utf-8")))
        if isinstance(node, ast.Import | ast.ImportFrom)
    }

    allowed = {"__future__", "base64", "dataclasses", "json", "pathlib", "safetensors", "struct", "typing"}
    assert imported == allowed
    assert reader.crc32c(b"123456789") == 0xE3069283  # the check value of CRC-32C


@pytest.mark.parametrize("name", ["two-ranks", "partial"])
def test_the_example_in_the_document_reads_a_golden_repository(name: str) -> None:
    text = (ROOT / "docs" / "format.md").read_text(encoding="utf-8")
    script = text.rpartition("```python\n")[2].partition("```")[0]

    done = subprocess.run([sys.executable, "-c", script, PRESENT / name], capture_output=True, text=True, check=True)

    lines = done.stdout.splitlines()
    tensors = max(reader.read_repository(PRESENT / name).items())[1].tensors
    assert len(lines) == len(tensors)
    for line, (key, (_, shape, data)) in zip(lines, sorted(tensors.items()), strict=True):
        mean = float(np.abs(np.frombuffer(data, "<f4")).mean())
        assert line == " ".join([*key.split("/"), str(shape), str(mean)])


def _contents(repository: Repository, name: CheckpointName) -> dict[str, object]:
    """Return a checkpoint's contents as the expected file has them, by moc's own reader."""
    manifest = repository.read_manifest(name)
    tensors: dict[str, tuple[str, list[int], bytearray]] = {}
    blobs: dict[int, bytes] = {}
    for row in manifest.objects:
        header = repository.read_header(row)
        for stored in live_shards(manifest, row, header):
            shard, width = stored.shard, DTYPE_BYTES[stored.shard.dtype]
            empty = (shard.dtype, list(shard.shape), bytearray(prod(shard.shape) * width))
            _, _, whole = tensors.setdefault(f"{shard.part}/{shard.tensor}", empty)
            first = shard.offset * width
            repository.read_range(row, stored.position, memoryview(whole)[first : first + shard.size_bytes])
        if header.state is not None:
            blobs[header.rank] = repository.read_state(row, header)
    states = {str(rank): describe(whole_state(rank, blobs, blobs.__getitem__)) for rank in blobs}
    rows = {key: [*facts, hashlib.sha256(whole).hexdigest()] for key, (*facts, whole) in sorted(tensors.items())}
    return {"is_finite": manifest.is_finite, "tensors": rows, "states": states}


def _plain(contents: reader.Contents) -> dict[str, object]:
    tensors = {
        key: [dtype, shape, hashlib.sha256(data).hexdigest()] for key, (dtype, shape, data) in contents.tensors.items()
    }
    states = {str(rank): describe(tree) for rank, tree in contents.states.items()}
    return {"is_finite": contents.is_finite, "tensors": tensors, "states": states}
