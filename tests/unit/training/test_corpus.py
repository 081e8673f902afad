from __future__ import annotations

import gzip
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vist_rag.errors import ConfigError, InputError
from vist_rag.retrieval import split_text
from vist_rag.training.corpus import PassageCorpus, QuestionCorpus, open_passages, open_questions
from vist_rag.training.data import Question
from vist_rag.types import Passage

BRIDGE = "The stone bridge across the river was built in 1867 by two brothers."
ROW = {"text": BRIDGE, "title": "Bridge", "id": "b-1"}
QUESTION = {"question": "When was it built?", "answers": ["1867", "in 1867"], "title": "Bridge", "context": BRIDGE}


def lines(*rows: Any, end: str = "\n") -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + end for row in rows).encode()


def texts(count: int, name: str = "Text") -> list[dict[str, Any]]:
    return [{"text": f"{BRIDGE} {'It carries a road. ' * (i % 5)}", "title": f"{name} {i}"} for i in range(count)]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


# ------------------------------------------------------------------------------------------------------------- access


def test_plain_and_gzipped_rows_are_read_as_they_were_written(data: Path, cache: Path) -> None:
    (data / "a.jsonl").write_bytes(lines(*texts(20, "A")))
    (data / "b.jsonl.gz").write_bytes(gzip.compress(lines(*texts(30, "B"))))
    expected = [Passage(row["text"], title=row["title"]) for row in texts(20, "A") + texts(30, "B")]
    corpus = open_passages(data, ["*.jsonl", "b.*"], cache)
    assert len(corpus) == 50
    assert [corpus[i] for i in range(50)] == list(corpus) == expected
    assert [corpus[i] for i in (-1, -50)] == [expected[-1], expected[0]]
    assert corpus[np.int64(7)] == expected[7]
    assert corpus[3:40:9] == expected[3:40:9]
    assert corpus.lengths.tolist() == [len(passage.content) for passage in expected]
    assert random.Random(0).choices(corpus, k=5) == random.Random(0).choices(expected, k=5)
    for beyond in (50, -51):
        with pytest.raises(IndexError, match="must be below 50"):
            corpus[beyond]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("last", ["", "end"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_what_looks_like_a_line_end_is_none(data: Path, cache: Path, end: str, last: str, mark: bytes) -> None:
    rows = [{"text": f"{BRIDGE}{odd}Двадцать лет — 二十年.", "title": ""} for odd in "\u2028\u2029\x85\x0b\x1c\r\n"]
    (data / "a.jsonl").write_bytes(mark + lines(*rows, end=end).removesuffix(b"" if last else end.encode()))
    assert [passage.text for passage in open_passages(data, ["a.jsonl"], cache)] == [row["text"] for row in rows]


def test_fields_may_be_missing_and_ids_may_be_numbers(data: Path, cache: Path) -> None:
    rows = [ROW, {"text": BRIDGE}, {"text": BRIDGE, "title": None, "id": 7}, {"text": BRIDGE, "title": " ", "more": []}]
    (data / "a.jsonl").write_bytes(lines(*rows))
    corpus = open_passages(data, ["a.jsonl"], cache)
    unnamed = Passage(BRIDGE)
    assert list(corpus) == [Passage(BRIDGE, "b-1", "Bridge"), unnamed, Passage(BRIDGE, "7"), unnamed]


def test_folders_and_texts_are_cut_as_for_an_index(data: Path, cache: Path) -> None:
    (data / "notes" / "deep").mkdir(parents=True)
    long = " ".join(f"Sentence number {i} of this text says little." for i in range(60))
    (data / "notes" / "long.txt").write_text(long, "utf-8")
    (data / "notes" / "page.html").write_text(f"<title>Page</title><p>{BRIDGE}</p>", "utf-8")
    (data / "notes" / "blank.txt").touch()
    (data / "notes" / "picture.png").write_bytes(b"\0")
    (data / "notes" / "deep" / "rows.jsonl").write_bytes(lines(ROW))
    (data / "notes" / "deep" / "rows.jsonl.gz").write_bytes(gzip.compress(lines(ROW)))
    (data / "one.md").write_text(f"# Heading\n\n{BRIDGE}", "utf-8")
    (data / ".hidden").touch()
    corpus = open_passages(data, ["*"], cache)
    spans = split_text(long)
    assert len(spans) > 2
    assert list(corpus) == [
        *[Passage(BRIDGE, "b-1", "Bridge")] * 2,
        *(Passage(long[start:end], title="long") for start, end in spans),
        Passage(BRIDGE, title="Page"),
        Passage(f"# Heading\n\n{BRIDGE}", title="Heading"),
    ]


def test_questions_carry_the_weight_of_their_pattern(data: Path, cache: Path) -> None:
    for name, count in (("a", 2), ("b", 3), ("c", 1)):
        rows = [{**QUESTION, "title": f"{name}{i}"} for i in range(count)]
        (data / f"{name}.jsonl").write_bytes(lines(*rows))
    corpus = open_questions(data, {"[cb].jsonl": 0.5, "a.jsonl": 2, "c.*": 3.0}, cache)
    assert corpus[0] == Question("When was it built?", ("1867", "in 1867"), "a0", BRIDGE)
    assert [row.title for row in corpus] == ["a0", "a1", "b0", "b1", "b2", "c0"]
    assert corpus.weights.tolist() == [2.0, 2.0, 0.5, 0.5, 0.5, 3.0]
    assert corpus.lengths.tolist() == [len(row.content) for row in corpus]
    assert open_questions(data, {"*.jsonl": 4}, cache).weights.tolist() == [4.0] * 6
    assert open_questions(data, ["*.jsonl", "b.*"], cache).weights.tolist() == [1.0] * 6


def test_an_order_is_complete_shuffled_and_the_same_in_every_version(data: Path, cache: Path) -> None:
    (data / "a.jsonl").write_bytes(lines(*texts(300)))
    corpus = open_passages(data, ["a.jsonl"], cache)
    order = corpus.order(0)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(300))
    assert order[:5].tolist() == [208, 188, 12, 221, 239]
    assert (order == corpus.order(0)).all()
    assert (order != corpus.order(1)).any()


def test_a_corpus_travels_to_another_process(data: Path, cache: Path) -> None:
    (data / "a.jsonl").write_bytes(lines(*texts(30)))
    corpus = open_passages(data, ["a.jsonl"], cache)
    packed = pickle.dumps(corpus)
    assert len(packed) < 500
    assert list(pickle.loads(packed)) == list(corpus)


# -------------------------------------------------------------------------------------------------------------- cache


def silence(path: Path) -> None:
    """Make reading a file raise, without its size and time telling."""
    stat = path.stat()
    path.write_bytes(b"x" * stat.st_size)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_a_corpus_is_built_once(data: Path, cache: Path) -> None:
    (data / "a.jsonl").write_bytes(lines(*texts(5)))
    (data / "q.jsonl").write_bytes(lines(QUESTION))
    first = open_passages(data, ["a.jsonl"], cache)
    asked = open_questions(data, ["q.jsonl"], cache)
    silence(data / "a.jsonl")
    silence(data / "q.jsonl")
    again = open_passages(data, ["a.jsonl"], cache)
    assert list(again) == list(first)
    assert again.key == first.key
    assert list(open_questions(data, ["q.jsonl"], cache)) == list(asked)
    moved = data.rename(data.with_name("moved"))
    assert open_passages(moved, ["a.jsonl"], cache).key == first.key


def _touch(data: Path) -> None:
    stat = (data / "a.jsonl").stat()
    os.utime(data / "a.jsonl", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))


@pytest.mark.parametrize(
    ("change", "options"),
    [
        (_touch, {}),
        (lambda data: (data / "a.jsonl").write_bytes(lines(*texts(6))), {}),
        (lambda data: (data / "a2.jsonl").write_bytes(lines(*texts(6))), {}),
        (lambda data: (data / "a.jsonl").rename(data / "a1.jsonl"), {}),
        (lambda _: None, {"characters": (30, 1000)}),
        (lambda _: None, {"skip_bad": True}),
    ],
    ids=["time", "content", "file", "name", "bounds", "skip_bad"],
)
def test_a_change_builds_it_anew(
    data: Path, cache: Path, change: Callable[[Path], object], options: dict[str, Any]
) -> None:
    (data / "a.jsonl").write_bytes(lines(*texts(5)))
    before = open_passages(data, ["a*.jsonl"], cache)
    old = list(before)
    change(data)
    after = open_passages(data, ["a*.jsonl"], cache, **options)
    assert after.key != before.key
    assert len(after) == sum(path.read_bytes().count(b"\n") for path in data.iterdir())
    assert list(before) == old  # whoever has it open goes on reading it
    assert len(list(cache.iterdir())) == 1


def test_weights_may_change(data: Path, cache: Path) -> None:
    (data / "q.jsonl").write_bytes(lines(QUESTION))
    assert open_questions(data, {"q.jsonl": 1}, cache).weights.tolist() == [1.0]
    assert open_questions(data, {"q.jsonl": 2}, cache).weights.tolist() == [2.0]


FILES = ["rows.jsonl", "offsets.npy", "lengths.npy", "corpus.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "empty", "short"])
def test_a_torn_corpus_is_built_anew(data: Path, cache: Path, name: str, damage: str) -> None:
    (data / "a.jsonl").write_bytes(lines(*texts(40)))
    corpus = open_passages(data, ["a.jsonl"], cache)
    expected, file = list(corpus), corpus.folder / name
    content = file.read_bytes()
    file.unlink()  # the mapping of the open corpus keeps its bytes
    if damage != "missing":
        file.write_bytes(content[: 0 if damage == "empty" else -9])
    with pytest.raises(InputError, match="must be a whole corpus"):
        PassageCorpus(corpus.folder)
    assert list(open_passages(data, ["a.jsonl"], cache)) == expected


def test_offsets_of_another_corpus_do_not_count(data: Path, cache: Path) -> None:
    for name, count in (("a", 40), ("b", 41)):
        (data / f"{name}.jsonl").write_bytes(lines(*texts(count)))
    a, b = (open_passages(data, [name], cache) for name in ("a.jsonl", "b.jsonl"))
    for name in ("offsets.npy", "lengths.npy"):
        (a.folder / name).unlink()
        shutil.copy(b.folder / name, a.folder / name)
    assert len(open_passages(data, ["a.jsonl"], cache)) == 40


def test_what_a_killed_build_leaves_does_not_count(data: Path, cache: Path) -> None:
    (data / "a.jsonl").write_bytes(lines(*texts(40)))
    corpus = open_passages(data, ["a.jsonl"], cache)
    unfinished = corpus.folder.with_name(corpus.folder.name + ".part")
    corpus.folder.rename(unfinished)
    (unfinished / "rows.jsonl").write_bytes(b"{")
    assert len(list(open_passages(data, ["a.jsonl"], cache))) == 40
    assert list(cache.iterdir()) == [corpus.folder]


def test_a_build_that_fails_leaves_nothing(data: Path, cache: Path) -> None:
    (data / "a.jsonl").write_bytes(lines(*texts(4)) + b"bad\n")
    with pytest.raises(InputError):
        open_passages(data, ["a.jsonl"], cache)
    assert list(cache.iterdir()) == []


# ----------------------------------------------------------------------------------------------------------- bad rows

BAD_ROWS = [
    (b"{", "must be a JSON object in UTF-8 (Expecting"),
    (b"[1]", "must be a JSON object in UTF-8 (it is [1])"),
    (b'{"text": "\xff"}', "must be a JSON object in UTF-8 ('utf-8' codec can't"),
    (b"[" * 200_000, "must be a JSON object in UTF-8 (maximum recursion"),
    (lines({"title": "T"}), 'must have text as "text", got None'),
    (lines({"text": " \t"}), "must have text as \"text\", got ' \\t'"),
    (lines({"text": ["a"]}), "must have text as \"text\", got ['a']"),
    (b'{"text": "\\ud83d"}', 'must have valid Unicode as "text", got surrogates not allowed at 0'),
    (lines({**ROW, "title": 3}), 'must have text as "title", got 3'),
    (lines({**ROW, "id": 1.5}), 'must have text as "id", got 1.5'),
    (lines({**ROW, "id": True}), 'must have text as "id", got True'),
]
BAD_QUESTIONS = [
    (b"nul", "must be a JSON object in UTF-8 (Expecting"),
    (lines({**QUESTION, "answers": []}), 'must have a list of texts as "answers", got []'),
    (lines({**QUESTION, "answers": "1867"}), "must have a list of texts as \"answers\", got '1867'"),
    (lines({**QUESTION, "answers": [1867]}), 'must have text as "answers", got 1867'),
    (lines({**QUESTION, "answers": ["1867", ""]}), "must have text as \"answers\", got ''"),
    (lines({**QUESTION, "question": None}), 'must have text as "question", got None'),
    (lines({**QUESTION, "context": ""}), "must have text as \"context\", got ''"),
    (lines({**QUESTION, "title": {}}), 'must have text as "title", got {}'),
]


def _passages(data: Path, cache: Path, **options: Any) -> PassageCorpus | QuestionCorpus:
    return open_passages(data, ["*"], cache, **options)


def _questions(data: Path, cache: Path, **options: Any) -> PassageCorpus | QuestionCorpus:
    return open_questions(data, ["*"], cache, **options)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
@pytest.mark.parametrize(
    ("read", "good", "bad", "error"),
    [(_passages, ROW, *bad) for bad in BAD_ROWS] + [(_questions, QUESTION, *bad) for bad in BAD_QUESTIONS],
)
def test_a_bad_row_is_named_or_left_out_and_listed(
    data: Path,
    cache: Path,
    name: str,
    read: Callable[..., PassageCorpus | QuestionCorpus],
    good: dict[str, Any],
    bad: bytes,
    error: str,
) -> None:
    content = lines(good) + b"\r\n\n" + bad.rstrip() + b"\n" + lines(good)
    (data / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    with pytest.raises(InputError, match="1 bad rows; mend them or use --skip-bad") as caught:
        read(data, cache)
    assert f"\n{data / name}:4 {error}" in str(caught.value)

    with pytest.warns(UserWarning, match="1 bad .* left out; .*bad_rows.jsonl lists them"):
        corpus = read(data, cache, skip_bad=True)
    assert (len(corpus), corpus.bad) == (2, 1)
    assert corpus[0] == corpus[1]
    listed = json.loads((corpus.folder / "bad_rows.jsonl").read_text("utf-8"))
    assert (listed["file"], listed["line"]) == (str(data / name), 4)
    assert listed["error"].startswith(error)


def test_the_first_bad_rows_are_named_and_all_are_counted_and_listed(data: Path, cache: Path) -> None:
    (data / "a.jsonl").write_bytes(lines(ROW) + b"{\n" * 3)
    (data / "b.jsonl").write_bytes(b"{\n" * 4 + lines(ROW))
    with pytest.raises(InputError, match="passages: 7 bad rows") as caught:
        open_passages(data, ["*.jsonl"], cache)
    named = [line.split(" ")[0] for line in str(caught.value).splitlines()[1:]]
    assert named == [*(f"{data}/a.jsonl:{i}" for i in (2, 3, 4)), *(f"{data}/b.jsonl:{i}" for i in (1, 2)), "and"]
    assert str(caught.value).endswith("\nand 2 more")
    for _ in range(2):  # the second is not built, but warns as well
        with pytest.warns(UserWarning, match="7 bad passages"):
            corpus = open_passages(data, ["*.jsonl"], cache, skip_bad=True)
        assert (len(corpus), corpus.bad) == (2, 7)
    listed = (corpus.folder / "bad_rows.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["line"] for line in listed] == [2, 3, 4, 1, 2, 3, 4]


def test_a_text_that_cannot_be_read_is_a_bad_row(data: Path, cache: Path) -> None:
    (data / "a.txt").write_text(BRIDGE, "utf-8")
    (data / "b.txt").write_bytes(b"Stra\xdfe")
    with pytest.raises(InputError, match=rf"\n{data}/b.txt is not utf-8: byte 0xdf at 4; convert it"):
        open_passages(data, ["*.txt"], cache)
    with pytest.warns(UserWarning, match="1 bad passages"):
        corpus = open_passages(data, ["*.txt"], cache, skip_bad=True)
    assert list(corpus) == [Passage(BRIDGE, title="a")]
    listed = json.loads((corpus.folder / "bad_rows.jsonl").read_text("utf-8"))
    assert (listed["file"], listed["line"]) == (f"{data}/b.txt", None)
    assert listed["error"].startswith("is not utf-8")


def test_a_torn_archive_is_no_bad_row(data: Path, cache: Path) -> None:
    (data / "a.jsonl.gz").write_bytes(gzip.compress(lines(*texts(2000)))[:-20])
    with pytest.raises(InputError, match=r"a.jsonl.gz cannot be read after line \d+"):
        open_passages(data, ["*"], cache, skip_bad=True)


def test_texts_outside_the_bounds_are_counted(data: Path, cache: Path) -> None:
    (data / "a.jsonl").write_bytes(lines(*({"text": "x" * n, "title": "T" * 50} for n in (9, 10, 15, 20, 21))))
    corpus = open_passages(data, ["*"], cache, characters=(10, 20))
    assert [len(passage.text) for passage in corpus] == [10, 15, 20]
    assert (corpus.outside, corpus.bad) == (2, 0)
    for bounds in ((20, 10), (-1, 10)):
        with pytest.raises(ConfigError, match="characters must be the shortest and the longest length"):
            open_passages(data, ["*"], cache, characters=bounds)


def test_no_rows_are_no_corpus(data: Path, cache: Path) -> None:
    (data / "a.jsonl").write_bytes(b"\n\n")
    for read in (_passages, _questions):
        with pytest.raises(InputError, match="must have one row or more, got none in 1 files"):
            read(data, cache)
    (data / "a.jsonl").write_bytes(lines({"text": "short"}) + b"{\n")
    with pytest.raises(InputError, match=r"got none in 1 files \(1 bad, 1 outside the bounds; .*\[30, 1200\]"):
        _passages(data, cache, skip_bad=True)


def test_what_matches_nothing_or_is_no_text_is_refused(data: Path, cache: Path) -> None:
    (data / "a.parquet").touch()
    with pytest.raises(InputError, match="must match a file under"):
        open_passages(data, ["*.jsonl"], cache)
    with pytest.raises(InputError, match=r"a.parquet must end in .txt, .*.jsonl.gz; convert it, or narrow"):
        open_passages(data, ["*"], cache)
    (data / "a.parquet").rename(data / "a.txt")
    with pytest.raises(InputError, match=r"a.txt must end in .jsonl, .jsonl.gz; convert it"):
        open_questions(data, ["*"], cache)


@pytest.mark.parametrize("weight", [0, -1.0, float("nan"), float("inf")])
def test_weights_are_above_zero(data: Path, cache: Path, weight: float) -> None:
    with pytest.raises(ConfigError, match=r"weight of 'a\*' must be above 0"):
        open_questions(data, {"a*": weight}, cache)
