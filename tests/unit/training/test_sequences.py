"""Plain text of any length, cut into sequences of so many tokens."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from tests.support.causal import causal_generator
from vist_rag.errors import InputError
from vist_rag.training.data import TextSequence
from vist_rag.training.examples import SequenceMix
from vist_rag.training.sequences import GAP, SequenceCutter, open_sequences

TEXT = "The old bridge was built in 1867 by Marie Curie. The river runs from a lake to the sea. "


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    made: PreTrainedTokenizerFast = causal_generator(request.param).tokenizer
    return made


def count(tokenizer: PreTrainedTokenizerFast, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False).input_ids)


def squeezed(text: str) -> str:
    return "".join(text.split())


def test_a_long_text_is_cut_without_a_gap_where_words_begin(tokenizer: PreTrainedTokenizerFast) -> None:
    cutter = SequenceCutter(tokenizer, 40, 10)
    found = list(cutter.cut(TEXT * 20))
    assert len(found) >= 10
    whole = squeezed(TEXT * 20)
    assert whole.startswith("".join(squeezed(one.content) for one in found))
    words = set(TEXT.split())
    for one in found:
        assert set(one.content.split()) <= words  # none is cut in two
        assert 40 - 12 <= count(tokenizer, one.shown) <= 40 + 12  # a word is of so many tokens here, at most
        assert 10 - 12 <= count(tokenizer, one.told) <= 10 + 12
    tokens = sum(count(tokenizer, one.content) for one in found) / len(found)
    assert tokens == pytest.approx(50, abs=1.5)


def test_short_documents_share_a_sequence(tokenizer: PreTrainedTokenizerFast) -> None:
    cutter = SequenceCutter(tokenizer, 100, 20)
    documents = [f"{word} {TEXT}" for word in ("lake", "sea", "river", "bridge", "marie", "question")]
    found = [one for document in documents for one in cutter.cut(document)]
    assert found
    first = found[0]
    assert GAP in first.shown
    assert first.shown.startswith("lake The old bridge")
    assert "sea The old bridge" in f"{first.shown} {first.told}"
    assert squeezed("".join(documents)).startswith("".join(squeezed(one.content) for one in found))


def test_a_script_without_blanks_is_cut_where_tokens_begin() -> None:
    tokenizer = causal_generator("qwen3").tokenizer
    text = "橋は古い。" * 60
    found = list(SequenceCutter(tokenizer, 40, 10).cut(text))
    assert len(found) > 3
    assert text.startswith("".join(one.shown + one.told for one in found))


def rows(path: Path, *texts: str) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def test_files_of_every_kind_are_one_text(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    data = tmp_path / "data"
    data.mkdir()
    rows(data / "a.jsonl", TEXT * 2, "", TEXT * 3)
    (data / "b.txt").write_text("lake " + TEXT * 3)
    with pytest.raises(InputError, match=r'1 bad rows.*\n.*a\.jsonl:2 must have text as "text"'):
        open_sequences(data, ["*"], tmp_path / "cache", tokenizer, shown=60, told=10)
    with pytest.warns(UserWarning, match="1 bad sequences left out"):
        corpus = open_sequences(data, ["*"], tmp_path / "cache", tokenizer, shown=60, told=10, skip_bad=True)
    joined = squeezed(TEXT * 5 + "lake " + TEXT * 3)
    assert joined.startswith("".join(squeezed(one.content) for one in corpus))
    assert any("lake" in one.content for one in corpus)
    assert corpus.lengths.tolist() == [len(one.content) for one in corpus]


def test_what_was_cut_is_found_again_until_sizes_or_text_change(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows(tmp_path / "a.jsonl", TEXT * 10)
    sizes = {"shown": 40, "told": 8}
    first = open_sequences(tmp_path, ["a.jsonl"], tmp_path / "cache", tokenizer, **sizes)
    assert open_sequences(tmp_path, ["a.jsonl"], tmp_path / "cache", tokenizer, **sizes).key == first.key
    other = open_sequences(tmp_path, ["a.jsonl"], tmp_path / "cache", tokenizer, shown=30, told=8)
    assert other.key != first.key
    assert len(other) > len(first)
    with pytest.raises(InputError, match="sequences must have one row or more"):
        open_sequences(tmp_path, ["a.jsonl"], tmp_path / "cache", tokenizer, shown=40_000, told=8)


def test_a_batch_holds_no_sequence_twice_and_no_end() -> None:
    some = [TextSequence(f"shown {i}", f"told {i}") for i in range(5)]
    batch = SequenceMix(some, 4)(random.Random(0))
    assert batch == SequenceMix(some, 4)(random.Random(0)) != SequenceMix(some, 4)(random.Random(1))
    for seed in range(9):
        assert len({one.target for one in SequenceMix(some, 4)(random.Random(seed))}) == 4
    assert all(one.passages[0].text.replace("shown", "told") == one.target for one in batch)
    assert {(one.question, one.raw, one.ends) for one in batch} == {("", False, False)}
    assert len(SequenceMix(some, 9)(random.Random(0))) == 5
