"""``vist-rag eval`` and ``vist-rag report``: from questions of one's own to a page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.cli import run
from tests.support.evaluation import write_data
from tests.support.tiny import save_tiny_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path / "data")


RECIPE = """
limit = 3
rates = [1.0, 3.0]

[[blocks]]
name = "village-k{k}"
task = "qa"
dataset = "squad_open"
passages = "bm25"
corpus = ["corpus/village.jsonl"]
top_k = [1, 2]
methods = ["closed_book", "raw", "truncated", "memory", "mean_pool"]

[[blocks]]
name = "labels"
task = "icl"
dataset = "sst2"
n_text = 2
n_memory = 6
seeds = [42]
methods = ["raw", "memory"]

[[blocks]]
name = "novel"
task = "lm"
texts = ["long.txt"]
encoded_tokens = 60
text_tokens = 40
scored = 10
methods = ["raw", "memory"]
"""


def test_a_recipe_of_every_task_and_its_page(tmp_path: Path, data: Path, checkpoint: Path) -> None:
    recipe, results = tmp_path / "mine.toml", tmp_path / "results"
    recipe.write_text(RECIPE)
    arguments = ["eval", str(recipe), "--data", str(data), "--output", str(results), "--model", str(checkpoint)]
    arguments += ["--checkpoint", f"mean_pool={checkpoint}", "--json"]
    done = run(*arguments)
    assert done.exit_code == 0, done.stderr
    written = json.loads(done.stdout)["results"]
    assert [Path(path).stem for path in written] == ["village-k1", "village-k2", "labels", "novel"]
    first = json.loads((results / "village-k1.json").read_text())
    assert first["command"] == (
        "vist-rag eval mine.toml --data DIR --output DIR --only village-k1 --model MODEL --checkpoint mean_pool=DIR"
    )
    assert str(tmp_path) not in json.dumps(first)
    assert first["questions"] == 3
    rows = [json.loads(line) for line in (results / "village-k2.jsonl").read_text().splitlines()[1:]]
    assert len(rows) == 3 * (2 + 3 * 2)

    page = tmp_path / "benchmarks.md"
    shown = run("report", str(results), "--output", str(page))
    assert shown.exit_code == 0, shown.stderr
    text = page.read_text()
    em = next(c for c in first["cells"] if c["method"] == "raw")["em"]
    assert f"{100 * em:.1f}" in text
    assert list((tmp_path / "images" / "benchmarks").glob("*.png"))


def test_flags_instead_of_a_recipe(tmp_path: Path, data: Path, checkpoint: Path) -> None:
    output = tmp_path / "out"
    arguments = ["eval", "--dataset", "squad_open", "--data", str(data), "--output", str(output)]
    arguments += ["--methods", "raw,memory", "--rates", "2", "--model", str(checkpoint), "--only", "*"]
    done = run(*arguments)
    assert done.exit_code == 0, done.stderr
    result = json.loads((output / "squad_open-dev-gold-k1.json").read_text())
    assert [(c["method"], c["rate"]) for c in result["cells"]] == [("raw", 1.0), ("memory", 2.0)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either a recipe or --dataset, got neither."),
        (["embedded-dev", "--dataset", "nq"], "give either a recipe or --dataset, got both."),
        (["no-such-recipe"], "recipe must be a TOML file or one of embedded-dev"),
        (["--dataset", "squad_open", "--limit", "0"], "--limit must be 1 or more, got 0."),
        (["--dataset", "squad_open", "--batch-size", "0"], "--batch-size must be 1 or more, got 0."),
        (["--dataset", "squad_open", "--rates", "fast"], "--rates must be numbers separated by commas, got 'fast'."),
        (["--dataset", "squad_open", "--rates", "0.5"], "rates must be 1 or more, got 0.5."),
        (["--dataset", "squad_open", "--methods", "magic"], "method must be one of closed_book"),
        (["--dataset", "squad_open", "--checkpoint", "mean_pool"], "--checkpoint must be METHOD=DIR"),
        (["embedded-dev", "--only", "nothing"], "--only must match a block (squad-gold, nq-gold"),
        (["--dataset", "squad_opne"], "squad_opne"),
    ],
)
def test_bad_input_is_one_line(
    data: Path, checkpoint: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    done = run("eval", *arguments, "--data", str(data), "--output", str(tmp_path / "out"), "--model", str(checkpoint))
    assert done.exit_code == 2
    assert done.stderr.count("error:") == 1
    assert message in done.stderr


def test_a_baseline_cannot_pose_as_the_model(tmp_path: Path) -> None:
    import torch
    from tokenizers import Tokenizer

    from tests.support.tiny import tiny_generator, tiny_tokenizer
    from vist_rag.compression import TextCompressor
    from vist_rag.config import ResamplerConfig
    from vist_rag.training.export import save_checkpoint

    tokenizer = Tokenizer.from_str(tiny_tokenizer().backend_tokenizer.to_str())
    compressor = TextCompressor.build(
        torch.randn(len(tiny_tokenizer()), 8), tokenizer, pooled=True, resampler=ResamplerConfig(width=16)
    )
    directory = save_checkpoint(tmp_path / "text", compressor, tiny_generator(memory_width=compressor.memory_width))
    done = run("render", "text", "--model", str(directory), "-o", str(tmp_path / "page.png"))
    assert done.exit_code == 2
    assert "--model must be a compressor that reads pictures, got TextCompressor" in done.stderr
