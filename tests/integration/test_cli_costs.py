"""``vist-rag costs``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import typer
from transformers import LlamaConfig
from typer.testing import CliRunner, Result

from tests.support.tiny import save_tiny_checkpoint
from vist_rag.checkpoint import embedded_checkpoint, load_compressor
from vist_rag.cli.costs import costs
from vist_rag.evaluation.latency import FIRST_TOKEN, STAGES
from vist_rag.evaluation.sizing import table

app = typer.Typer()
app.command()(costs)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


def run_json(*arguments: object) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    document: dict[str, Any] = json.loads(result.stdout)
    return document


def failure(*arguments: object) -> str:
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    return result.stderr.splitlines()[-1]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


def test_the_embedded_checkpoint_is_counted() -> None:
    report = run_json()
    assert (report["encoded_tokens"], report["text_tokens"], report["pages"]) == (256, 256, 2)  # half of 512 each
    assert report["memory_entries"] == 112
    assert report["flops"] == sum(part["flops"] for part in report["parts"])
    weights = {part["name"]: part["weight_bytes"] // 2 for part in report["parts"]}
    loaded = load_compressor(embedded_checkpoint(), device="cpu")
    assert weights["tower"] == sum(p.numel() for p in loaded.tower.parameters())
    shown = run()
    assert shown.exit_code == 0
    assert f"{report['flops'] / 1e9:,.2f}" in shown.stdout
    assert f"{report['memory_bytes_per_passage'] / 1e3:,.1f} kB" in shown.stdout


def test_a_checkpoint_needs_no_weights(tiny: Path, tmp_path: Path) -> None:
    whole = run_json("--model", tiny, "--encoded-tokens", 150, "--text-tokens", 20)
    bare = tmp_path / "bare"
    shutil.copytree(tiny, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    assert run_json("--model", bare, "--encoded-tokens", 150, "--text-tokens", 20) == whole
    fewer = run_json("--model", bare, "--encoded-tokens", 150, "--text-tokens", 20, "--latents", 16)
    assert (whole["memory_entries"], fewer["memory_entries"]) == (66, 17)


def test_a_pair_by_name_and_by_directory(tmp_path: Path) -> None:
    LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=128
    ).save_pretrained(tmp_path)
    arguments = ("--tower", "vit-l-14", "--generator", tmp_path, "--encoded-tokens", 400, "--text-tokens", 10)
    report = run_json(*arguments, "--passage-tokens", 100)
    assert (report["pages"], report["memory_entries"], report["positions"]) == (4, 4 * 44, 10 + 4 * 46)
    assert report["memory_bytes_per_passage"] == 44 * 1024 * 2
    crossed = run(*arguments, "--fusion", "cross_attention", "--eager")
    assert crossed.exit_code == 0
    assert "cross_attention" in crossed.stdout
    assert "186 positions are more than the 128" not in crossed.stderr
    assert "187 positions are more than the 128 of this generator" in run(*arguments).stderr


@pytest.mark.slow
def test_the_paper_beside_ours() -> None:
    report = run_json("--paper")
    assert [(row["method"], row["paper_tflops"]) for row in report["rows"]] == [
        ("TinyLlama", 8.47), ("VIST", 7.72), ("CEPE*", 8.26), ("VIST", 11.65), ("CEPE*", 13.27), ("VIST", 19.52),
        ("CEPE*", 23.30),
    ]  # fmt: skip
    assert {row["method"] for row in report["rows"]} == set(report["reasons"])
    shown = run("--paper")
    assert shown.exit_code == 0
    for row in report["rows"]:
        assert f"{row['ours_tflops']:.2f}" in shown.stdout
        assert f"{row['reconciled_percent']:+.1f} %" in shown.stdout
    assert "inference" in shown.stdout


def test_measured(tiny: Path) -> None:
    document = run_json("--measure", "--model", tiny, "--repeats", 2, "--k", "2,1", "--words", 10)
    assert document["format"] == "vist-rag-latency/1"
    assert [(p["method"], p["k"]) for p in document["points"]] == [(name, k) for k in (1, 2) for name in FIRST_TOKEN]
    report = document["measured"][0]
    assert report["passages"] == 1
    assert tuple(report["stages_ms"]) == STAGES
    assert all(report["first_token_ms"][name]["median"] > 0 for name in FIRST_TOKEN)
    assert {"date", "command", "commit", "versions", "machine"} <= set(document)
    shown = run("--measure", "--model", tiny, "--repeats", 1, "--k", 1, "--words", 10)
    assert shown.exit_code == 0
    assert "first token, memory ready" in shown.stdout


def test_rates_are_measured_and_corpora_sized_by_them(tiny: Path, tmp_path: Path) -> None:
    told = [f"Keeper {i} of the lighthouse counts the ships that pass." for i in range(40)]
    (tmp_path / "sample.txt").write_text(" ".join(told))
    rates = tmp_path / "rates" / "here.json"
    arguments = ("--model", tiny, "--data", tmp_path / "sample.txt", "--words", 20)
    written = run_json("--measure-rates", "-o", rates, *arguments)
    assert json.loads(rates.read_text()) == written
    assert {"date", "command", "commit", "versions", "machine"} <= set(written)
    assert written["sample"] == {"passages": 20, "words": 21.0}  # two sentences, and the title
    assert written["embedder"] == {"name": "sentence-transformers/all-MiniLM-L6-v2", "dimension": 384}
    assert written["compressor"]["fingerprint"] == load_compressor(tiny).fingerprint
    sized = run_json("--passages", "1M,2M", "--rates", rates, "--machines", 2, "--price-per-hour", 3)
    assert sized["rates"] == written
    assert [one["passages"] for one in sized["sizes"]] == [10**6, 2 * 10**6]
    hours = 10**6 / written["passages_per_s"]["encode"] / 3600
    assert sized["sizes"][0]["hours"]["encode"] == pytest.approx(hours / 2)
    shown = run("--passages", "1M", "--rates", rates)
    assert shown.exit_code == 0
    assert shown.stdout.strip() == table(written, [10**6])
    deeper = run("--passages", "1M", "--rates", rates, "--tower", "vit-l-14")
    assert "derived: FLOPs of vit-l-14" in deeper.stdout
    now = run("--passages", "1M", *arguments)  # measured on the spot
    assert "over 20 passages of 21 words" in now.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--generator", "no-such/model"), "--generator must be one of tinyllama-1.1b"),
        (("--tower", "no-such/model"), "--tower must be one of tinyllama-1.1b"),
        (("--encoded-tokens", -1), "encoded_tokens must be 0 or more, got -1"),
        (("--text-tokens", 0), "text_tokens must be 1 or more, got 0"),
        (("--latents", 60), "latents_per_page must divide the patches of a page (256), got 60"),
        (("--fusion", "none"), "fusion must be one of soft_prompt, cross_attention, got 'none'"),
        (("--paper", "--measure"), "--paper and --measure must not be given together"),
        (("--paper", "--passages", "1M"), "--paper and --passages must not be given together"),
        (("--passages", "1M", "--rates", "nowhere.json"), "nowhere.json cannot be read"),
        (("--passages", "many"), "passages must be numbers of 1 or more, such as 1000,1M,21M,1B, got 'many'"),
        (("--measure-rates", "--data", "nowhere.txt"), "nowhere.txt does not exist"),
        (("--measure", "--repeats", 0), "--repeats must be 1 or more, got 0"),
        (("--measure", "--k", "1,many"), "--k must be numbers of 1 or more, separated by commas, got '1,many'"),
        (("--measure", "--words", 0), "words must be 1 or more, got 0"),
        (("--tower", "tinyllama-1.1b", "--generator", "vit-l-14"), "generator must be a causal language model"),
    ],
)
def test_bad_input_is_one_line(arguments: tuple[object, ...], message: str) -> None:
    assert message in failure(*arguments)


def test_a_torn_checkpoint(tiny: Path, tmp_path: Path) -> None:
    torn = tmp_path / "torn"
    shutil.copytree(tiny, torn)
    (torn / "fusion" / "config.json").write_text("{")
    assert "restore its files" in failure("--model", torn)
