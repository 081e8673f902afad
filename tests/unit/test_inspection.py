"""What stands behind an answer, with the embedded model: it is told where the answer stands."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.support.cli import WordEmbedder
from tests.support.tiny import tiny_compressor
from vist_rag.budget import Budget
from vist_rag.checkpoint import SETTINGS_FILE, embedded_checkpoint
from vist_rag.compression import VistCompressor
from vist_rag.inspection import Inspection, MemoryView, inspect_answer, view_memory
from vist_rag.pipeline import VistRAG
from vist_rag.retrieval import PassageIndex
from vist_rag.types import Passage

needs_model = pytest.mark.skipif(
    not (embedded_checkpoint() / SETTINGS_FILE).is_file(), reason="this checkout has no embedded model"
)
LONG = "A river runs from the lake to the sea. " * 30  # two pages
PASSAGES = [
    Passage(
        "The town of Ferrow lies in a narrow valley. Its stone bridge was designed by Martin Hall, who had "
        "studied in Uppsala, and it was opened to carts in the spring of that year.",
        title="Ferrow bridge",
    ),
    Passage(
        "Sheep graze on the hills in summer, and the market on the square sells wool, cheese and honey until the "
        "first snow closes the pass.",
        title="Ferrow market",
    ),
]
QUESTION = "Who designed the stone bridge of Ferrow?"
ANSWER = "Martin Hall"
MEMORIES, MIXED = Budget(k_memory=2), Budget(k_raw=1, k_memory=1, latents=8)


# ------------------------------------------------------------------------------------------------------------ memories


@pytest.fixture(scope="module")
def compressor() -> VistCompressor:
    return tiny_compressor()


@pytest.mark.parametrize("text", ["", "a", "The old bridge was built in 1867.", LONG])
def test_each_latent_shares_out_its_attention(compressor: VistCompressor, text: str) -> None:
    view = view_memory(compressor, text)
    n = compressor.count_latents(text)
    pages, s = view.pages.patch_mask.shape
    assert view.attention.shape == view.windows.shape == (n, pages * s)
    np.testing.assert_allclose(view.attention.sum(1) + view.to_latents, np.ones(n), rtol=1e-5)
    np.testing.assert_allclose(view.windows.sum(1), np.ones(n), rtol=1e-6)
    np.testing.assert_allclose(view.characters(view.windows).sum(1), np.ones(n) if text else np.zeros(n), rtol=1e-5)
    for latent, page in enumerate(view.page_of):
        here = slice(page * s, (page + 1) * s)
        assert view.attention[latent, here].sum() == view.attention[latent].sum()
        assert view.windows[latent, here].sum() == view.windows[latent].sum()


def test_the_attention_is_that_of_the_resampler(compressor: VistCompressor) -> None:
    text = "The old bridge was built in 1867."
    view, seen = view_memory(compressor, text), []
    block = compressor.resampler.blocks[0]
    hook = block.register_forward_pre_hook(lambda _, arguments: seen.append(arguments))
    compressor.encode([text])
    hook.remove()
    ((latents, features, mask),) = seen
    q = block.norm_latents(latents)[0] @ block.query.weight.T
    k = np.concatenate((block.norm_features(features)[0].detach(), block.norm_latents(latents)[0].detach()))
    k = k @ block.key_value.weight[:16].detach().numpy().T
    heads = []
    for head in (slice(0, 8), slice(8, 16)):
        scores = np.exp(q.detach().numpy()[:, head] @ k[:, head].T / np.sqrt(8))
        heads.append(scores / scores.sum(1, keepdims=True))
    patches = features.shape[1]
    assert bool(mask.all())
    np.testing.assert_allclose(view.attention[:, :patches], np.mean(heads, 0)[:, :patches], rtol=1e-4)


def test_a_latent_stands_for_the_words_of_its_window(compressor: VistCompressor) -> None:
    text = "The old bridge was built in 1867."
    characters = view_memory(compressor, text).characters(view_memory(compressor, text).windows)
    begins = (characters > 0).argmax(1)
    assert begins[0] == 0
    assert (np.diff(begins) > 0).all()  # in reading order
    assert ((characters > 0).sum(0) >= 1).all()  # every character is some latent's
    assert (characters > 0).sum(1).max() < 16  # a window is 56 px


# ------------------------------------------------------------------------------------------------------------- answers


@pytest.fixture(scope="module")
def rag(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VistRAG]:
    with PassageIndex.open(tmp_path_factory.mktemp("inspect"), embedder=WordEmbedder()) as index:
        index.add(PASSAGES)
        yield VistRAG.from_pretrained(None, index, device="cpu")


@pytest.fixture(scope="module")
def inspected(rag: VistRAG) -> dict[str, Inspection]:
    return {name: inspect_answer(rag, QUESTION, budget=b) for name, b in (("memory", MEMORIES), ("mixed", MIXED))}


@needs_model
def test_the_answers_are_those_of_the_pipeline(rag: VistRAG, inspected: dict[str, Inspection]) -> None:
    raw = rag.answer(QUESTION, budget=Budget(k_raw=2, k_memory=0))
    for name, budget in (("memory", MEMORIES), ("mixed", MIXED)):
        found, expected = inspected[name], rag.answer(QUESTION, budget=budget)
        assert found.answer.text == expected.text == ANSWER
        assert (found.answer.citations, found.answer.usage) == (expected.citations, expected.usage)
        assert found.raw is not None
        assert (found.raw.text, found.raw.usage.prompt_tokens) == (raw.text, raw.usage.prompt_tokens)
        assert [view.citation for view in found.passages] == list(expected.citations)


@needs_model
@pytest.mark.parametrize("name", ["memory", "mixed"])
def test_the_answer_looks_at_the_words_that_it_says(inspected: dict[str, Inspection], name: str) -> None:
    found = inspected[name]
    best, other = found.passages
    assert found.looked == "copied"
    assert sum(view.share for view in found.passages) + found.elsewhere == pytest.approx(1)
    assert best.share > 0.9 > other.share
    assert {word.text for word in best.words(2)} == set(ANSWER.split())
    content = best.citation.passage.content
    begin = content.index(ANSWER)
    assert best.characters[begin : begin + len(ANSWER)].sum() > 0.5
    for view in found.passages:
        assert len(view.characters) == len(view.citation.passage.content)
        assert len(view.positions) == view.tokens
        if view.citation.mode == "memory":
            assert view.characters.sum() == pytest.approx(view.share, rel=1e-4)
            assert view.patches is not None
            assert view.patches.sum() == pytest.approx(view.share, rel=1e-4)
        else:
            assert view.memory is view.patches is None
            assert view.characters.sum() <= view.share + 1e-6


@needs_model
def test_a_coarser_memory_is_looked_at_by_position(inspected: dict[str, Inspection]) -> None:
    (_, coarse) = inspected["mixed"].passages
    assert coarse.tokens == len(coarse.positions) == 8
    assert coarse.memory is not None
    assert len(coarse.memory.windows) > 8


@needs_model
def test_it_is_json_and_the_pages_are_pictures(inspected: dict[str, Inspection]) -> None:
    image = pytest.importorskip("PIL.Image")
    document = json.loads(json.dumps(inspected["mixed"].to_dict(), allow_nan=False))
    assert document["memory"]["answer"] == ANSWER
    assert set(document["memory"]["timings_ms"]) == {"search", "memory", "generate", "total"}
    assert document["raw"]["passage_tokens"] > document["memory"]["passage_tokens"]
    raw, memory = document["passages"]
    assert raw["text"][slice(*raw["span"])] == ANSWER
    assert (raw["mode"], raw["pages"]) == ("raw", [])
    (page,) = memory["pages"]
    picture = np.asarray(image.open(io.BytesIO(base64.b64decode(page["png"]))))
    assert picture.shape == (page["height"], page["width"])
    assert len(page["boxes"]) == len(page["attention"])
    left, top, width, height = page["boxes"][-1]
    assert left + width < page["width"]
    assert top + height < page["height"] <= top + 2 * height
    assert picture[top : top + height, left : left + width].min() < 128  # there is ink
    assert sum(page["attention"]) == pytest.approx(memory["share"], abs=2e-3)


@needs_model
def test_text_that_does_not_fit_is_told(rag: VistRAG, tmp_path: Path) -> None:
    with PassageIndex.open(tmp_path, embedder=WordEmbedder()) as index:
        index.add([Passage(f"{number} {PASSAGES[0].text * 2}") for number in range(6)])
        found = inspect_answer(
            VistRAG(index, rag.compressor, rag.generator, max_new_tokens=24), QUESTION, budget=Budget(k_memory=6)
        )
    assert found.raw is None
    assert "must fit 512 positions" in found.raw_error
    assert found.answer.text
    assert found.to_dict()["raw"] is None


def test_a_view_is_of_its_text(compressor: VistCompressor) -> None:
    view: MemoryView = view_memory(compressor, LONG)
    assert view.text == LONG
    assert view.page_of.tolist() == sorted(view.page_of.tolist())
    assert set(view.page_of) == {0, 1}
