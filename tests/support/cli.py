"""Run ``vist-rag`` in tests, with an embedder that needs no model; as ``python -m tests.support.cli``, slowly."""

from __future__ import annotations

import json
import os
import re
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner, Result

from vist_rag.cli import app
from vist_rag.retrieval.embedder import DEFAULT_MODEL

ROOT = Path(__file__).parents[2]
SLOW_S = 0.4
"""What a batch takes the slow embedder: long enough for a test to interrupt between two."""


class WordEmbedder:
    """A bag of hashed words under the default model's name: texts that share words are near each other."""

    name = DEFAULT_MODEL
    dimension = 256

    def __init__(self, *_: object, delay_s: float = 0) -> None:
        self.delay_s = delay_s

    def encode(self, texts: Sequence[str], *, query: bool = False) -> NDArray[np.float32]:
        time.sleep(self.delay_s)
        vectors = np.full((len(texts), self.dimension), 1e-3, np.float32)
        for vector, text in zip(vectors, texts, strict=True):
            for word in re.findall(r"\w+", text.lower()):
                vector[zlib.crc32(word.encode("utf-8", "surrogatepass")) % self.dimension] += 1
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@contextmanager
def word_embedder(delay_s: float = 0) -> Iterator[None]:
    """Indexes that are opened within have the word embedder in the place of MiniLM."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vist_rag.retrieval.index.SentenceTransformerEmbedder", lambda *_: WordEmbedder(delay_s=delay_s))
        yield


def run(*arguments: object, stdin: str | bytes | None = None) -> Result:
    """``vist-rag ARGUMENTS`` in this process; an error that no command caught is raised."""
    return CliRunner().invoke(app, [str(a) for a in arguments], input=stdin, catch_exceptions=False)


def run_json(*arguments: object) -> dict[str, Any]:
    """The one document that ``vist-rag ARGUMENTS --json`` prints."""
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    document: dict[str, Any] = json.loads(result.stdout)
    return document


def failure(*arguments: object, stdin: str | bytes | None = None) -> str:
    """The one line that ``vist-rag ARGUMENTS`` fails with; exit code 2, and nothing on stdout."""
    result = run(*arguments, stdin=stdin)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    *before, last = result.stderr.splitlines()
    assert last.startswith("error: "), result.stderr
    assert not any(line.startswith(("error", "Traceback")) for line in before), result.stderr
    return last


@contextmanager
def not_writable(directory: Path) -> Iterator[None]:
    """A directory really cannot be written within: root, whom permissions do not bind, becomes another user."""
    parents = [p for p in directory.parents if len(p.parts) > 2 and p.stat().st_uid == os.getuid()]
    modes = {p: p.stat().st_mode for p in (directory, *parents, *directory.iterdir())}
    for path in modes:
        path.chmod(0o555 if path.is_dir() else 0o444)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
        for path, mode in modes.items():
            if path.exists():
                path.chmod(mode)


if __name__ == "__main__":
    with word_embedder(delay_s=SLOW_S):
        app(sys.argv[1:], prog_name="vist-rag")
