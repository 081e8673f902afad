"""A tiny embedder without a model, and ways to take rights away."""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray


class HashingEmbedder:
    """A bag of hashed words: texts that share words are near each other. Counts what it is asked."""

    def __init__(self, dimension: int = 64, name: str = "") -> None:
        self.dimension = dimension
        self.name = name or f"hashing-{dimension}"
        self.texts: list[str] = []

    def encode(self, texts: Sequence[str], *, query: bool = False) -> NDArray[np.float32]:
        self.texts += texts
        vectors = np.zeros((len(texts), self.dimension), np.float32)
        for vector, text in zip(vectors, texts, strict=True):
            for word in re.findall(r"\w+", text.lower()):
                word_hash = zlib.crc32(word.encode("utf-8", "surrogatepass"))
                vector[word_hash % self.dimension] += 1 if word_hash & 0x10000 else -1
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


@pytest.fixture
def embedder() -> HashingEmbedder:
    return HashingEmbedder()


@pytest.fixture
def new_embedder() -> type[HashingEmbedder]:
    return HashingEmbedder


@pytest.fixture
def read_only_directory(tmp_path: Path) -> Iterator[Callable[[Path], AbstractContextManager[None]]]:
    """A context in which a directory really cannot be written: root, whom permissions do not bind, becomes another."""

    @contextmanager
    def protected(directory: Path) -> Iterator[None]:
        opened = [
            p for p in (directory, *directory.parents) if p.stat().st_uid == os.getuid() and str(p).count("/") > 1
        ]
        modes = {p: p.stat().st_mode for p in opened}
        files = {p: p.stat().st_mode for p in directory.iterdir()}
        for path in opened:
            path.chmod(0o755)
        for path in files:
            path.chmod(0o444)
        directory.chmod(0o555)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        try:
            yield
        finally:
            os.seteuid(user)
            for path, mode in {**modes, **files}.items():
                if path.exists():
                    path.chmod(mode)

    return protected
