"""The order of samples is a function of the seed alone; text becomes tokens once."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from moc_train.config import DataConfig
from moc_train.data import SampleLoader, TokenFile, prepare
from moc_train.data.corpus import CorpusError, read_documents
from moc_train.data.order import permute, sample_ids


def token_file(samples: int, sequence_length: int = 4) -> TokenFile:
    return TokenFile(
        folder=Path(),
        digest="abc",
        vocab_size=1 << 16,
        sequence_length=sequence_length,
        tokens=np.arange(samples * sequence_length + 1, dtype=np.uint16),
    )


def loaders(tokens: TokenFile, world_size: int, micro_batch: int, accumulation: int = 1) -> list[SampleLoader]:
    sizes = {"world_size": world_size, "micro_batch": micro_batch, "accumulation": accumulation}
    return [SampleLoader(tokens, seed=5, rank=rank, **sizes) for rank in range(world_size)]


def consumed_in_global_order(ranks: list[SampleLoader], steps: int) -> list[int]:
    """Return the ids in the tensors themselves, micro-batch after micro-batch and rank after rank."""
    ids: list[int] = []
    for _ in range(steps):
        samples = [rank.next_step() for rank in ranks]
        for parts in zip(*(step.micro_batches for step in samples), strict=True):
            for tokens, _targets in parts:
                ids.extend((tokens[:, 0] // tokens.size(1)).tolist())
    return ids


@given(count=st.integers(1, 5000), seed=st.integers(0, 2**40), epoch=st.integers(0, 9))
def test_an_epoch_has_every_sample_exactly_once(count: int, seed: int, epoch: int) -> None:
    values = permute(np.arange(count, dtype=np.uint64), count=count, seed=seed, epoch=epoch)

    assert sorted(values.tolist()) == list(range(count))


def test_the_order_differs_between_epochs_and_seeds() -> None:
    orders = [sample_ids(first, 100, count=100, seed=seed) for first, seed in ((0, 1), (100, 1), (0, 2))]

    assert len(set(orders)) == 3


def test_the_order_never_changes_between_versions() -> None:
    assert sample_ids(0, 8, count=1000, seed=0) == (571, 433, 812, 836, 796, 475, 396, 658)


@pytest.mark.parametrize(("world_size", "micro_batch", "accumulation"), [(1, 12, 1), (2, 2, 3), (3, 4, 1), (4, 1, 3)])
def test_the_global_order_does_not_depend_on_the_ranks(world_size: int, micro_batch: int, accumulation: int) -> None:
    tokens = token_file(samples=50)

    ids = consumed_in_global_order(loaders(tokens, world_size, micro_batch, accumulation), steps=10)

    assert ids == list(sample_ids(0, 120, count=50, seed=5))  # 2.4 epochs
    assert sorted(ids[:50]) == sorted(ids[50:100]) == list(range(50))


def test_targets_are_the_next_tokens() -> None:
    ((tokens, targets),) = loaders(token_file(samples=50), 1, 3)[0].next_step().micro_batches

    assert (targets == tokens + 1).all()


def test_a_loader_goes_on_where_its_state_was_taken_even_with_other_ranks() -> None:
    tokens = token_file(samples=50)
    undisturbed = consumed_in_global_order(loaders(tokens, 2, 6), steps=10)
    first = loaders(tokens, 2, 6)
    head = consumed_in_global_order(first, steps=4)

    state = json.loads(json.dumps(first[0].state_dict()))
    assert state == first[1].state_dict()
    later = loaders(tokens, 4, 3)
    for loader in later:
        loader.load_state_dict(state)

    assert head + consumed_in_global_order(later, steps=6) == undisturbed


def test_a_state_of_other_data_is_refused_by_name() -> None:
    state = loaders(token_file(samples=50), 1, 2)[0].state_dict()

    with pytest.raises(ValueError, match=r"loader state belongs to other data: samples: saved 50, now 51"):
        loaders(token_file(samples=51), 1, 2)[0].load_state_dict(state)


@pytest.fixture
def text_config(tmp_path: Path) -> DataConfig:
    (tmp_path / "a.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 30, encoding="utf-8")
    lines = [json.dumps({"text": f"line {number}: größer als ζero"}) for number in range(20)]
    (tmp_path / "b.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return data_config(tmp_path, cache="cache")


def data_config(folder: Path, *, cache: str, **settings: Any) -> DataConfig:
    corpus = (str(folder / "a.txt"), f"file://{folder / 'b.jsonl'}")
    return DataConfig(corpus=corpus, vocab_size=300, sequence_length=16, cache=str(folder / cache), **settings)


def test_documents_come_back_from_the_token_file(text_config: DataConfig) -> None:
    folder = prepare(text_config)

    tokens = TokenFile.open(folder, sequence_length=16)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = tokenizer.decode(tokens.tokens.tolist(), skip_special_tokens=False)
    assert text.split("<|end|>")[:-1] == list(read_documents(text_config.corpus, max_bytes=0))
    assert tokens.tokens.dtype == np.uint16
    assert tokens.vocab_size == 300


def test_a_prepared_corpus_is_found_again(text_config: DataConfig) -> None:
    folder = prepare(text_config)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}

    again = prepare(text_config)

    assert again == folder
    assert {path.name: path.stat().st_mtime_ns for path in again.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_changed_text_or_settings_are_prepared_anew(text_config: DataConfig, tmp_path: Path) -> None:
    first = prepare(text_config)
    second = prepare(data_config(tmp_path, cache="cache", tokenizer_mb=0.0001))
    (tmp_path / "a.txt").write_text("something else " * 50, encoding="utf-8")

    assert len({first, second, prepare(text_config)}) == 3


@pytest.mark.usefixtures("text_config")
def test_two_builds_of_a_corpus_are_the_same_bytes(tmp_path: Path) -> None:
    folders = [prepare(data_config(tmp_path, cache=cache)) for cache in ("one", "two")]

    for name in ("tokenizer.json", "tokens.bin", "meta.json"):
        assert len({(folder / name).read_bytes() for folder in folders}) == 1


@pytest.mark.parametrize("line", ['{"text": 3}', "[]", "not json"])
def test_a_broken_jsonl_line_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text('{"text": "fine"}\n' + line + "\n")

    with pytest.raises(CorpusError, match=r"path=.*bad\.jsonl line=2"):
        list(read_documents([str(file)], max_bytes=0))


def test_too_little_text_is_refused(text_config: DataConfig) -> None:
    with pytest.raises(CorpusError, match=r"too little text for one sample tokens=\d+ sequence_length=100000"):
        TokenFile.open(prepare(text_config), sequence_length=100_000)


def test_the_default_corpus_is_the_standard_library() -> None:
    documents = list(read_documents((), max_bytes=100_000))

    assert 100_000 <= sum(len(document.encode()) for document in documents) < 1_000_000
    assert any("import" in document for document in documents)
