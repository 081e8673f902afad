from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from vist_rag.errors import ConfigError, InputError, MissingDependencyError
from vist_rag.evaluation.datasets import (
    LABELLED_SETS,
    QUESTION_ALIASES,
    QUESTION_SETS,
    LabelledText,
    QuestionRow,
    load_corpus,
    load_labelled,
    load_questions,
    load_texts,
)
from vist_rag.types import Passage

ASKED = {"question": "Who?", "answers": ["Ada"]}


def write(path: Path, *rows: Any) -> Path:
    """JSON lines, gzipped if the name says so. A string is a line as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def read(path: Path, **options: Any) -> list[QuestionRow]:
    return load_questions(str(path), data=None, **options)


# One question in each layout.
LAYOUTS: dict[str, tuple[dict[str, Any], QuestionRow]] = {
    "ours": (
        {"id": "q1", **ASKED, "gold": "p1", "bm25": [["p2", 3], ["p1", 2.5]], "agent_retrieved": ["p3"]},
        QuestionRow("q1", "Who?", ("Ada",), gold=("p1",), bm25=(("p2", 3.0), ("p1", 2.5))),
    ),
    "ours, several gold passages": (
        {"id": "q1", **ASKED, "gold": ["p1", "p2", "p1"], "bm25": []},
        QuestionRow("q1", "Who?", ("Ada",), gold=("p1", "p2")),
    ),
    "ours, regular expressions": (
        {"id": "q1", "question": "Who?", "answers": [r"Ada\s?L.*"], "answer_type": "regex"},
        QuestionRow("q1", "Who?", (r"Ada\s?L.*",), regex=True),
    ),
    "reader": (
        {"id": "r1", **ASKED, "title": "Some_thing", "context": "Ada was.", "passage_id": "p9"},
        QuestionRow("r1", "Who?", ("Ada",), context=Passage("Ada was.", "p9", "Some_thing")),
    ),
    "reader without a title": (
        {"id": "r1", **ASKED, "title": "", "context": "Ada was."},
        QuestionRow("r1", "Who?", ("Ada",), context=Passage("Ada was.")),
    ),
    "nq_open": (
        {"question": "who?", "answer": ["Ada", "Ada Lovelace"]},
        QuestionRow("file-000001", "who?", ("Ada", "Ada Lovelace")),
    ),
    "trivia_qa": (
        {
            "question_id": "tc_1",
            "question": "Who?",
            "answer": {"value": "Ada", "aliases": ["Ada", "A. L."], "normalized_aliases": ["ada", ""], "type": "X"},
        },
        QuestionRow("tc_1", "Who?", ("Ada", "A. L.", "ada")),
    ),
    "popqa": (
        {"id": 4222362, "question": "Who?", "possible_answers": '["Ada", "Ad\\u00e8le"]', "obj": "Ada", "s_pop": 7},
        QuestionRow("4222362", "Who?", ("Ada", "Adèle")),
    ),
    "web_questions": (
        {"url": "http://example.org", "question": "who?", "answers": ["Ada", "Ada"]},
        QuestionRow("file-000001", "who?", ("Ada",)),
    ),
    "squad of the hub": (
        {
            "id": "s1",
            "title": "Ada_Lovelace",
            "context": "Ada was.",
            "question": "Who?",
            "answers": {"text": ["Ada", "Ada"], "answer_start": [0, 0]},
        },
        QuestionRow("s1", "Who?", ("Ada",), context=Passage("Ada was.", title="Ada Lovelace")),
    ),
    "dpr": (
        {
            **ASKED,
            "ctxs": [
                {"id": "wiki:7", "title": "Ada", "text": "First.", "score": "81.2", "has_answer": True},
                {"id": 8, "title": "", "text": "Second.", "score": 80.1},
            ],
        },
        QuestionRow(
            "file-000001",
            "Who?",
            ("Ada",),
            contexts=(Passage("First.", "wiki:7", "Ada"), Passage("Second.", "8")),
        ),
    ),
    "one answer": ({"question": "Who?", "answer": "Ada"}, QuestionRow("file-000001", "Who?", ("Ada",))),
    "null is absent": (
        {"id": None, **ASKED, "gold": None, "bm25": None, "context": None, "ctxs": None, "title": None},
        QuestionRow("file-000001", "Who?", ("Ada",)),
    ),
}


@pytest.mark.parametrize("name", ["file.jsonl", "file.jsonl.gz", "file.json", "file.json.gz"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_in_each_kind_of_file(tmp_path: Path, layout: str, name: str) -> None:
    row, expected = LAYOUTS[layout]
    assert read(write(tmp_path / name, [row] if ".json." in f"{name}." else row)) == [expected]


def test_layouts_can_be_mixed_and_order_stays(tmp_path: Path) -> None:
    path = write(tmp_path / "file.jsonl", *(row for row, _ in LAYOUTS.values()))
    assert [q.question for q in read(path)] == [expected.question for _, expected in LAYOUTS.values()]


def test_squad_as_its_authors_publish_it(tmp_path: Path) -> None:
    def asked(id_: str) -> dict[str, Any]:
        return {"id": id_, "question": f"{id_}?", "answers": [{"text": "Ada", "answer_start": 0}, {"text": "A."}]}

    articles = [
        {
            "title": "Ada_L.",
            "paragraphs": [{"context": "One.", "qas": [asked("a"), asked("b")]}, {"context": "Two.", "qas": []}],
        },
        {"title": "Byron", "paragraphs": [{"context": "Three.", "qas": [asked("c")]}]},
    ]
    path = tmp_path / "dev-v1.1.json"
    path.write_text(json.dumps({"version": "1.1", "data": articles}))
    assert read(path) == [
        QuestionRow("a", "a?", ("Ada", "A."), context=Passage("One.", title="Ada L.")),
        QuestionRow("b", "b?", ("Ada", "A."), context=Passage("One.", title="Ada L.")),
        QuestionRow("c", "c?", ("Ada", "A."), context=Passage("Three.", title="Byron")),
    ]
    articles[1]["paragraphs"] = [{"context": "Three.", "qas": [asked("c"), {"id": "d", "question": "d?"}, 5]}, {}]
    path.write_text(json.dumps({"data": articles}))
    told: list[str] = []
    assert [q.id for q in read(path, skip_bad=True, on_bad=told.append)] == ["a", "b", "c"]
    assert [message.partition(" must ")[0].removeprefix(str(path)) for message in told] == [
        ", row 2, paragraph 1, question 2,",
        ", row 2, paragraph 1,",
        ", row 2, paragraph 2,",
    ]


def test_json_lines_are_read_whatever_they_are_called(tmp_path: Path) -> None:
    path = write(tmp_path / "hub.json", {"id": "a", **ASKED}, {"id": "b", **ASKED})
    assert [q.id for q in read(path)] == ["a", "b"]
    one = write(tmp_path / "one.json", {"id": "a", **ASKED})
    assert [q.id for q in read(one)] == ["a"]
    (tmp_path / "rows.json").write_text(json.dumps({"data": [{"id": "c", **ASKED}]}))
    assert [q.id for q in read(tmp_path / "rows.json")] == ["c"]


def test_a_row_without_an_id_is_called_by_its_line(tmp_path: Path) -> None:
    path = write(tmp_path / "my.set.jsonl.gz", ASKED, "", {"id": "x", **ASKED}, ASKED)
    assert [q.id for q in read(path)] == ["my.set-000001", "x", "my.set-000004"]


def test_ids_are_made_unique(tmp_path: Path) -> None:
    path = write(tmp_path / "f.jsonl", *({"id": i, **ASKED} for i in ("a", "b", "a", "a")))
    assert [q.id for q in read(path)] == ["a", "b", "a#2", "a#3"]


def test_a_prefix_keeps_the_ids_that_begin_so(tmp_path: Path) -> None:
    write(tmp_path / "reader/all.jsonl", *({"id": i, **ASKED} for i in ("nq_1", "tqa_1", "nq_2")))
    kept = load_questions("reader/all.jsonl#nq_", data=tmp_path)
    assert [q.id for q in kept] == ["nq_1", "nq_2"]
    with pytest.raises(InputError, match=r"got none \(3 have an id that does not begin with 'zz'\)"):
        load_questions("reader/all.jsonl#zz", data=tmp_path)
    odd = write(tmp_path / "a#b.jsonl", {"id": "x", **ASKED})
    assert [q.id for q in read(odd)] == ["x"]


BAD_ROWS: dict[str, tuple[Any, str]] = {
    "no JSON": ("{", r"be JSON in UTF-8 \(Expecting property name"),
    "nested": ("[" * 100_000, r"be JSON in UTF-8 \(maximum recursion"),
    "a list": ([1], r"be a JSON object, got \[1\]"),
    "no question": ({"answers": ["x"]}, 'have a text "question", got None'),
    "blank question": ({"question": " ", "answers": ["x"]}, "have a text \"question\", got ' '"),
    "half a letter": (
        r'{"question": "\ud800", "answers": ["x"]}',
        ".* in valid Unicode, got surrogates not allowed at 0",
    ),
    "no answers": ({"question": "x"}, "have answers in one of the fields answers, answer, possible_answers"),
    "empty answers": ({"question": "x", "answers": []}, r'have at least one answer in "answers", got \[\]'),
    "blank answers": ({"question": "x", "answers": ["", " "]}, 'have at least one answer in "answers"'),
    "a number": ({"question": "x", "answers": ["x", 5]}, 'have strings in "answers", got 5'),
    "a number for all": ({"question": "x", "answer": 5}, 'have a list of strings in "answer", got 5'),
    "torn list": ({"question": "x", "possible_answers": '["x'}, r'have a JSON list in "possible_answers" \(Unterm'),
    "unanswerable": ({"question": "x", "answers": {"text": []}}, 'have at least one answer in "answers"'),
    "secret": ({"question": "x", "answer": {"value": "<unk>", "aliases": []}}, 'have at least one answer in "answer"'),
    "id": ({"id": [1], **ASKED}, r'have a string or a number as "id", got \[1\]'),
    "pattern": (
        {"question": "x", "answers": ["(x"], "answer_type": "regex"},
        "have regular expressions as answers: .*",
    ),
    "gold": ({**ASKED, "gold": [None]}, r'have passage ids in "gold", got \[None\]'),
    "bm25": ({**ASKED, "bm25": 3}, 'have pairs of a passage id and a score in "bm25", got 3'),
    "bm25 pair": ({**ASKED, "bm25": [["p", 1], ["q"]]}, r'.* in "bm25", got \[\'q\'\]'),
    "bm25 score": ('{"question": "x", "answers": ["x"], "bm25": [["p", NaN]]}', r'.* in "bm25", got \[\'p\', nan\]'),
    "bm25 truth": ({**ASKED, "bm25": [["p", True]]}, r'.* in "bm25", got \[\'p\', True\]'),
    "context": ({**ASKED, "context": ""}, "have a text \"context\", got ''"),
    "contexts": ({**ASKED, "ctxs": ["x"]}, 'have a list of passages, objects with a "text", in "ctxs"'),
    "contexts' text": ({**ASKED, "ctxs": [{"id": "x"}]}, 'have a text "text", got None'),
    "title": ({**ASKED, "context": "x", "title": 5}, 'have a string as "title", got 5'),
}


@pytest.mark.parametrize("name", ["f.jsonl", "f.jsonl.gz"])
@pytest.mark.parametrize("kind", BAD_ROWS)
def test_a_malformed_row_is_named_by_its_line(tmp_path: Path, kind: str, name: str) -> None:
    row, reason = BAD_ROWS[kind]
    path = write(tmp_path / name, {"id": "a", **ASKED}, "", row, {"id": "b", **ASKED})
    with pytest.raises(InputError, match=rf"{name}:3 must {reason}") as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}:3 must ")
    assert str(caught.value).endswith("mend it, or leave out what is malformed with --skip-bad.")
    told: list[str] = []
    assert [q.id for q in read(path, skip_bad=True, on_bad=told.append)] == ["a", "b"]
    assert len(told) == 1
    assert told[0].startswith(f"{path}:3 must ")
    assert told[0].endswith("left out.")


def test_nothing_is_left_out_in_silence(tmp_path: Path) -> None:
    path = write(tmp_path / "f.jsonl", ASKED, "x")
    told: list[str] = []
    with pytest.raises(InputError, match=r"f\.jsonl:2 must be JSON"):
        read(path, on_bad=told.append)
    assert told == []
    with pytest.warns(UserWarning, match=r"f\.jsonl:2 must be JSON.*left out"):
        assert len(read(path, skip_bad=True)) == 1


def test_a_line_that_is_not_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(ASKED).encode() + b'\r\n{"question": "\xe9"}\r\n')
    with pytest.raises(InputError, match=r"f\.jsonl:2 must be JSON in UTF-8 \('utf-8' codec"):
        read(path)
    assert len(read(path, skip_bad=True, on_bad=lambda _: None)) == 1  # with a byte-order mark before the first


@pytest.mark.parametrize("name", ["f.jsonl.gz", "f.json.gz"])
def test_a_torn_file_is_never_skipped(tmp_path: Path, name: str) -> None:
    rows = [{"id": str(i), **ASKED, "noise": f"{i * 7919 % 1000003}"} for i in range(3000)]
    whole = write(tmp_path / name, *rows).read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2 : len(whole) // 2 + 64] = b"\xff" * 64
    for torn in (whole[: len(whole) // 2], whole[:-4], bytes(flipped), b"no gzip at all"):
        (tmp_path / name).write_bytes(torn)
        with pytest.raises(InputError, match=r"f\.jsonl?\.gz cannot be read.*restore the file"):
            read(tmp_path / name, skip_bad=True, on_bad=lambda _: None)


def test_files_that_hold_nothing_of_use(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="must hold at least one question, got none; check the file"):
        read(write(tmp_path / "empty.jsonl"))
    with pytest.raises(InputError, match="must hold at least one question"):
        read(write(tmp_path / "bad.jsonl", "x"), skip_bad=True, on_bad=lambda _: None)
    for text, reason in (("[{", "must be JSON in UTF-8"), ("5", "must hold a JSON list of rows, got 5")):
        (tmp_path / "f.json").write_text(text)
        with pytest.raises(InputError, match=reason):
            read(tmp_path / "f.json")
    (tmp_path / "f.json").write_text('[5, {"question": "x"}]')
    with pytest.raises(InputError, match=r"f\.json, row 1, must be a JSON object, got 5"):
        read(tmp_path / "f.json")
    (tmp_path / "f.csv").write_text("question,answer")
    with pytest.raises(InputError, match=r"f\.csv must end in \.jsonl\.gz, .*; convert or rename"):
        read(tmp_path / "f.csv")


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl"])
def test_registered_names_and_what_else_they_are_called(tmp_path: Path, suffix: str) -> None:
    for name in QUESTION_SETS:
        write(tmp_path / f"qa/{name}/test{suffix}", {"question": name, "answers": ["x"]})
        assert load_questions(name, split="test", data=tmp_path) == [
            QuestionRow(f"{name}-000001", name, ("x",), regex=name == "curatedtrec")
        ]
    for alias, name in QUESTION_ALIASES.items():
        assert load_questions(alias, split="test", data=tmp_path)[0].question == name
    assert load_questions("TriviaQA", split="test", data=tmp_path)[0].question == "triviaqa"
    assert load_questions("squad-open", split="test", data=tmp_path)[0].question == "squad_open"
    assert load_questions("curated-trec", split="test", data=tmp_path)[0].regex


def test_unknown_names_and_splits(tmp_path: Path) -> None:
    write(tmp_path / "qa/nq_open/test.jsonl", ASKED)
    write(tmp_path / "qa/nq_open/validation.jsonl", {"id": "v", **ASKED})
    assert load_questions("nq", data=tmp_path)[0].id == "v"  # dev
    with pytest.raises(ConfigError, match=r"split of nq_open must be one of test, validation \(in .*\), got 'train'"):
        load_questions("nq", split="train", data=tmp_path)
    with pytest.raises(
        ConfigError, match=r"dataset 'popqa' must be in .*popqa.dev\.jsonl\.gz .*VIST_RAG_DATA, or give"
    ):
        load_questions("popqa", data=tmp_path)
    for unknown in ("nqx", "no/such.jsonl", "", "/no/such/file", "a b/c"):
        with pytest.raises(ConfigError, match=r"dataset must be one of nq_open, triviaqa, .*or a hub id") as caught:
            load_questions(unknown, data=tmp_path)
        assert f"got {unknown!r}" in str(caught.value)
    for data in (None, tmp_path / "none"):
        with pytest.raises(
            ConfigError, match=r"dataset 'nq_open' needs the folder of the data sets.*--data DIR or VIST"
        ):
            load_questions("nq", data=data)


def test_a_directory_is_read_by_its_split(tmp_path: Path) -> None:
    write(tmp_path / "mine/dev.jsonl.gz", {"id": "d", **ASKED})
    write(tmp_path / "mine/train.json", {"id": "t", **ASKED})
    assert [q.id for q in load_questions("mine", data=tmp_path)] == ["d"]
    assert [q.id for q in load_questions(str(tmp_path / "mine"), split="train", data=None)] == ["t"]


class Column:
    """Stands for ``datasets.ClassLabel``."""

    names = ("bad", "good")


class Split(list[dict[str, Any]]):
    """Stands for ``datasets.Dataset``: rows, and what their columns are."""

    features: ClassVar[dict[str, object]] = {"text": object(), "label": Column()}


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Stands for the ``datasets`` library; what it is asked for."""
    asked: list[tuple[str, ...]] = []

    def load_dataset(*arguments: str) -> dict[str, Split]:
        asked.append(arguments)
        if arguments[0] == "no/such":
            raise FileNotFoundError("Dataset 'no/such' doesn't exist on the Hub")
        rows = Split([{"text": "fine", "label": 1, **ASKED}, {"text": "hidden", "label": -1, **ASKED}])
        return {"validation": rows, "train": Split(rows[:1])}

    def load_from_disk(path: str) -> Split:
        asked.append(("disk", path))
        return Split([{"id": "saved", **ASKED, "label": None}])

    monkeypatch.setitem(
        sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset, load_from_disk=load_from_disk)
    )
    return asked


def test_data_sets_of_the_hub(library: list[tuple[str, ...]]) -> None:
    assert [q.id for q in load_questions("owner/set:conf", data=None)] == ["set-conf-000001", "set-conf-000002"]
    assert [q.id for q in load_questions("plain:conf", split="train", data=None)] == ["plain-conf-000001"]
    assert load_labelled("owner/set", split="train", data=None) == [LabelledText("fine", "good")]
    assert library == [("owner/set", "conf"), ("plain", "conf"), ("owner/set",)]
    with pytest.raises(InputError, match=r'owner/set, row 2, must have a label in "label", got -1: this split keeps'):
        load_labelled("owner/set", split="dev", data=None)
    with pytest.raises(ConfigError, match="split of owner/set must be one of validation, train, got 'test'"):
        load_questions("owner/set", split="test", data=None)
    with pytest.raises(ConfigError, match=r"data set no/such must be one that the datasets library can load \(Dataset"):
        load_questions("no/such", data=None)


def test_directories_that_the_library_reads(library: list[tuple[str, ...]], tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text("{}")
    assert [q.id for q in read(tmp_path)] == ["saved"]
    (tmp_path / "other").mkdir()
    assert len(read(tmp_path / "other")) == 2
    assert library == [("disk", str(tmp_path)), (str(tmp_path / "other"),)]


def test_what_the_eval_extra_brings_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(MissingDependencyError, match=r"owner/set from the hub .* needs datasets.*'vist-rag\[eval\]'"):
        load_questions("owner/set", data=None)
    with pytest.raises(MissingDependencyError, match=r"Reading the directory .* needs datasets"):
        read(tmp_path)
    (tmp_path / "f.parquet").write_bytes(b"")
    with pytest.raises(MissingDependencyError, match=r"f\.parquet needs pyarrow.*'vist-rag\[eval\]'"):
        read(tmp_path / "f.parquet")


def test_parquet_files(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    row, expected = LAYOUTS["squad of the hub"]
    parquet.write_table(pyarrow.Table.from_pylist([row, {**row, "id": "s2", "question": None}]), tmp_path / "f.parquet")
    told: list[str] = []
    assert read(tmp_path / "f.parquet", skip_bad=True, on_bad=told.append) == [expected]
    assert told == [f'{tmp_path / "f.parquet"}, row 2, must have a text "question", got None; left out.']
    (tmp_path / "torn.parquet").write_bytes((tmp_path / "f.parquet").read_bytes()[:-30])
    with pytest.raises(InputError, match=r"torn\.parquet cannot be read as Parquet after row 0"):
        read(tmp_path / "torn.parquet")


def test_a_corpus_by_id(tmp_path: Path) -> None:
    write(tmp_path / "corpus/a.jsonl.gz", {"id": "p1", "title": "T", "text": "One."}, {"id": 2, "text": "Two."})
    write(tmp_path / "corpus/b.jsonl", {"id": "p3", "title": None, "text": "Three."}, {"id": 2, "text": "Two."})
    every = {"p1": Passage("One.", "p1", "T"), "2": Passage("Two.", "2"), "p3": Passage("Three.", "p3")}
    assert load_corpus(["corpus/*"], data=tmp_path) == every
    assert list(load_corpus(["corpus/b.jsonl", "corpus"], data=tmp_path)) == ["p3", "2", "p1"]
    assert load_corpus([str(tmp_path / "corpus/*.gz")], data=None).keys() == {"p1", "2"}
    assert load_corpus(["corpus/*"], data=tmp_path, wanted={"p3", "p1"}).keys() == {"p1", "p3"}
    assert load_corpus(["corpus/*"], data=tmp_path, wanted=set()) == {}


def test_reading_a_corpus_stops_where_all_are_found(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", {"id": "p1", "text": "One."}, {"id": "p2", "text": "Two."}, "torn from here")
    write(tmp_path / "b.jsonl", "torn as well")
    assert load_corpus(["*.jsonl"], data=tmp_path, wanted={"p2"}) == {"p2": Passage("Two.", "p2")}
    with pytest.raises(InputError, match=r"a\.jsonl:3 must be JSON"):
        load_corpus(["*.jsonl"], data=tmp_path, wanted={"p3"})


def test_missing_passages_are_counted_and_named(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", {"id": "p1", "text": "One."})
    with pytest.raises(
        InputError, match=r"hold the 3 passages that are asked for, 2 are missing: p2, p3; check a\.jso"
    ):
        load_corpus(["a.jsonl"], data=tmp_path, wanted={"p1", "p2", "p3"})
    with pytest.raises(InputError, match=r"40 are missing: x00, x01, x02, x03, x04, \.\.\.; check"):
        load_corpus(["a.jsonl"], data=tmp_path, wanted={f"x{i:02}" for i in range(40)})


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "x"}, 'have an "id"'),
        ({"id": "p2"}, 'have a text "text", got None'),
        ({"id": "p2", "text": "x", "title": 5}, 'have a text "title", got 5'),
        ({"id": "p1", "text": "Other."}, "have an id of its own, got 'p1', which another passage has"),
    ],
)
def test_malformed_passages(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    write(tmp_path / "a.jsonl", {"id": "p1", "text": "One."}, row)
    with pytest.raises(InputError, match=rf"a\.jsonl:2 must {reason}"):
        load_corpus(["a.jsonl"], data=tmp_path)
    told: list[str] = []
    assert list(load_corpus(["a.jsonl"], data=tmp_path, skip_bad=True, on_bad=told.append)) == ["p1"]
    assert len(told) == 1


@pytest.mark.parametrize(("load", "kind"), [(load_corpus, "corpus"), (load_texts, "texts")])
def test_patterns_that_name_no_file(load: Callable[..., Any], kind: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"{kind} 'no/\*' must match a file here or under .*, got none"):
        load(["no/*"], data=tmp_path)
    with pytest.raises(InputError, match=r"must match a file here or \(--data, VIST_RAG_DATA: not given\), got none"):
        load(["no/*"], data=None)
    with pytest.raises(ConfigError, match=rf"{kind} needs the folder of the data sets, got .*none"):
        load(["x"], data=tmp_path / "none")
    for nothing in ([], "corpus/a.jsonl"):
        with pytest.raises(ConfigError, match=f"{kind} must be a list of one or more files or patterns"):
            load(nothing, data=tmp_path)


def test_labelled_texts(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"text": "fine", "label": "good", "tone": "calm"}, {"text": "dull", "label": 0})
    assert load_labelled(str(path), split="any", data=None) == [LabelledText("fine", "good"), LabelledText("dull", "0")]
    told: list[str] = []
    assert load_labelled(
        "a.jsonl", split="x", data=tmp_path, label_field="tone", skip_bad=True, on_bad=told.append
    ) == [LabelledText("fine", "calm")]
    assert told == [f'{path}:2 must have a label in "tone", got None; left out.']
    for row in ({"text": "", "label": "x"}, {"text": "x"}, {"text": "x", "label": True}, {"text": "x", "label": " "}):
        with pytest.raises(InputError, match=r"b\.jsonl:1 must have a"):
            load_labelled(str(write(tmp_path / "b.jsonl", row)), split="x", data=None)
    with pytest.raises(InputError, match="must hold at least one row, got none"):
        load_labelled(str(write(tmp_path / "b.jsonl")), split="x", data=None)
    for text in ({"sentence": "fine", "label": "x"}, {"title": "No", "content": "fine", "label": "x"}):
        assert load_labelled(str(write(tmp_path / "b.jsonl", text)), split="x", data=None)[0].text == "fine"


def test_registered_labelled_sets_bring_their_field(tmp_path: Path) -> None:
    row = {"text": "x", "label": "plain", "scenario": "scene", "label_fine": "fine"}
    for folder in {folder for folder, _ in LABELLED_SETS.values()}:
        write(tmp_path / f"icl/{folder}/test.jsonl.gz", row)
    fields = {"nlus": "scene", "nlui": "plain", "tref": "fine", "trec": "plain", "agn": "plain", "BANK": "plain"}
    for name, label in fields.items():
        assert load_labelled(name, split="test", data=tmp_path) == [LabelledText("x", label)], name
    assert load_labelled("trec", split="test", data=tmp_path, label_field="scenario")[0].label == "scene"
    with pytest.raises(ConfigError, match="split of mr must be one of test"):
        load_labelled("mr", split="dev", data=tmp_path)
    with pytest.raises(ConfigError, match=r"labelled dataset must be one of sst2, mr, .*got 'imdb'"):
        load_labelled("imdb", split="test", data=tmp_path)


def test_texts_of_files_and_of_rows(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Plain\ntext.\n")
    (tmp_path / "b.md").write_text("# Head\n\nText.")
    write(
        tmp_path / "c.jsonl.gz",
        {"id": "x-1", "title": "T", "text": "One."},
        {"id": "x-2", "title": "T", "text": "Two."},
        {"id": "y-1", "title": "U", "text": "Three."},
        {"id": "x-3", "title": "T", "text": "Four."},  # not a neighbour any more
        {"id": "v-w_1", "text": "Five."},
        {"id": "v-w_2", "title": "", "text": "Six."},
        {"id": "v-z_1", "text": "Seven."},
        {"text": "Eight."},
        {"text": "Nine."},
        {"id": "plain", "text": "Ten."},
    )
    rows = ["One. Two.", "Three.", "Four.", "Five. Six.", "Seven.", "Eight.", "Nine.", "Ten."]
    assert load_texts(["c.jsonl.gz"], data=tmp_path) == rows
    assert load_texts([str(tmp_path)], data=None) == ["Plain\ntext.\n", "# Head\n\nText.", *rows]
    assert load_texts(["b.md", "*.txt", "a.txt"], data=tmp_path) == ["# Head\n\nText.", "Plain\ntext.\n"]


def test_texts_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "good.txt").write_text("Good.")
    write(tmp_path / "rows.jsonl", {"text": "One."}, {"title": "x"})
    with pytest.raises(InputError, match=r"empty\.txt must hold text, got an empty file"):
        load_texts(["*.txt"], data=tmp_path)
    with pytest.raises(InputError, match=r'rows\.jsonl:2 must have a text "text", got None'):
        load_texts(["rows.jsonl"], data=tmp_path)
    told: list[str] = []
    assert load_texts(["*.txt", "*.jsonl"], data=tmp_path, skip_bad=True, on_bad=told.append) == ["Good.", "One."]
    assert len(told) == 2
    with pytest.raises(InputError, match=r"empty\.txt must hold at least one text, got none"):
        load_texts(["empty.txt"], data=tmp_path, skip_bad=True, on_bad=told.append)
    (tmp_path / "x.csv").write_text("x")
    with pytest.raises(ConfigError, match=r"x\.csv must end in one of \.txt, \.md, \.jsonl\.gz"):
        load_texts(["x.csv"], data=tmp_path)
    (tmp_path / "x.txt").write_bytes(b"a\0b")
    with pytest.raises(InputError, match=r"x\.txt is a binary file"):
        load_texts(["x.txt"], data=tmp_path)


@pytest.mark.data
@pytest.mark.parametrize("name", QUESTION_SETS)
def test_real_questions(data_dir: Path, name: str) -> None:
    files = sorted((data_dir / "qa" / name).glob("*.jsonl*"))
    if not files:
        pytest.skip(f"the data sets have no qa/{name}")
    for file in files:
        questions = load_questions(name, split=file.name.partition(".")[0], data=data_dir)
        assert len(questions) > 100
        assert len({q.id for q in questions}) == len(questions)
        assert all(q.question.strip() and q.answers and all(a.strip() for a in q.answers) for q in questions)
        assert all(q.regex is (name == "curatedtrec") for q in questions)
        assert sum(len(q.bm25) == 20 for q in questions) > 0.9 * len(questions)
        assert all(a[1] >= b[1] for q in questions for a, b in zip(q.bm25, q.bm25[1:], strict=False))
        if name in ("squad_open", "entityquestions"):
            assert all(q.gold for q in questions)


@pytest.mark.data
def test_real_gold_passages_hold_an_answer(data_dir: Path) -> None:
    from vist_rag.evaluation.metrics import holds_answer

    questions = load_questions("squad_open", split="test", data=data_dir)
    corpus = load_corpus(["corpus/*.jsonl.gz"], data=data_dir, wanted={id_ for q in questions for id_ in q.gold})
    held = [holds_answer(corpus[q.gold[0]].content, q.answers) for q in questions]
    assert sum(held) > 0.95 * len(held)


@pytest.mark.data
def test_real_reader_questions(data_dir: Path) -> None:
    questions = load_questions("reader/distant.dev.jsonl.gz#ds_nq_open", data=data_dir)
    assert 0 < len(questions) < len(load_questions("reader/distant.dev.jsonl.gz", data=data_dir))
    assert all(q.context is not None and q.context.text and q.context.title for q in questions)


@pytest.mark.data
@pytest.mark.parametrize(
    "name", [name for name, (folder, _) in LABELLED_SETS.items() if folder != name or len(name) < 5]
)
def test_real_labelled_texts(data_dir: Path, name: str) -> None:
    files = sorted((data_dir / "icl" / LABELLED_SETS[name][0]).glob("*.jsonl*"))
    if not files:
        pytest.skip(f"the data sets have no icl/{LABELLED_SETS[name][0]}")
    labels = {}
    for file in files:
        split = file.name.partition(".")[0]
        told: list[str] = []
        rows = load_labelled(name, split=split, data=data_dir, skip_bad=True, on_bad=told.append)
        assert len(rows) > 400
        assert len(told) < 10  # a few empty reviews
        labels[split] = {row.label for row in rows}
    assert labels["test"] <= labels["train"]
    assert len(labels["train"]) >= 2


@pytest.mark.data
def test_real_texts(data_dir: Path) -> None:
    texts = load_texts(["text/wikitext2_heldout.jsonl.gz"], data=data_dir)
    assert len(texts) > 10
    assert sum(len(text.split()) for text in texts) / len(texts) > 300  # rows of about 90 words, joined by article
