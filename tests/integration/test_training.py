"""``vist-rag train`` as it is typed; a run that is killed; a run of two processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.cli import ROOT, failure, run, run_json
from tests.support.evaluation import write_data
from tests.support.tiny import save_tiny_checkpoint
from vist_rag.checkpoint import SETTINGS_FILE, embedded_checkpoint, load_compressor
from vist_rag.fidelity import Fidelity

pytest.importorskip("accelerate", reason="training needs the extra 'train'")

from tests.support.training import (
    PVE,
    TEXT,
    log_of,
    pair_recipe,
    save_data,
    save_generator,
    save_sentence_encoder,
    save_tower,
    sentence_recipe,
    stage,
)
from vist_rag.training.run import RecipeRun


@pytest.fixture(autouse=True, scope="module")
def _threads() -> Iterator[None]:
    """A recipe sets them for the whole process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    return save_data(tmp_path / "data")


# -------------------------------------------------------------------------------------------------------- command line


@pytest.mark.skipif(not (embedded_checkpoint() / SETTINGS_FILE).is_file(), reason="this checkout has no embedded model")
def test_the_smoke_recipe_needs_nothing_but_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIST_RAG_DATA", str(tmp_path))  # a recipe that brings its data does not look there
    told = run_json("train", "smoke", "--output", tmp_path)
    assert told == {"models": [str(tmp_path / "model")]}
    assert log_of(tmp_path / "align")[-1]["pve"] > 0
    assert log_of(tmp_path / "distill")[-1]["believed"] > 0
    compressor = load_compressor(tmp_path / "model", device="cpu")
    assert len(compressor.encode([TEXT])[0]) > 1
    fidelity = Fidelity.load(tmp_path / "model" / "compressor", compressor.fingerprint)
    assert fidelity is not None
    assert fidelity.recipe == {"seed": 0, "texts": 40, "steps": 20}
    shown = run("train", "smoke", "--output", tmp_path)  # finished: exported again at once
    assert shown.exit_code == 0
    assert f"--model {tmp_path / 'model'}" in shown.stdout


def toml(recipe: dict[str, Any]) -> str:
    """A recipe as a file has it; JSON's values are TOML's, but for tables."""

    def value(one: Any) -> str:
        if isinstance(one, dict):
            return "{" + ", ".join(f"{json.dumps(k)} = {value(v)}" for k, v in one.items()) + "}"
        return json.dumps(one)

    lines = [f"{key} = {value(one)}" for key, one in recipe.items() if key != "stages"]
    stages = ["[[stages]]\n" + "\n".join(f"{k} = {value(v)}" for k, v in one.items()) for one in recipe["stages"]]
    return "\n".join([*lines, *stages])


def test_a_checkpoint_is_taught_further_and_measured_on_the_way(tmp_path: Path, data: Path) -> None:
    write_data(data)
    block = {"task": "qa", "dataset": "squad_open", "passages": "bm25", "corpus": ["corpus/village.jsonl"], "limit": 2}
    recipe = {
        "start": {"checkpoint": str(save_tiny_checkpoint(tmp_path / "start"))},
        "probe": {"measure": False},
        "data": {"text": ["texts.jsonl"]},
        "evaluation": {"every": 1, "metric": "f1", "rate": 2.0, "block": block},
        "settings": {"max_new_tokens": 4},
        "stages": [stage("align")],
    }
    (tmp_path / "mine.toml").write_text(toml(recipe))
    run_json("train", tmp_path / "mine.toml", "--data", data, "--output", tmp_path / "out", "--set", "seed=3")
    rows = [row for row in log_of(tmp_path / "out" / "align") if "eval_f1" in row]
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        folder = tmp_path / "out" / "align" / "evaluation" / f"step-{row['step']}"
        (result,) = folder.glob("*.json")
        cell = next(cell for cell in json.loads(result.read_text())["cells"] if cell["method"] == "memory")
        assert row["eval_f1"] == cell["f1"]
        assert row["eval_em"] == cell["em"]


def test_one_of_the_baselines_is_trained_by_its_name(tmp_path: Path, data: Path) -> None:
    (tmp_path / "base").mkdir()
    save_sentence_encoder(tmp_path / "base")
    start = save_tiny_checkpoint(tmp_path / "start")
    changes = [
        f"start.checkpoint={start}",
        f"generator.base={tmp_path / 'base'}",
        "data.text=['texts.jsonl']",
        "stages.lexical.steps=2",
        "stages.lexical.patches=100",
    ]
    arguments = ["train", "baselines", "--data", data, "--output", tmp_path / "out"]
    arguments += [word for change in changes for word in ("--set", change)]
    told = run_json(*arguments, "--only", "mean_pool")
    assert told == {"models": [str(tmp_path / "out" / "mean_pool" / "model")]}
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mean_pool"]
    config = json.loads((tmp_path / "out" / "mean_pool" / "model" / "compressor" / "config.json").read_text())
    assert config["pooled"] is True
    assert "among vist, text_encoder, text_encoder_flat, mean_pool, got 'qformer'" in failure(
        *arguments, "--only", "mean_pool,qformer"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tinyllama-clip", "--output", "OUT"], "--data must name the folder of the recipe's data files, got none"),
        (["smoke"], "--output must name a folder"),
        (["smoke", "--output", "OUT", "--only", "x"], "among none (this recipe is one run), got 'x'"),
        (["smoke", "--output", "OUT", "--set", "stages.align.step=1"], "did you mean steps?"),
        (["smoke", "--output", "OUT", "--set", "stages.align.steps=0"], "steps must be a whole number above 0, got 0"),
        (["smoke", "--output", "OUT", "--set", "steps"], "--set must be TABLE.KEY=VALUE"),
        (["smoke", "--output", "OUT", "--set", "trainer.bf61=true"], "TrainingArguments"),
        (["none-such", "--output", "OUT"], "recipe must be a TOML file or one of"),
    ],
)
def test_a_mistake_is_one_line(
    tmp_path: Path, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VIST_RAG_DATA", raising=False)
    assert message in failure("train", *(str(tmp_path) if a == "OUT" else a for a in arguments))


# --------------------------------------------------------------------------------------------------------- processes


def in_processes(
    recipe: dict[str, Any], data: Path, output: Path, *, count: int = 1, killed_at: int = -1
) -> subprocess.CompletedProcess[str]:
    """Run a recipe in so many processes of its own; one of them is killed where a batch is asked for."""
    (data.parent / "recipe.json").write_text(json.dumps(recipe))
    launch = ["-m"]
    if count > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        launch = ["-m", "torch.distributed.run", "--nproc_per_node", str(count), "--master_addr", "127.0.0.1"]
        launch += ["--master_port", str(port), "-m"]
    arguments = [data.parent / "recipe.json", data, output, killed_at]
    return subprocess.run(
        [sys.executable, *launch, "tests.support.training", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_a_run_that_is_killed_goes_on_as_if_it_had_not_been(tmp_path: Path, data: Path) -> None:
    for name, save in (("tower", save_tower), ("lm", save_generator)):
        (tmp_path / name).mkdir()
        save(tmp_path / name)
    stages = (stage("align", steps=5, save_every=2, trainer={"logging_steps": 1}, pve=PVE), stage("distill", answers=2))
    recipe = pair_recipe(tmp_path / "tower", tmp_path / "lm", *stages)
    killed = in_processes(recipe, data, tmp_path / "killed", killed_at=4)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (tmp_path / "killed" / "align" / "checkpoint-2").is_dir()
    assert not (tmp_path / "killed" / "align" / "final").exists()
    RecipeRun(recipe, data, tmp_path / "killed").run()
    RecipeRun(recipe, data, tmp_path / "whole").run()
    for name in ("align", "distill"):
        ours, theirs = log_of(tmp_path / "killed" / name), log_of(tmp_path / "whole" / name)
        assert [row["step"] for row in ours] == [row["step"] for row in theirs]
        assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in theirs], abs=1e-6)
        one, other = (load_file(tmp_path / run / name / "final" / "model.safetensors") for run in ("killed", "whole"))
        assert one.keys() == other.keys()
        for key, tensor in one.items():
            torch.testing.assert_close(tensor, other[key], rtol=0, atol=1e-6)


def test_two_processes_share_the_batches_of_every_step(tmp_path: Path, data: Path) -> None:
    (tmp_path / "base").mkdir()
    save_sentence_encoder(tmp_path / "base")
    stages = (
        stage("lexical", salad=0.5),
        stage("qa", train=["resampler", "projector", "generator"], raw=0.5, save_every=1),
    )
    recipe = sentence_recipe(tmp_path / "base", *stages)
    done = in_processes(recipe, data, tmp_path / "two", count=2)
    assert done.returncode == 0, done.stderr[-3000:]
    batches = [(tmp_path / "two" / f"batches-{rank}.txt").read_text().split() for rank in (0, 1)]
    assert batches == [["0", "2", "0", "2"], ["1", "3", "1", "3"]]  # two steps of two stages
    RecipeRun(recipe | {"trainer": {"gradient_accumulation_steps": 2}}, data, tmp_path / "one").run()
    for name in ("lexical", "qa"):
        ours, theirs = log_of(tmp_path / "two" / name), log_of(tmp_path / "one" / name)
        assert [row["step"] for row in ours] == [row["step"] for row in theirs]
        assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in theirs], abs=1e-4)
        one, other = (load_file(tmp_path / run / name / "final" / "model.safetensors") for run in ("two", "one"))
        assert one.keys() == other.keys()
        for key, tensor in one.items():
            torch.testing.assert_close(tensor, other[key], rtol=0, atol=1e-5)
    assert (tmp_path / "two" / "model" / "vist.json").is_file()
