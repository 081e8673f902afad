"""A miniature run of every task: rows, figures, resumption, and what is refused."""

from __future__ import annotations

import json
import math
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.evaluation import PASSAGES, tiny_model, with_context, write_data, write_rows
from vist_rag.errors import ConfigError, InputError
from vist_rag.evaluation import harness
from vist_rag.evaluation.datasets import LabelledText
from vist_rag.evaluation.harness import blocks_of, cells_of, load_recipe, make_task, run_block
from vist_rag.evaluation.icl import balanced
from vist_rag.evaluation.methods import EvalModel, make_method
from vist_rag.evaluation.results import Cell, RowFile
from vist_rag.evaluation.task import Reading
from vist_rag.generation import SoftPromptFusion

METHODS = ["closed_book", "raw", "truncated", "frequency", "memory", "slow_fast", "shuffled_memory", "blank_memory"]
QA: dict[str, Any] = {"task": "qa", "dataset": "squad_open", "corpus": ["corpus/village.jsonl"], "name": "village"}


@pytest.fixture(scope="module")
def model() -> EvalModel:
    return tiny_model()


@pytest.fixture
def reading(tmp_path: Path) -> Reading:
    return Reading(write_data(tmp_path / "data"), tmp_path / "out", tell=lambda _: None)


@contextmanager
def silent(_: str, __: int):
    yield lambda n: None


def run(block: dict[str, Any], model: EvalModel, reading: Reading, **trained: EvalModel) -> dict[str, Any]:
    path = run_block(block, model, trained, reading, command="test", progress=silent, batch_size=3)
    return json.loads(path.read_text())


def rows_of(reading: Reading, name: str = "village") -> list[dict[str, Any]]:
    lines = (reading.output / f"{name}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines[1:]]


def test_questions_by_every_method_at_every_rate(model: EvalModel, reading: Reading) -> None:
    block = {**QA, "passages": "bm25", "top_k": 2, "methods": [*METHODS, "mean_pool"], "rates": [1.0, 3.0]}
    block["methods"] = [m for m in block["methods"] if m != "shuffled_memory"]  # four passages, two each: all overlap
    result = run(block, model, reading, mean_pool=tiny_model(5))
    rows = rows_of(reading)
    assert len(rows) == 4 * (1 + 1 + 6 * 2)
    by_cell = {(c["method"], c["rate"]): c for c in result["cells"]}
    assert set(by_cell) == {("closed_book", None), ("raw", 1.0)} | {
        (m, r) for m in block["methods"] if m not in ("closed_book", "raw") for r in (1.0, 3.0)
    }
    for row in rows:
        assert all(row[key] for key in ("passages", "answers", "question"))
        if row["rate"] is not None:
            assert row["compressed_tokens"] <= row["origin_tokens"] / row["rate"]
    for (method, rate), cell in by_cell.items():
        own = [r for r in rows if (r["method"], r["rate"]) == (method, rate)]
        assert cell["em"] == pytest.approx(sum(r["em"] for r in own) / 4)
        assert cell["compressed_tokens"] == pytest.approx(sum(r["compressed_tokens"] for r in own) / 4)
    assert by_cell["closed_book", None]["compressed_tokens"] == 0
    assert by_cell["memory", 1.0]["memory_bytes"] > 0 == by_cell["raw", 1.0]["memory_bytes"]
    # v1 and v3 have their passage first, the others last of four
    assert result["retrieval"]["recall"] == {"1": 0.5, "2": 0.5}
    pairs = {(p["method"], p["rate"], p["against"]) for p in result["paired"]}
    assert ("mean_pool", 3.0, "memory") in pairs
    assert ("memory", 3.0, "raw") in pairs
    assert ("blank_memory", 1.0, "closed_book") in pairs
    assert result["models"]["mean_pool"]["sha256"] == "tiny 5"
    for key in ("seed", "commit", "versions", "machine", "command", "date"):
        assert key in result


def test_gold_and_distant_passages(model: EvalModel, reading: Reading) -> None:
    gold = make_task({**QA, "passages": "gold"}, model, reading)
    assert [[p.id for p in one.passages] for one in gold.asked] == [["bridge"], ["marie"], ["document"], ["sea"]]
    assert gold.facts["retrieval"]["recall"] == {"1": 1.0}
    distant = make_task({**QA, "passages": "distant"}, model, reading)
    # "1867" and "the lake" stand in other passages, too: the first of the list that holds the answer
    assert [one.passages[0].id for one in distant.asked] == ["sea", "marie", "document", "sea"]
    few = make_task({**QA, "passages": "gold", "limit": 2, "seed": 1}, model, reading)
    assert len(few.asked) == 2
    assert [a.id for a in few.asked] == [a.id for a in make_task({**QA, "limit": 2, "seed": 1}, model, reading).asked]


def test_passages_that_our_index_finds(model: EvalModel, reading: Reading) -> None:
    told: list[str] = []
    reading = replace(reading, tell=told.append)
    task = make_task({**QA, "passages": "index", "top_k": 2}, model, reading)
    assert [len(one.passages) for one in task.asked] == [2, 2, 2, 2]
    assert task.facts["retrieval"]["recall"]["2"] >= task.facts["retrieval"]["recall"]["1"] > 0
    assert told == ["indexing 4 passages"]
    again = make_task({**QA, "passages": "index", "top_k": 2}, model, reading)
    assert again.asked == task.asked
    assert len(told) == 1  # kept with the results
    (made,) = reading.output.glob("index-*")
    mine = make_task({**QA, "passages": "index", "index": str(made), "corpus": ["nothing"]}, model, reading)
    assert [one.passages[0].id for one in mine.asked] == [one.passages[0].id for one in task.asked]


def test_a_stopped_run_goes_on_and_loses_the_batch_under_way_at_most(
    model: EvalModel, reading: Reading, monkeypatch
) -> None:
    block = {**QA, "methods": ["raw", "memory"], "rates": [1.0, 2.0]}
    whole = run({**block, "name": "whole"}, model, reading)
    asked = 0
    generate = model.generator.generate

    def dying(prompts, **options):
        nonlocal asked
        asked += len(prompts)
        if asked > 5:
            raise KeyboardInterrupt
        return generate(prompts, **options)

    monkeypatch.setattr(model.generator, "generate", dying)
    with pytest.raises(KeyboardInterrupt):
        run(block, model, reading)
    kept = rows_of(reading)
    assert len(kept) == 4  # batches of 3 and 1; the second of the next cell's was under way
    path = reading.output / "village.jsonl"
    path.write_bytes(path.read_bytes()[:-7])  # torn by the crash: the last row is lost
    asked = -100
    result = run(block, model, reading)
    sizes = [{r["id"]: r["prompt_tokens"] for r in rows_of(reading) if r["rate"] == rate} for rate in (1.0, 2.0)]
    memories = {r["id"]: r["prompt_tokens"] for r in rows_of(reading) if r["method"] == "memory" and r["rate"] == 1.0}
    same = sum(memories[id_] == sizes[1][id_] for id_ in memories)  # the same prompt at both rates: answered once
    assert 0 < same < 4
    assert asked == -100 + 12 - 3 - same
    assert rows_of(reading)[:3] == kept[:3]
    strip = ("ms",)
    assert [{k: v for k, v in c.items() if k not in strip} for c in result["cells"]] == [
        {k: v for k, v in c.items() if k not in strip} for c in whole["cells"]
    ]
    asked = 0
    run(block, model, reading)
    assert asked == 0  # all is there


def test_rows_of_another_setting_are_not_mixed(model: EvalModel, reading: Reading) -> None:
    block = {**QA, "methods": ["raw"]}
    run(block, model, reading)
    with pytest.raises(ConfigError, match=r"asked: 4, not 2.*another --output"):
        run({**block, "limit": 2}, model, reading)
    with pytest.raises(ConfigError, match="another --output"):
        run(block, tiny_model(9), reading)
    run({**block, "methods": ["raw", "memory"]}, model, reading)  # a method more is welcome
    assert {row["method"] for row in rows_of(reading)} == {"raw", "memory"}


def test_a_torn_first_line_is_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"format": "vist-rag-ev')
    rows = RowFile(path, {"a": 1})
    rows.append([{"method": "raw", "rate": None, "tokens": None, "id": "q"}])
    assert RowFile(path, {"a": 1}).done == {("raw", None, None, "q")}


def test_questions_that_leave_no_room_are_left_out_and_counted(reading: Reading) -> None:
    small = with_context(tiny_model(), 80)
    path = reading.data / "qa" / "squad_open" / "dev.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0]["question"] = "the river " * 60
    write_rows(path, rows)
    result = run({**QA, "methods": ["memory", "raw"], "rates": [1.0]}, small, reading)
    assert (result["questions"], result["left_out"]) == (3, 1)
    assert all(row["prompt_tokens"] + 4 <= 80 for row in rows_of(reading))
    with pytest.raises(InputError, match="no question of 4 leaves room"):
        run({**QA, "name": "none", "methods": ["raw"]}, with_context(tiny_model(), 20), reading)


def test_a_budget_in_tokens(model: EvalModel, reading: Reading) -> None:
    block = {**QA, "methods": ["memory", "truncated"], "tokens": [16]}
    run(block, model, reading)
    assert {row["tokens"] for row in rows_of(reading)} == {16}
    assert all(row["compressed_tokens"] <= 16 for row in rows_of(reading))
    with pytest.raises(ConfigError, match=r"tokens must be \d+ or more \(one latent of one passage\), got 2"):
        run({**block, "name": "less", "tokens": [2]}, model, reading)


def test_in_context_learning(model: EvalModel, reading: Reading) -> None:
    block = {"task": "icl", "dataset": "sst2", "n_text": 2, "n_memory": 6, "seeds": [42, 43], "limit": 4}
    block |= {"name": "village", "methods": ["closed_book", "raw", "memory"], "rates": [1.0], "top_k": 1}
    result = run(block, model, reading)
    assert result["metrics"] == ["accuracy"]
    assert result["labels"] == 2
    rows = rows_of(reading)
    assert len(rows) == 2 * 4 * 3
    assert {row["prediction"] for row in rows} <= {"built", "good_old"}
    assert {row["id"].split("-")[0] for row in rows} == {"42", "43"}
    # The likeliest label, by hand: the prompt and the label in one pass, scored without a cache.
    task = make_task(block, model, reading)
    own = task.adapt(model)
    one = task.asked[0]
    prompt = own.template.build(one.question, one.passages, [])
    scores = {}
    for label in ("built", "good old"):
        ids = own.generator.tokenize(f" {label}")
        with torch.no_grad(), own.generator.fusion.condition(own.generator, [prompt]) as inputs:
            embeds = torch.cat((inputs["inputs_embeds"], own.generator.model.get_input_embeddings()(ids)[None]), dim=1)
            length = inputs["inputs_embeds"].shape[1]
            shown = torch.nn.functional.pad(inputs["shown"], (0, 0, 0, len(ids)), value=-1)
            logits = own.generator.model(
                inputs_embeds=embeds, prefix_mask=(torch.arange(embeds.shape[1]) < length)[None], shown=shown
            ).logits[0]
        scores[label] = float(logits[length - 1 : -1].log_softmax(-1).gather(1, ids[:, None]).sum())
    (row,) = [r for r in rows if r["id"] == one.id and r["method"] == "raw"]
    assert row["prediction"].replace("_", " ") == max(scores, key=scores.__getitem__)


def test_demonstrations_are_balanced_and_seeded() -> None:
    rows = [LabelledText(f"{label} {i}", label) for label, n in (("a", 50), ("b", 9), ("c", 9)) for i in range(n)]
    drawn = balanced(rows, 20, 42)
    counts = sorted(sum(row.label == label for row in drawn) for label in "abc")
    assert counts == [6, 7, 7]
    assert drawn == balanced(rows, 20, 42) != balanced(rows, 20, 43)
    assert len({row.text for row in drawn}) == 20
    with pytest.raises(InputError, match="at most the 68 training rows, got 69"):
        balanced(rows, 69, 42)


def test_language_modelling(model: EvalModel, reading: Reading) -> None:
    block = {"task": "lm", "texts": ["long.txt"], "encoded_tokens": 60, "text_tokens": 40, "scored": 12}
    block |= {"passage_tokens": 25, "name": "village", "methods": ["closed_book", "raw", "memory"], "top_k": 1}
    result = run(block, model, reading)
    assert result["lower_is_better"] == ["perplexity"]
    rows = [row for row in rows_of(reading) if row["method"] == "raw"]
    cell = next(c for c in result["cells"] if c["method"] == "raw")
    assert len(rows) == result["questions"] >= 2
    assert all(row["scored_tokens"] == 12 for row in rows)
    mean = sum(row["nll"] for row in rows) / (12 * len(rows))
    assert cell["perplexity"] == pytest.approx(math.exp(mean), rel=1e-3)
    task = make_task(block, model, reading)
    text = (reading.data / "long.txt").read_text()
    one = task.asked[0]
    joined = "".join(p.text for p in reversed(one.passages)) + one.question
    assert text.startswith(joined)
    assert len(one.passages) == 3  # 60 tokens in parts of 25
    with pytest.raises(InputError, match="texts must hold one of 5000 tokens"):
        make_task({**block, "encoded_tokens": 4960}, model, reading)
    with pytest.raises(ConfigError, match="text_tokens more than scored"):
        make_task({**block, "text_tokens": 12}, model, reading)


def test_what_is_scored_fits_although_it_takes_more_tokens_when_cut_out(reading: Reading) -> None:
    # Letters are tokens here, and only the first of a word is one without "##": cut out, "ridges" begins a word.
    (reading.data / "long.txt").write_text("oldbridges " * 60)
    small = with_context(tiny_model(), 90)
    block = {"task": "lm", "texts": ["long.txt"], "encoded_tokens": 70, "text_tokens": 23, "scored": 11}
    block |= {"name": "village", "methods": ["truncated"], "rates": [1.0], "top_k": 1}
    task = make_task(block, small, reading)
    lengths = {task.answer_tokens(one) for one in task.asked}
    run(block, small, reading)
    rows = rows_of(reading)
    assert {row["scored_tokens"] for row in rows} == lengths
    assert all(row["prompt_tokens"] + row["scored_tokens"] <= 90 for row in rows)


def test_blocks_of_a_recipe_are_named_and_spread() -> None:
    recipe = {"seed": 3, "limit": 9, "blocks": [{**QA, "name": "a-k{k}", "top_k": [1, 5]}, {"task": "lm", "seed": 4}]}
    first, second, third = blocks_of(recipe)
    assert [b["name"] for b in (first, second, third)] == ["a-k1", "a-k5", "lm-2048+2048"]
    assert (first["seed"], first["limit"], first["top_k"], second["top_k"], third["seed"]) == (3, 9, 1, 5, 4)
    with pytest.raises(ConfigError, match="names of their own"):
        blocks_of({"blocks": [QA, QA]})


def test_a_block_is_spread_over_sets_and_numbers_of_demonstrations() -> None:
    block = {
        "task": "icl",
        "name": "two-{default}",
        "dataset": ["sst2", "mr"],
        "n_memory": [18, 48],
        "methods": ["raw"],
    }
    found = blocks_of({"blocks": [block, {"task": "lm", "encoded_tokens": [9, 8], "text_tokens": 7}]})
    assert [(b.get("dataset"), b.get("n_memory")) for b in found[:4]] == [
        ("sst2", 18), ("sst2", 48), ("mr", 18), ("mr", 48)
    ]  # fmt: skip
    assert [b["name"] for b in found] == [
        "two-icl-sst2-2+18", "two-icl-sst2-2+48", "two-icl-mr-2+18", "two-icl-mr-2+48", "lm-9+7", "lm-8+7"
    ]  # fmt: skip
    assert block["dataset"] == ["sst2", "mr"]


class OutsideOfContext(SoftPromptFusion):
    """Says that its memory takes no positions, as cross-attention does."""

    in_context = False


def test_memory_outside_of_the_context_needs_no_room_there(reading: Reading) -> None:
    (reading.data / "long.txt").write_text(" ".join(passage.text for passage in PASSAGES * 6))
    block = {"task": "lm", "texts": ["long.txt"], "encoded_tokens": 60, "text_tokens": 59, "scored": 9}
    block |= {"name": "village", "methods": ["memory"], "top_k": 1}
    inside, outside = with_context(tiny_model(), 60), with_context(tiny_model(), 60)
    outside.generator.fusion = OutsideOfContext(outside.generator.fusion.config).eval()
    with pytest.raises(InputError, match="leaves room for a passage"):
        run(block, inside, reading)

    def positions(model: EvalModel) -> list[int]:
        """What memory takes of each prompt where the context has no room: what it is judged by does not matter."""
        task = make_task(block, model, reading)
        method = make_method("memory", model, {}, {})
        method.prepare(task.asked)
        found: list[int] = []

        def judge(_: Any, some: Any, prompts: Any) -> list[dict[str, Any]]:
            found.extend(prompt.memory_tokens for prompt in prompts)
            return [{} for _ in some]

        task.judge = judge  # type: ignore[method-assign]
        room = {one.id: 0 for one in task.asked}
        list(harness._answered(Cell("memory", rate=1.0), method, task, task.asked, room, 4, {}))
        return found

    assert set(positions(inside)) == {1}
    assert min(positions(outside)) > 5


def test_the_tables_of_the_paper_on_a_tiny_model(reading: Reading) -> None:
    data = reading.data
    for name in ("long", "contriever"):
        (data / name).mkdir()
    (data / "long" / "a.txt").write_text(" ".join(passage.text for passage in PASSAGES * 6))
    ctxs = [{"id": p.id, "title": p.title, "text": p.text} for p in PASSAGES]
    rows = [{"question": "when was it built?", "answers": ["1867"], "ctxs": ctxs} for _ in range(2)]
    blocks = blocks_of(load_recipe("paper"))
    assert [block["task"] for block in blocks] == ["lm"] * 3 + ["icl"] * 22 + ["qa"] * 9
    smaller = {
        "lm": {"encoded_tokens": 60, "text_tokens": 40, "scored": 12, "passage_tokens": 25, "limit": 2},
        "icl": {"dataset": "sst2", "n_memory": 4, "seeds": [42], "limit": 2},
        "qa": {"slow_fast": {"raw": 2}, "top_k": 4, "dataset": "contriever/nq.jsonl"},
    }
    write_rows(data / "contriever" / "nq.jsonl", rows)
    model = tiny_model()
    for block in (blocks[0], blocks[3], blocks[25], blocks[-1]):
        result = run({**block, **smaller[block["task"]], "name": block["name"]}, model, reading)
        wanted = {cell.method for cell in cells_of(block)}
        assert {cell["method"] for cell in result["cells"]} == wanted
        assert all(math.isfinite(cell[result["metrics"][0]]) for cell in result["cells"])


def test_cells_of_a_block() -> None:
    methods = ["closed_book", "raw", {"name": "memory", "rates": [4.0]}, "truncated"]
    assert cells_of({"methods": methods, "rates": [1.0, 2.0]}) == [
        Cell("closed_book"),
        Cell("raw", 1.0),
        Cell("memory", 4.0),
        Cell("truncated", 1.0),
        Cell("truncated", 2.0),
    ]
    with pytest.raises(ConfigError, match=r"rates must be 1 or more, got 0\.5"):
        cells_of({"methods": ["memory"], "rates": [0.5]})
    with pytest.raises(ConfigError, match="methods must name at least one"):
        cells_of({"rates": [1.0]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "poetry"}, "task must be one of qa, icl, lm, got 'poetry'"),
        ({"passages": "oracle"}, "passages must be one of gold, distant"),
        ({"top_k": 0}, "top_k must be 1 or more, got 0"),
        ({"dataset": "no-such-set"}, "no-such-set"),
        ({"passages": "given"}, "must have given passages, got none"),
    ],
)
def test_a_bad_block_is_refused(model: EvalModel, reading: Reading, change: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, InputError), match=message):
        make_task({**QA, **change}, model, reading)


def test_missing_passages_name_an_id(model: EvalModel, reading: Reading) -> None:
    path = reading.data / "corpus" / "village.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    with pytest.raises(InputError, match=r"2.*document"):
        make_task({**QA, "passages": "gold"}, model, reading)


def test_bad_rows_are_named_and_skipped_on_demand(model: EvalModel, reading: Reading, tmp_path: Path) -> None:
    path = reading.data / "qa" / "squad_open" / "dev.jsonl"
    path.write_text(path.read_text() + '{"question": "no answers"}\n')
    with pytest.raises(InputError, match=r"dev\.jsonl:5"):
        make_task(QA, model, reading)
    told: list[str] = []
    lenient = Reading(reading.data, reading.output, skip_bad=True, tell=told.append)
    assert len(make_task(QA, model, lenient).asked) == 4
    assert "dev.jsonl:5" in told[0]


def test_shipped_recipes_can_be_read() -> None:
    folder = Path(harness.__file__).parent / "recipes"
    for path in folder.glob("*.toml"):
        for block in blocks_of(load_recipe(path.stem)):
            assert cells_of(block)
    with pytest.raises(ConfigError, match="recipe must be a TOML file or one of embedded-dev"):
        load_recipe("no-such-recipe")
