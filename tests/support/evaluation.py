"""A tiny model to evaluate, and questions on a made-up village."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.support.tiny import tiny_compressor, tiny_generator
from vist_rag.evaluation.methods import Asked, EvalModel
from vist_rag.generation import PromptTemplate
from vist_rag.types import Passage

PASSAGES = (
    Passage("The old bridge was built in 1867. The river runs from a lake to the sea.", "bridge", "Bridge"),
    Passage("Marie was born by the lake, and the answer to the old question is the sea.", "marie", "Marie"),
    Passage("The document was built in the lake by the river and the bridge.", "document"),
    Passage("In 1867 the old sea runs to the bridge, and the lake was born.", "sea", "Sea"),
)


def tiny_model(seed: int = 0) -> EvalModel:
    generator = tiny_generator(seed)
    return EvalModel(tiny_compressor(seed), generator, PromptTemplate(), 4, (), f"tiny {seed}")


def with_context(model: EvalModel, positions: int) -> EvalModel:
    """The same model, with a smaller context."""
    model.generator.model.config.max_position_embeddings = positions
    return replace(model)


def asked(n: int = 4, passages: int = 1) -> list[Asked]:
    ring = PASSAGES * 2
    return [
        Asked(f"q{i}", f"was the {word} built?", ring[i : i + passages])
        for i, word in enumerate(("bridge", "lake", "sea", "river")[:n])
    ]


def write_data(folder: Path) -> Path:
    """A folder of data sets: questions with BM25 lists and gold passages, their corpus, labelled texts, long texts."""
    (folder / "qa" / "squad_open").mkdir(parents=True)
    (folder / "corpus").mkdir()
    (folder / "icl" / "sst2").mkdir(parents=True)
    write_rows(folder / "corpus" / "village.jsonl", [{"id": p.id, "title": p.title, "text": p.text} for p in PASSAGES])
    ids = [p.id for p in PASSAGES]
    questions = [
        ("bridge", "when was the old bridge built?", ["1867", "in 1867"]),
        ("marie", "where was marie born?", ["by the lake"]),
        ("document", "what was built by the river?", ["the document"]),
        ("sea", "what runs to the bridge?", ["the old sea"]),
    ]
    rows = []
    for i, (gold, question, answers) in enumerate(questions):
        ranked = [gold, *(id_ for id_ in ids if id_ != gold)] if i % 2 else [*(d for d in ids if d != gold), gold]
        bm25 = [[id_, 9.0 - j] for j, id_ in enumerate(ranked)]
        rows.append({"id": f"v{i}", "question": question, "answers": answers, "gold": gold, "bm25": bm25})
    write_rows(folder / "qa" / "squad_open" / "dev.jsonl", rows)
    labelled = [
        {"text": f"{word} {noun}", "label": label}
        for label, words in (("good_old", ("old", "the old")), ("built", ("built", "was built")))
        for word in words
        for noun in ("bridge", "lake", "sea", "river")
    ]
    write_rows(folder / "icl" / "sst2" / "train.jsonl", labelled)
    write_rows(folder / "icl" / "sst2" / "test.jsonl", labelled[::3])
    (folder / "long.txt").write_text(" ".join(p.text for p in PASSAGES * 6))
    return folder


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
