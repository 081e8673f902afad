"""Sizes of corpora: measured rates, and multiplication that can be checked by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

from tests.support.cli import WordEmbedder
from tests.support.tiny import TOWER, tiny_compressor
from vist_rag import codec
from vist_rag.config import ResamplerConfig
from vist_rag.errors import ConfigError, InputError
from vist_rag.evaluation import sizing
from vist_rag.retrieval.faiss_cache import new_index
from vist_rag.types import Passage

ROOT = Path(__file__).parents[3]
RATES: dict[str, Any] = {
    "format": sizing.FORMAT,
    "date": "2031-05-01T00:00:00+00:00",
    "command": "vist-rag costs --measure-rates",
    "commit": "abcdef0123",
    "machine": {"device": "cpu", "processor": "Some CPU", "cores": 4, "threads": 2},
    "sample": {"passages": 10, "words": 100.0},
    "embedder": {"name": "e", "dimension": 384},
    "compressor": {"latents": 32, "width": 16, "memory_form": "int3", "latents_per_page": 64, "page_flops": 10**9},
    "passages_per_s": {"embed": 100.0, "encode": 50.0, "store": 1000.0},
    "bytes_per_passage": {"text": 600.0, "memory": {"float16": 1024.0, "int8": 576.0, "int3": 256.0}},
}


def test_rates_are_those_of_the_sample() -> None:
    compressor = tiny_compressor()
    passages = [Passage(f"The old bridge number {i} " * (1 + i % 3), title="Bridge") for i in range(30)]
    steps: list[int] = []
    rates = sizing.measure_rates(WordEmbedder(delay_s=0.8), compressor, passages, repeats=2, advance=steps.append)
    assert len(steps) == 6
    assert 20 < rates["passages_per_s"]["embed"] < 30 / 0.8  # 30 passages in 0.8 s and a little
    assert rates["passages_per_s"]["encode"] > 0
    assert rates["passages_per_s"]["store"] > 0
    n = [len(memory) for memory in compressor.encode([p.content for p in passages])]
    assert rates["compressor"]["latents"] == pytest.approx(np.mean(n), abs=0.01)
    assert rates["compressor"]["width"] == 16
    assert rates["bytes_per_passage"]["memory"]["float16"] == pytest.approx(2 * 16 * np.mean(n), abs=0.1)
    assert rates["bytes_per_passage"]["memory"]["int8"] == pytest.approx(16 * np.mean(n) + 64, abs=0.1)
    assert rates["bytes_per_passage"]["text"] >= np.mean([len(p.text) for p in passages])
    assert rates["embedder"] == {"name": WordEmbedder.name, "dimension": 256}
    with pytest.raises(InputError, match="must hold passages"):
        sizing.measure_rates(WordEmbedder(), compressor, [])
    with pytest.raises(ConfigError, match="repeats must be 1 or more"):
        sizing.measure_rates(WordEmbedder(), compressor, passages, repeats=0)


def test_a_corpus_is_its_rates_times_its_passages() -> None:
    one = sizing.size_of(RATES, 3_600_000, machines=4, price_per_hour=2.5)
    assert one["bytes"]["text"] == 3_600_000 * 600
    assert one["bytes"]["vectors"] == 3_600_000 * 384 * 4
    assert one["bytes"]["memory"] == {"float16": 3_600_000 * 1024, "int8": 3_600_000 * 576, "int3": 3_600_000 * 256}
    assert one["hours"] == {"embed": 10 / 4, "encode": 20 / 4, "store": 1, "total": 8.5}
    assert one["cost"] == 2.5 * 31  # machines work less each, and as much together
    assert sizing.size_of(RATES, 1)["cost"] is None
    assert sizing.size_of(RATES, 10**9)["bytes"]["vectors"] == 1.536e12


@pytest.mark.parametrize("factory", ["Flat", "IVF4,PQ4"])
def test_bytes_of_faiss_are_those_that_it_writes(factory: str) -> None:
    vectors = np.random.default_rng(0).standard_normal((3000, 8)).astype(np.float32)
    index = new_index(factory, 8)
    if not index.is_trained:
        index.train(vectors)

    def size(n: int) -> int:
        index.add_with_ids(vectors[: n - index.ntotal], np.arange(index.ntotal, n))
        return len(faiss.serialize_index(index))

    few, many = size(1000), size(3000)
    assert many - few == sizing.faiss_bytes(factory, 3000, 8) - sizing.faiss_bytes(factory, 1000, 8)
    assert many == pytest.approx(sizing.faiss_bytes(factory, 3000, 8), rel=0.02)


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("1M,21M,1B", [10**6, 21 * 10**6, 10**9]),
        ("1000000", [10**6]),
        ("1.5m, 2k ,7", [1_500_000, 2000, 7]),
        ("1_000", [1000]),
    ],
)
def test_sizes_are_understood(text: str, sizes: list[int]) -> None:
    assert sizing.parse_sizes(text) == sizes


@pytest.mark.parametrize("text", ["", "many", "1M,", "0", "-1", "1.5", "1T", "M", "1/0", "nan", "inf"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="passages must be numbers of 1 or more"):
        sizing.parse_sizes(text)


def test_another_tower_is_scaled_by_its_flops() -> None:
    tower = TOWER | {"num_hidden_layers": 4}
    own = sizing.page_flops(TOWER, ResamplerConfig(width=16, heads=2, layers=1, tower_layers=(1, -1)))
    rates = {**RATES, "compressor": RATES["compressor"] | {"page_flops": own}}
    resampler = ResamplerConfig(latents_per_page=32, width=32, heads=2, layers=1, tower_layers=(1, -1))
    other = sizing.other_tower(rates, "deep", tower, resampler)
    flops = sizing.page_flops(tower, resampler)
    assert flops > 1.5 * own
    assert other["passages_per_s"]["encode"] == pytest.approx(50 * own / flops)
    assert other["passages_per_s"]["embed"] == 100
    assert other["bytes_per_passage"]["memory"]["float16"] == 16 * 32 * 2  # half the latents of twice the width
    assert other["bytes_per_passage"]["memory"]["int8"] == codec.size_bytes("int8", 16, 32)
    assert other["bytes_per_passage"]["memory"]["int3"] == codec.size_bytes("int3", 16, 32)
    table = sizing.table(other, [1000])
    assert "derived: FLOPs of deep" in table
    assert "measured: 1,024 bytes" not in table


def test_a_table_says_what_was_measured_where_and_when() -> None:
    table = sizing.table(RATES, [10**6, 10**9], machines=3, price_per_hour=2)
    rows = {line.split(" | ")[0].lstrip("| "): line for line in table.splitlines() if line.startswith("| ")}
    assert rows["passages"] == "| passages | 1,000,000 | 1,000,000,000 | from |"
    assert rows["text"] == "| text | 600.0 MB | 600.0 GB | measured: 600 bytes a passage |"
    assert rows["vectors, float32"] == "| vectors, float32 | 1.5 GB | 1.5 TB | derived: 4 x 384 bytes |"
    assert rows["embed, 3 machines"].startswith("| embed, 3 machines | 55.6 min | 38.6 days | measured: 100.0")
    assert rows["cost at 2 an hour"].startswith("| cost at 2 an hour | 17.22 | 17,222.22 |")
    assert table.splitlines()[-1] == (
        "Measured 2031-05-01 on cpu (Some CPU, 4 cores, 2 threads), commit abcdef0, over 10 passages of 100 words: "
        "vist-rag costs --measure-rates"
    )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read"),
        ("{", "is not a file of rates"),
        ("[]", "is not a file of rates"),
        ('{"format": "other"}', "must be of format vist-rag-rates/1, got 'other'"),
        (json.dumps(RATES | {"passages_per_s": {}}), "is not a file of rates"),
        (json.dumps(RATES | {"passages_per_s": {"embed": 0, "encode": 1, "store": 1}}), "is not a file of rates"),
    ],
)
def test_a_file_that_holds_no_rates(tmp_path: Path, content: str | None, said: str) -> None:
    path = tmp_path / "rates.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=said):
        sizing.read_rates(path)


@pytest.mark.parametrize("how", [{"machines": 0}, {"price_per_hour": -1.0}])
def test_numbers_out_of_range(how: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="must be"):
        sizing.size_of(RATES, 1, **how)


def test_the_page_shows_what_the_command_prints() -> None:
    page = (ROOT / "docs" / "explanation" / "sizing.md").read_text("utf-8")
    rates = sizing.read_rates(ROOT / "benchmarks" / "results" / "sizing-cpu.json")
    assert sizing.table(rates, sizing.parse_sizes("1M,21M,1B")) in page
