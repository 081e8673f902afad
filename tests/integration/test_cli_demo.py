"""``vist-rag demo``: the bundled corpus from memory, and its evaluation, on a tiny model that answers nothing right."""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.cli import failure, run, run_json, word_embedder
from tests.support.tiny import save_tiny_checkpoint
from vist_rag.evaluation import demo
from vist_rag.retrieval import PassageIndex
from vist_rag.types import Passage

ASKED = 4


@pytest.fixture(scope="module", autouse=True)
def _embedder() -> Iterator[None]:
    with word_embedder():
        yield


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> dict[str, Any]:
    """The first run, which makes the index that the other tests read."""
    index = tmp_path_factory.mktemp("demo") / "index"
    return run_json("demo", "--index", index, "--model", tiny, "--questions", ASKED) | {"directory": index}


def test_every_passage_is_compressed_and_kept(first: dict[str, Any]) -> None:
    passages = demo.demo_passages()
    assert first["index"]["passages"] == first["index"]["memories_made"] == len(passages) >= 240
    with PassageIndex.open(first["directory"], read_only=True) as index:
        assert {p.id: p.text for p in index.passages()} == {p.id: p.text for p in passages}
        assert index.fingerprints() == {first["index"]["fingerprint"]: len(passages)}


def test_development_questions_are_answered_from_memory_alone(first: dict[str, Any]) -> None:
    known = {q.id: q for q in demo.demo_questions("dev")}
    assert len({row["id"] for row in first["questions"]}) == ASKED
    for row in first["questions"]:
        assert row["question"] == known[row["id"]].question
        assert row["expected"] == list(known[row["id"]].answers)
        assert [c["mode"] for c in row["citations"]] == ["memory", "memory"]
        assert row["right"] == (row["answer"].lower() in [a.lower() for a in row["expected"]])
        assert row["gold_retrieved"] == (known[row["id"]].passage_id in [c["id"] for c in row["citations"]])
        assert row["usage"]["ratio"] > 2.3
        assert row["timings_ms"]["total"] > 0


def test_the_summary_is_that_of_the_questions(first: dict[str, Any]) -> None:
    rows, summary = first["questions"], first["summary"]
    assert summary["questions"] == ASKED
    assert summary["right"] == sum(row["right"] for row in rows)
    origin, compressed = (
        statistics.mean(row["usage"][key] for row in rows) for key in ("origin_tokens", "compressed_tokens")
    )
    assert summary["origin_tokens"] == pytest.approx(origin, abs=0.1)
    assert summary["ratio"] == pytest.approx(origin / compressed, abs=0.01)


def test_a_second_run_finds_the_memories(first: dict[str, Any], tiny: Path) -> None:
    result = run("demo", "--index", first["directory"], "--model", tiny, "--questions", 1)
    assert result.exit_code == 0
    assert "309 passages indexed, 0 compressed to memory" in " ".join(result.stdout.split())
    assert "right answers" in result.stdout
    assert "ratio" in result.stdout


def test_an_index_with_other_passages_is_left_alone(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("The old bridge was built in 1867.")
    run_json("index", tmp_path / "a.txt", "--index", tmp_path / "index", "--no-memory")
    assert "holds other passages" in failure("demo", "--index", tmp_path / "index", "--model", tiny)
    with PassageIndex.open(tmp_path / "index", read_only=True) as index:
        assert len(index) == 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--questions", 0], "--questions must be in 1.."),
        (["--questions", 10_000], "--questions must be in 1.."),
        (["--eval", "--split", "train"], "split must be one of dev, test, got 'train'"),
        (["--eval", "--latents", "8,many"], "--latents must be numbers"),
        (["--eval", "--latents", "0"], "--latents must be numbers"),
        (["--eval", "--rows", "/nowhere/rows.jsonl"], "make the directory first"),
        (["--model", "nobody/nothing"], "nobody/nothing"),
    ],
)
def test_bad_input_is_told(arguments: list[object], told: str) -> None:
    assert told in failure("demo", *arguments)


# ---------------------------------------------------------------------------------------------------------- measuring


@pytest.fixture(scope="module")
def measured(
    tmp_path_factory: pytest.TempPathFactory, tiny: Path, first: dict[str, Any]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """An evaluation of four questions: the whole split takes minutes."""
    rows = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    some = demo.demo_questions("dev")[::40][:ASKED]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "demo_questions", lambda _: some)
        arguments = ("--index", first["directory"], "--model", tiny, "--latents", "16,4", "--rows", rows)
        report = run_json("demo", "--eval", "--split", "dev", *arguments)
    return report, [json.loads(line) for line in rows.read_text().splitlines()]


def test_figures_come_with_what_is_needed_to_make_them_again(measured: tuple[dict[str, Any], Any]) -> None:
    report, _ = measured
    assert {"date", "command", "seed", "commit", "versions", "machine", "split", "questions"} <= set(report)
    assert report["questions"] == ASKED
    assert (report["top_k"], report["latents"]) == (2, 16)


def test_every_condition_is_measured_on_every_question(measured: tuple[dict[str, Any], list[dict[str, Any]]]) -> None:
    report, rows = measured
    assert list(report["open_domain"]) == ["memory", "raw", "closed_book", "shuffled_memory"]
    assert list(report["gold_passage"]) == ["memory", "raw", "shuffled_memory"]
    assert list(report["elastic"]) == ["16", "4"]
    assert len(rows) == ASKED * (demo.RUNS + 2)
    for group in ("open_domain", "gold_passage", "elastic"):
        for name, figures in report[group].items():
            condition = f"memory@{name}" if group == "elastic" else f"{name}@16" if "memory" in name else name
            some = [row for row in rows if (row["group"], row["condition"]) == (group, condition)]
            assert len(some) == ASKED
            assert figures["f1"] == pytest.approx(statistics.mean(row["f1"] for row in some), abs=1e-4)


def test_tokens_are_those_of_the_passages_that_were_read(measured: tuple[dict[str, Any], Any]) -> None:
    report, _ = measured
    found, gold, elastic = report["open_domain"], report["gold_passage"], report["elastic"]
    assert found["closed_book"]["compressed_tokens"] == 0
    assert gold["memory"]["compressed_tokens"] < found["memory"]["compressed_tokens"]
    assert elastic["4"]["compressed_tokens"] < elastic["16"]["compressed_tokens"]
    assert elastic["16"]["compressed_tokens"] == found["memory"]["compressed_tokens"]
    # Two raw passages do not fit the 512 positions of the tiny model.
    assert found["raw"]["passages_read"] < 2
    assert found["memory"]["ratio"] > 2.3


def test_recall_is_that_of_the_search(measured: tuple[dict[str, Any], Any], first: dict[str, Any]) -> None:
    report, _ = measured
    questions = demo.demo_questions("dev")[::40][:ASKED]
    with PassageIndex.open(first["directory"], read_only=True) as index:
        best = [[hit.passage.id for hit in index.search(q.question, 2)] for q in questions]
    for k in (1, 2):
        expected = sum(q.passage_id in ids[:k] for q, ids in zip(questions, best, strict=True)) / ASKED
        assert report["recall"][str(k)] == expected


def test_an_evaluation_on_the_screen(
    tiny: Path, first: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    some = demo.demo_questions("test")[::60][:2]
    monkeypatch.setattr(demo, "demo_questions", lambda _: some)
    shutil.copytree(first["directory"], tmp_path / "index")
    result = run("demo", "--eval", "--index", tmp_path / "index", "--model", tiny, "--latents", "4")
    assert result.exit_code == 0
    for name in ("memory", "raw text", "closed book", "shuffled memory", "latents a passage"):
        assert name in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_an_index_without_the_corpus_cannot_be_evaluated(tiny: Path, tmp_path: Path) -> None:
    from vist_rag.errors import ConfigError
    from vist_rag.pipeline import VistRAG

    with PassageIndex.open(tmp_path / "index") as index:
        index.add([Passage("The old bridge."), Passage("The river.")])
        with pytest.raises(ConfigError, match="must hold the bundled corpus"):
            demo.evaluate_demo(VistRAG.from_pretrained(tiny, index))
