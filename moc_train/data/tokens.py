"""A tokenizer and a token file, built once per corpus and settings, and found again by content hash.

    <cache>/<digest>/tokenizer.json    byte-level BPE
    <cache>/<digest>/tokens.bin        one flat array: documents, each followed by the end token
    <cache>/<digest>/meta.json         dtype, counts and the hash of tokens.bin

A folder is made under another name and renamed when it is whole, so a reader never sees a part of it; two builders
make the same bytes, and the second one's folder is dropped.
"""

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from moc_train.config import DataConfig
from moc_train.data.corpus import CorpusError, read_documents

__all__ = ["END_TOKEN", "TokenFile", "cache_folder", "prepare"]

CACHE_VERSION = 1  # to be raised when the same settings give other files
END_TOKEN = "<|end|>"
CHUNK_DOCUMENTS = 256  # encoded at once: bounds memory
UINT16_VOCAB = 1 << 16
BYTES_PER_MB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenFile:
    """A memory-mapped token file, cut into samples of `sequence_length` inputs and as many targets."""

    folder: Path
    digest: str
    vocab_size: int
    sequence_length: int
    tokens: np.ndarray[Any, Any]

    @classmethod
    def open(cls, folder: Path, *, sequence_length: int) -> "TokenFile":
        """Return the token file in this cache folder; raise CorpusError when it holds less than one sample."""
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        tokens = np.memmap(folder / "tokens.bin", dtype=np.dtype(meta["dtype"]), mode="r")
        if tokens.size != meta["tokens"]:
            raise CorpusError(f"token file is cut short folder={folder} tokens={tokens.size} expected={meta['tokens']}")
        if tokens.size <= sequence_length:
            raise CorpusError(
                f"the corpus has too little text for one sample tokens={tokens.size} sequence_length={sequence_length}"
            )
        return cls(
            folder=folder,
            digest=meta["digest"],
            vocab_size=meta["vocab_size"],
            sequence_length=sequence_length,
            tokens=tokens,
        )

    def __len__(self) -> int:
        return int((self.tokens.size - 1) // self.sequence_length)

    def sample(self, index: int) -> np.ndarray[Any, Any]:
        """Return `sequence_length + 1` tokens: the last is only a target, and the next sample's input."""
        start = index * self.sequence_length
        return np.asarray(self.tokens[start : start + self.sequence_length + 1])


def prepare(config: DataConfig) -> Path:
    """Return the cache folder of this corpus and these settings, building it first if it is not there."""
    corpus = _digest_corpus(config)
    settings = {
        "version": CACHE_VERSION,
        "corpus": corpus,
        "vocab_size": config.vocab_size,
        "tokenizer_mb": config.tokenizer_mb,
    }
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]
    root = cache_folder(config)
    target = root / key
    if (target / "meta.json").exists():
        return target
    root.mkdir(parents=True, exist_ok=True)
    draft = root / f".draft-{key}-{os.getpid()}"
    draft.mkdir()
    try:
        _build(config, draft)
        try:
            draft.rename(target)
        except OSError:
            if not (target / "meta.json").exists():  # else another process was first, with the same bytes
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target


def cache_folder(config: DataConfig) -> Path:
    """Return the folder in which prepared corpora are kept."""
    if config.cache:
        return Path(config.cache)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moc_train"


def _documents(config: DataConfig) -> Iterator[str]:
    return read_documents(config.corpus, max_bytes=int(config.max_mb * BYTES_PER_MB))


def _digest_corpus(config: DataConfig) -> str:
    digest = hashlib.sha256()
    count = 0
    for document in _documents(config):
        data = document.encode()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
        count += 1
    if not count:
        raise CorpusError(f"the corpus has no text corpus={list(config.corpus)}")
    return digest.hexdigest()


def _build(config: DataConfig, folder: Path) -> None:
    tokenizer = _train_tokenizer(config)
    vocab_size = tokenizer.get_vocab_size()
    dtype = np.dtype("<u2") if vocab_size <= UINT16_VOCAB else np.dtype("<u4")
    digest = hashlib.sha256()
    count = 0
    with open(folder / "tokens.bin", "wb") as stream:
        for ids in _encode(tokenizer, _documents(config)):
            data = np.asarray(ids, dtype=dtype).tobytes()
            stream.write(data)
            digest.update(data)
            count += len(ids)
        stream.flush()
        os.fsync(stream.fileno())
    tokenizer.save(str(folder / "tokenizer.json"))
    meta = {"dtype": dtype.str, "tokens": count, "vocab_size": vocab_size, "digest": digest.hexdigest()}
    (folder / "meta.json").write_text(json.dumps(meta) + "\n", encoding="utf-8")


def _train_tokenizer(config: DataConfig) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[END_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    limit = int(config.tokenizer_mb * BYTES_PER_MB)
    tokenizer.train_from_iterator(_first_bytes(_documents(config), limit), trainer)
    return tokenizer


def _first_bytes(documents: Iterable[str], limit: int) -> Iterator[str]:
    total = 0
    for document in documents:
        if limit and total >= limit:
            return
        total += len(document.encode())
        yield document


def _encode(tokenizer: Tokenizer, documents: Iterable[str]) -> Iterator[list[int]]:
    end = tokenizer.token_to_id(END_TOKEN)
    iterator = iter(documents)
    while chunk := list(itertools.islice(iterator, CHUNK_DOCUMENTS)):
        for encoding in tokenizer.encode_batch(chunk, add_special_tokens=False):
            yield [*encoding.ids, end]
