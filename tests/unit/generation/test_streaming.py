from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tests.support.causal import byte_level_tokenizer, metaspace_tokenizer
from tests.support.tiny import tiny_tokenizer
from vist_rag.errors import ConfigError
from vist_rag.generation.streaming import Pieces, StopAt, until


def word_tokenizer(*words: str) -> PreTrainedTokenizerFast:
    """One token a word, and a decoder that joins punctuation to it, as BERT's does."""
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(("[UNK]", *words))}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", clean_up_tokenization_spaces=True)


def streamed(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    pieces = Pieces(tokenizer)
    pieces.put(torch.empty(1, 0, dtype=torch.long))  # generate begins with the prompt, which is empty
    for token in ids:
        pieces.put(torch.tensor([token]))
    pieces.end()
    return list(pieces)


@pytest.mark.parametrize("text", ["I don ' t know , said she .", "do n't we 're is n't , .", "he ' s ' t ?"])
def test_pieces_wait_for_what_a_later_token_joins(text: str) -> None:
    tokenizer = word_tokenizer(*dict.fromkeys(text.split()))
    ids = tokenizer.convert_tokens_to_ids(text.split())
    whole = tokenizer.decode(ids)
    assert len(whole) < len(text)  # something was joined
    pieces = streamed(tokenizer, ids)
    assert "".join(pieces) == whole
    assert len(pieces) > 2


@pytest.mark.parametrize("text", ["a 😀 in the sea 🌊🌊", "naïve “quotes” — 你好", "the old\nbridge\n\nwas built"])
@pytest.mark.parametrize("make", [byte_level_tokenizer, metaspace_tokenizer])
def test_pieces_wait_for_all_bytes_of_a_character(make: type[PreTrainedTokenizerFast], text: str) -> None:
    tokenizer = make()
    ids = tokenizer(text, add_special_tokens=False).input_ids
    pieces = streamed(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) > 2


@pytest.mark.parametrize("make", [tiny_tokenizer, byte_level_tokenizer, metaspace_tokenizer])
def test_pieces_of_any_tokens_are_their_text(make: type[PreTrainedTokenizerFast]) -> None:
    tokenizer, rng = make(), random.Random(0)
    # Not the bytes of byte fallback, which come last: one wrong byte turns a whole run of them into U+FFFD.
    count = len(tokenizer) - 256 if make is metaspace_tokenizer else len(tokenizer)
    for _ in range(20):
        ids = [rng.randrange(count) for _ in range(12)]
        assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True)


def test_pieces_come_before_the_end() -> None:
    tokenizer = word_tokenizer("one", "two", "three", "four")
    pieces = Pieces(tokenizer)
    for token in (1, 2, 3, 4):
        pieces.put(torch.tensor([token]))
    first = iter(pieces)
    assert next(first) + next(first) == "one two"


@pytest.mark.parametrize(
    ("pieces", "stop", "text"),
    [
        (["ab", "cd", "ef"], ["cd"], "ab"),
        (["ab", "cd", "ef"], ["bc"], "a"),
        (["a", "b", "c", "d"], ["bcd"], "a"),
        (["ab", "cd"], ["x"], "abcd"),
        (["abcd"], ["cd", "b"], "a"),
        (["ab", "cd"], ["ab"], ""),
        (["xy", "c", "xy", "d"], ["xyd"], "xyc"),
        ([], ["x"], ""),
        (["ab", "cd"], [], "abcd"),
    ],
)
def test_until_ends_before_the_first_stop_string(pieces: list[str], stop: list[str], text: str) -> None:
    assert "".join(until(pieces, stop)) == text


def test_until_reads_no_further_than_the_stop_string() -> None:
    pieces = iter(["ab", "cd", "ef"])
    assert list(until(pieces, ["c"])) == ["ab", ""]
    assert next(pieces) == "ef"


def test_stop_looks_at_the_text_of_each_row() -> None:
    tokenizer = word_tokenizer("don", "'", "t", "know", ".")
    stop = StopAt(tokenizer, ["don't", "know."])
    rows = torch.tensor([[1, 2, 3], [2, 3, 1], [0, 4, 5], [4, 4, 4]])
    assert stop(rows, None).tolist() == [True, False, True, False]
    assert StopAt(tokenizer, [])(rows, None).tolist() == [False] * 4
    stop.cancelled.set()
    assert stop(rows, None).tolist() == [True] * 4


def test_stop_finds_a_string_at_the_end_of_a_long_text() -> None:
    tokenizer = byte_level_tokenizer()
    ids = tokenizer("the river runs " * 20 + "zebra", add_special_tokens=False).input_ids
    stop = StopAt(tokenizer, ["runs zebra"])
    found = [bool(stop(torch.tensor([ids[:n]]), None)) for n in range(1, len(ids) + 1)]
    assert found == [False] * (len(ids) - 1) + [True]


@pytest.mark.parametrize("stop", ["\n", [""], ["x", ""]])
def test_stop_is_a_list_of_strings(stop: Sequence[str]) -> None:
    with pytest.raises(ConfigError, match="stop must be a list of strings that are not empty"):
        StopAt(tiny_tokenizer(), stop)
