"""``benchmarks/gold_passages.py`` on a small folder of the layout that it reads, with a tiny model."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gold_passages import command_line, main, parse, read_questions
from tests.support.tiny import save_tiny_checkpoint

TEXTS = {
    "sq0": "The old bridge was built in 1867.",
    "sq1": "The river runs to the sea.",
    "nq0": "Marie Curie was born in Warsaw.",
    "nq2": "The harbour bell is rung at noon.",
    "nq1": "The lake is old. " * 150,  # as raw text, too long for the tiny model
}


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def _question(id_: str, **more: Any) -> dict[str, Any]:
    return {"id": f"q-{id_}", "question": f"What is {id_}?", "answers": ["the bridge"], **more}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    data = tmp_path / "data"
    corpus = [{"id": id_, "title": id_.upper(), "text": text} for id_, text in TEXTS.items()]
    _write(data / "corpus" / "a.jsonl.gz", corpus[:4])
    _write(data / "corpus" / "b.jsonl.gz", corpus[4:])
    _write(data / "qa/squad_open/test.jsonl.gz", [_question("a", gold="sq0"), _question("b", gold="sq1")])
    nq = [_question(id_, gold=gold) for id_, gold in (("c", "nq0"), ("d", "nq1"), ("e", "nq2"))]
    _write(data / "qa/nq_open/test.jsonl.gz", [*nq, _question("f")])
    rows = [_question(str(i), title="T", context=f"Passage {i} is about the bridge.") for i in range(5)]
    _write(data / "reader/squad.dev.jsonl.gz", rows)
    ids = ("ds_nq_open_dev_1", "ds_webq_train_1", "ds_nq_open_dev_2")
    _write(data / "reader/distant.dev.jsonl.gz", [row | {"id": id_} for row, id_ in zip(rows, ids, strict=False)])
    return data


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


def test_test_questions_come_with_their_gold_passage(data: Path) -> None:
    questions = read_questions(data, "nq_open", "test", None)
    assert [(q.id, q.passages[0].id, q.passages[0].text) for q in questions] == [
        ("q-c", "nq0", TEXTS["nq0"]),
        ("q-d", "nq1", TEXTS["nq1"]),
        ("q-e", "nq2", TEXTS["nq2"]),
    ]  # q-f has no gold passage


def test_development_questions_are_those_of_the_reader_sets(data: Path) -> None:
    assert [q.id for q in read_questions(data, "nq_open", "dev", None)] == ["ds_nq_open_dev_1", "ds_nq_open_dev_2"]
    contents = [q.passages[0].content for q in read_questions(data, "squad_open", "dev", None)]
    assert contents == [f"T: Passage {i} is about the bridge." for i in range(5)]


def test_a_sample_is_the_same_each_time(data: Path) -> None:
    some = [q.id for q in read_questions(data, "squad_open", "dev", 3)]
    assert len(some) == 3
    assert some == sorted(some)
    assert some == [q.id for q in read_questions(data, "squad_open", "dev", 3)]


def test_memory_and_raw_stand_beside_their_controls(
    data: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, rows = tmp_path / "figures.json", tmp_path / "rows.jsonl"
    arguments = ["--data", str(data), "--split", "test", "--model", str(tiny), "--json"]
    assert main([*arguments, "--output", str(output), "--rows", str(rows)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads(output.read_text())
    assert {"date", "seed", "commit", "versions", "machine", "fingerprint"} <= set(report)
    assert report["command"] == "python benchmarks/gold_passages.py --data DIR --split test --model MODEL --json"
    squad, nq = report["sets"]["squad_open"], report["sets"]["nq_open"]
    assert (squad["questions"], squad["left_out"]) == (2, 0)
    assert (nq["questions"], nq["left_out"]) == (2, 1)
    for figures in (squad, nq):
        assert {"memory", "raw", "closed_book", "shuffled_memory"} <= set(figures)
        assert figures["raw"]["ratio"] == 1.0
        assert figures["closed_book"]["compressed_tokens"] == 0
    assert len(rows.read_text().splitlines()) == 4 * 4


def test_the_screen_shows_a_table(data: Path, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--data", str(data), "--model", str(tiny), "--limit", "2"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("dev questions with their gold passage")
    assert "squad_open: 2 questions, 0 left out" in shown
    assert "shuffled_memory" in shown


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        ("qa/squad_open/test.jsonl.gz", "cannot be read as gzipped JSON lines"),
        ("corpus/a.jsonl.gz", "lacks 2 gold passages, such as sq0"),
    ],
)
def test_missing_data_is_told(data: Path, broken: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    (data / broken).unlink()
    assert main(["--data", str(data), "--split", "test"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert told in captured.err


def test_torn_data_is_told(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = data / "reader/squad.dev.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-10])
    assert main(["--data", str(data)]) == 2
    assert "check --data" in capsys.readouterr().err


def test_bad_options_are_told(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--data", str(data), "--limit", "0"]) == 2
    assert main(["--data", str(data), "--output", str(tmp_path / "nowhere" / "x.json")]) == 2
    assert main(["--data", str(data), "--model", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("error: ") == 3


def test_the_recorded_command_names_no_path_of_this_machine(data: Path) -> None:
    options = parse(["--data", str(data), "--limit", "9", "--output", "x.json"])
    assert command_line(options) == "python benchmarks/gold_passages.py --data DIR --split dev --limit 9 --json"
