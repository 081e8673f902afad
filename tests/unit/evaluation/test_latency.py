"""Times of a tiny model: every stage is there, and the prompt is what it should be."""

from __future__ import annotations

import json

import pytest
import torch

from tests.support.causal import causal_generator
from tests.support.tiny import tiny_compressor, tiny_generator
from vist_rag.errors import ConfigError, InputError
from vist_rag.evaluation.latency import (
    FIRST_TOKEN,
    STAGES,
    WARM_UP,
    measure_latency,
    peak_memory,
    points_of,
    sample_passages,
)
from vist_rag.generation import PromptTemplate

SHORT = PromptTemplate(raw="{text}", untitled="{text}", memory="", question="{question}")


@pytest.mark.parametrize("family", ["prefix_bert", "llama"])
def test_every_stage_is_timed(family: str) -> None:
    compressor, generator = tiny_compressor(), causal_generator(family)
    turns: list[int] = []
    report = measure_latency(
        compressor, generator, SHORT, passages=sample_passages(3, 8), k=2, repeats=3, advance=turns.append
    )
    assert sum(turns) == WARM_UP + 3
    assert tuple(report["stages_ms"]) == STAGES
    assert tuple(report["first_token_ms"]) == FIRST_TOKEN
    for times in (*report["stages_ms"].values(), *report["first_token_ms"].values()):
        assert 0 < times["q25"] <= times["median"] <= times["q75"] < 60_000
    texts = [p.content for p in sample_passages(3, 8)[:2]]
    assert report["latents"] == sum(compressor.count_latents(text) for text in texts)
    assert report["origin_tokens"] == sum(generator.count_tokens(text) for text in texts)
    assert report["prompt_tokens"]["raw"] == report["origin_tokens"] + report["text_tokens"]
    assert report["prompt_tokens"]["memory"] == report["latents"] + 2 * 2 + report["text_tokens"]
    made_now = report["first_token_ms"]["memory_made_now"]["median"]
    tokens = report["origin_tokens"] + report["text_tokens"]
    assert report["throughput_tokens_per_s"]["memory_made_now"] == pytest.approx(1000 * tokens / made_now, rel=1e-2)
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_raw_text_that_does_not_fit_is_none() -> None:
    report = measure_latency(tiny_compressor(), tiny_generator(), SHORT, passages=sample_passages(1, 250), repeats=1)
    assert report["prompt_tokens"]["raw"] > 512 > report["prompt_tokens"]["memory"]
    assert report["first_token_ms"]["raw"] is None
    assert report["throughput_tokens_per_s"]["raw"] is None
    assert report["first_token_ms"]["memory_ready"]["median"] > 0


def test_memory_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(InputError, match=r"must fit 511 positions .* got \d+; lower k"):
        measure_latency(tiny_compressor(), tiny_generator(), SHORT, passages=sample_passages(4, 400), repeats=1)


def test_sample_passages_differ_and_have_the_words_that_were_asked_for() -> None:
    passages = sample_passages(12, 30)
    assert [len(p.text.split()) for p in passages] == [30] * 12
    assert len({p.text for p in passages}) == len({p.id for p in passages}) == 12
    assert passages == sample_passages(12, 30)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 3}, r"k must be in 1..2 \(passages given\), got 3"),
        ({"k": 0}, r"k must be in 1..2 \(passages given\), got 0"),
        ({"repeats": 0}, "repeats must be 1 or more, got 0"),
        ({"decoded_tokens": 0}, "decoded_tokens must be 1 or more, got 0"),
    ],
)
def test_bad_numbers(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        measure_latency(tiny_compressor(), tiny_generator(), passages=sample_passages(2, 5), **changes)


def test_bad_samples() -> None:
    with pytest.raises(ConfigError, match="words must be 1 or more, got 0"):
        sample_passages(1, 0)


def test_peak_memory_of_the_process_grows_with_it() -> None:
    before = peak_memory(torch.device("cpu"))
    if before["bytes"] is None:
        pytest.skip("this system does not tell")
    held = torch.ones(before["bytes"] // 4 + 10_000_000)  # more than ever before
    after = peak_memory(torch.device("cpu"))
    assert after["bytes"] >= held.numel() * 4
    assert "process" in after["of"]


@pytest.mark.gpu
def test_peak_memory_of_a_gpu_is_that_of_its_tensors() -> None:
    compressor, generator = tiny_compressor().to("cuda"), tiny_generator()
    generator.model.to("cuda")
    generator.fusion.to("cuda")
    report = measure_latency(compressor, generator, SHORT, passages=sample_passages(1, 8), repeats=1)
    weights = sum(p.numel() * p.element_size() for p in generator.model.parameters())
    assert report["peak_memory"]["bytes"] > weights


def test_points_for_the_report() -> None:
    took = {"median": 5.0, "q25": 4.0, "q75": 7.0}
    reports = [
        {"passages": 1, "first_token_ms": {"raw": took, "memory_ready": {**took, "median": 2.0}}},
        {"passages": 9, "first_token_ms": {"raw": None, "memory_ready": took}},
    ]
    assert points_of(reports) == [
        {"method": "raw", "k": 1, "ttft_ms": 5.0, "ttft_ms_quartiles": [4.0, 7.0]},
        {"method": "memory_ready", "k": 1, "ttft_ms": 2.0, "ttft_ms_quartiles": [4.0, 7.0]},
        {"method": "memory_ready", "k": 9, "ttft_ms": 5.0, "ttft_ms_quartiles": [4.0, 7.0]},
    ]
