from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from vist_rag.errors import InputError
from vist_rag.training.data import LengthBatches, Question, expand, read_jsonl, read_questions, titled
from vist_rag.types import Passage

ROWS = [{"a": 1}, {"b": "zwei — 二"}, {}]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_rows_come_in_order_and_blank_lines_do_not_count(tmp_path: Path, name: str) -> None:
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).replace("\n", "\n\n  \n", 1) + "\n"
    (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    assert list(read_jsonl(tmp_path / name)) == ROWS


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
@pytest.mark.parametrize("bad", [b'{"a": ', b"[1, 2]", b"3", b'{"a": "\xff"}', b"\x00", b"[" * 200_000])
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, suffix: str, bad: bytes) -> None:
    path = tmp_path / f"rows.{suffix}"
    content = b'{"a": 1}\n\n' + bad + b'\n{"a": 2}\n'
    path.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    rows = read_jsonl(path)
    assert next(rows) == {"a": 1}
    with pytest.raises(InputError, match=rf"{path}:3 must be a JSON object in UTF-8"):
        next(rows)


def test_a_torn_archive_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a": 1}\n' * 5000)[:-20])
    with pytest.raises(InputError, match=r"rows.jsonl.gz cannot be read after line \d+ .*; restore the file"):
        list(read_jsonl(path))
    path.write_bytes(b"not an archive")
    with pytest.raises(InputError, match="cannot be read after line 0"):
        list(read_jsonl(path))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data file must exist, got .*none.jsonl"):
        next(read_jsonl(tmp_path / "none.jsonl"))


def test_patterns_expand_to_each_file_once(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.txt"):
        (tmp_path / name).touch()
    assert expand(tmp_path, ["*.jsonl", "a.*"]) == [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    with pytest.raises(InputError, match=r"data pattern 'x\*' must match a file under"):
        expand(tmp_path, ["*.txt", "x*"])


GOOD = {"question": "Who?", "answers": ["Marie", "Curie"], "title": "T", "context": "Marie Curie."}


def test_questions_are_read(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(GOOD) + "\n\n" + json.dumps({**GOOD, "title": None}) + "\n")
    first, second = read_questions([path])
    assert first == Question("Who?", ("Marie", "Curie"), "T", "Marie Curie.")
    assert first.content == "T: Marie Curie."
    assert second == Question("Who?", ("Marie", "Curie"), "", "Marie Curie.")


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"answers": []}, r'must have a list of texts as "answers", got \[\]'),
        ({"answers": "Marie"}, "must have a list of texts as \"answers\", got 'Marie'"),
        ({"answers": None}, 'must have a list of texts as "answers", got None'),
        ({"answers": ["Marie", ""]}, "must have text as \"answers\", got ''"),
        ({"answers": [7]}, 'must have text as "answers", got 7'),
        ({"question": " "}, "must have text as \"question\", got ' '"),
        ({"context": None}, 'must have text as "context", got None'),
        ({"context": "\ud800"}, 'must have valid Unicode as "context", got surrogates not allowed at 0'),
        ({"title": ["T"]}, r'must have text as "title", got \[\'T\'\]'),
    ],
)
def test_a_malformed_question_is_named_by_file_and_line(tmp_path: Path, change: dict[str, object], error: str) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(GOOD) + "\n\n" + json.dumps(GOOD | change) + "\n")
    with pytest.raises(InputError, match=f"q.jsonl:3 {error}"):
        read_questions([path])


def test_patterns_are_relative(tmp_path: Path) -> None:
    for pattern in (str(tmp_path / "*.jsonl"), ""):
        with pytest.raises(InputError, match="data pattern must be a glob relative to"):
            expand(tmp_path, [pattern])


def test_titles_stand_as_in_a_passage() -> None:
    assert titled("River", "It runs.") == Passage("It runs.", title="River").content == "River: It runs."
    assert titled("", "It runs.") == "It runs."


# ------------------------------------------------------------------------------------------------------------ batches

LENGTHS = [3, 40, 7, 7, 25, 1, 0, 12, 39, 8, 30, 2, 19, 5, 11, 16] * 4


def test_batches_are_the_same_in_every_run() -> None:
    first = LengthBatches(LENGTHS, budget=60, steps=40, seed=1)
    assert len(first) == 40
    assert first.batches == LengthBatches(LENGTHS, budget=60, steps=40, seed=1).batches
    assert first.batches == LengthBatches(LENGTHS, budget=60, steps=70, seed=1).batches[:40]
    assert first.batches != LengthBatches(LENGTHS, budget=60, steps=40, seed=2).batches
    assert first[3] == first.batches[3]


@pytest.mark.parametrize("budget", [40, 60, 100, 1000])
def test_batches_stay_within_the_budget_when_padded(budget: int) -> None:
    for batch in LengthBatches(LENGTHS, budget=budget, steps=200, seed=0).batches:
        assert batch
        assert max(LENGTHS[i] for i in batch) * len(batch) <= budget


def test_an_epoch_holds_every_item_once() -> None:
    batches = LengthBatches(LENGTHS, budget=60, steps=500, seed=0).batches
    seen: list[int] = []
    while len(seen) < 3 * len(LENGTHS):
        seen += batches.pop(0)
    for epoch in range(3):
        assert sorted(seen[epoch * len(LENGTHS) : (epoch + 1) * len(LENGTHS)]) == list(range(len(LENGTHS)))
    assert seen[: len(LENGTHS)] != seen[len(LENGTHS) : 2 * len(LENGTHS)]


def test_batches_waste_little() -> None:
    batches = LengthBatches(LENGTHS, budget=120, steps=100, seed=0).batches
    padded = sum(max(LENGTHS[i] for i in batch) * len(batch) for batch in batches)
    assert sum(LENGTHS[i] for batch in batches for i in batch) / padded > 0.7


def test_an_item_beyond_the_budget_is_a_batch_by_itself() -> None:
    batches = LengthBatches([5, 500, 6], budget=20, steps=2, seed=0).batches
    assert sorted(map(sorted, batches)) == [[0, 2], [1]]


def test_no_items_make_no_batches() -> None:
    with pytest.raises(InputError, match="at least one item"):
        LengthBatches([], budget=20, steps=2, seed=0)
