"""Counts against hand formulas, against PyTorch's counter on real tensors, and against the paper."""

from __future__ import annotations

import copy
import gc
import json
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, LlamaConfig, RobertaConfig, ViTConfig

from tests.support.benchmarks import FOLDER, load_benchmark
from tests.support.causal import causal_generator
from tests.support.tiny import BERT_SIZES, TOWER, tiny_compressor
from vist_rag.config import FusionConfig, ResamplerConfig
from vist_rag.errors import ConfigError
from vist_rag.evaluation.costs import Costs, CrossAttention, count_costs, learned_positions
from vist_rag.evaluation.meters import LiveBytes
from vist_rag.evaluation.paper_costs import SHAPES, TABLE_1, compare_with_paper, shape, slopes
from vist_rag.generation.prefix_bert import PrefixBertConfig, PrefixBertForCausalLM

PATCHES, N = 256, 64
RESAMPLER = ResamplerConfig(latents_per_page=N, width=16, layers=1, heads=2, tower_layers=(1, -1))
D, L, M, V, KV_HEADS, HEAD = 64, 3, 96, 100, 2, 16


def llama(**changes: Any) -> LlamaConfig:
    sizes: dict[str, Any] = {
        "vocab_size": V,
        "hidden_size": D,
        "intermediate_size": M,
        "num_hidden_layers": L,
        "num_attention_heads": 4,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 32,
    }
    return LlamaConfig(**sizes | changes)


def count(**changes: Any) -> Costs:
    arguments: dict[str, Any] = {"encoded_tokens": 300, "text_tokens": 40, "resampler": RESAMPLER}
    return count_costs(TOWER, changes.pop("generator", llama()), **arguments | changes)


def flops(costs: Costs, name: str) -> int:
    part = costs.part(name)
    assert part is not None
    return part.flops


def linear(rows: int, *widths: int) -> int:
    """FLOPs of a chain of linear layers over so many rows."""
    return sum(2 * rows * a * b for a, b in pairwise(widths))


def llama_layers(t: int) -> int:
    projections = linear(t, D, D) * 2 + linear(t, D, KV_HEADS * HEAD) * 2
    return L * (projections + 3 * linear(t, D, M))


# ------------------------------------------------------------------------------------------------------- hand formulas


def test_tower_by_hand() -> None:
    pages, s, d, m = 3, PATCHES + 1, 32, 64
    part = count().part("tower")
    assert part is not None
    assert part.score_flops == pages * 2 * 4 * s * s * d
    assert part.attention_linear_flops == pages * 2 * 4 * linear(s, d, d)
    patches = linear(PATCHES, 14 * 14, d)
    assert part.flops == pages * (patches + 2 * (4 * linear(s, d, d) + linear(s, d, m, d))) + part.score_flops


def test_resampler_by_hand() -> None:
    pages, f, w = 3, 2 * 32, 16
    part = count().part("resampler")
    assert part is not None
    attention = linear(N, w, w) * 2 + linear(PATCHES + N, w, 2 * w)
    assert part.score_flops == pages * 4 * N * (PATCHES + N) * w
    assert part.attention_linear_flops == pages * attention
    inward = linear(PATCHES, f, w) + linear(N, PATCHES // N * f, w)
    assert part.flops == pages * (inward + attention + linear(N, w, 4 * w, w)) + part.score_flops


def test_projector_by_hand() -> None:
    costs = count(projector=FusionConfig(999, 999, hidden_width=24))  # widths come from the other parts
    assert costs.memory_entries == 132  # 300 tokens of 1,024 / 7 a page, 64 latents a page
    assert flops(costs, "projector") == linear(132, 16, 24, D)


def test_spelling_is_counted() -> None:
    plain, spelt = (count(projector=FusionConfig(1, 1, hidden_width=24, spelling=n)) for n in (0, 5))
    assert flops(spelt, "projector") - flops(plain, "projector") == linear(132, 16, 5 * 97)


@pytest.mark.parametrize("all_logits", [False, True])
def test_generator_by_hand(all_logits: bool) -> None:
    costs = count(all_logits=all_logits)
    t = 40 + 132 + 2
    assert costs.positions == t
    part = costs.part("llm")
    assert part is not None
    assert part.score_flops == L * 4 * t * t * D
    assert part.attention_linear_flops == L * (linear(t, D, D) * 2 + linear(t, D, KV_HEADS * HEAD) * 2)
    assert part.flops == llama_layers(t) + linear(t if all_logits else 1, D, V) + part.score_flops
    assert costs.decode_flops == llama_layers(1) + linear(1, D, V) + L * 4 * (t + 1) * D


def test_cross_attention_by_hand() -> None:
    costs, n, t = count(fusion="cross_attention"), 132, 40
    assert costs.positions == t
    part = costs.part("cross_attention")
    assert part is not None
    assert part.score_flops == L * 4 * t * n * D
    assert part.attention_linear_flops == L * (2 * linear(t, D, D) + linear(n, 16, 2 * D))
    assert part.flops == part.score_flops + part.attention_linear_flops
    assert part.weight_bytes == 2 * L * (2 * D * D + 2 * 16 * D)
    without = count(encoded_tokens=0)
    assert costs.decode_flops - without.decode_flops == L * (2 * linear(1, D, D) + 4 * n * D)
    assert costs.kv_bytes - without.kv_bytes == 2 * 2 * L * n * D


def test_text_encoder_reads_chunks() -> None:
    sizes = {k: v for k, v in BERT_SIZES.items() if k != "max_position_embeddings"}
    encoder = RobertaConfig(vocab_size=V, max_position_embeddings=514, **sizes)
    costs = count_costs(encoder, llama(), encoded_tokens=600, text_tokens=8, fusion="cross_attention")
    assert (costs.pages, costs.memory_entries, costs.part("resampler")) == (3, 600, None)
    t, d = 3 * 256, 32
    assert flops(costs, "text_encoder") == 2 * (4 * linear(t, d, d) + linear(t, d, 64, d) + 4 * t * 256 * d)


def test_totals_and_what_is_left_once_memory_is_kept() -> None:
    costs = count()
    assert [part.name for part in costs.parts] == ["rendering", "tower", "resampler", "projector", "llm"]
    assert costs.flops == sum(flops(costs, p.name) for p in costs.parts)
    assert costs.stored_flops == flops(costs, "projector") + flops(costs, "llm")
    assert costs.total_bytes == costs.weight_bytes + costs.kv_bytes + costs.activation_bytes
    assert costs.to_dict()["total_bytes"] == costs.total_bytes


# --------------------------------------------------------------------------------------------------------------- bytes


def test_keys_and_values_of_grouped_heads() -> None:
    costs = count()
    assert costs.kv_bytes == 2 * 2 * L * KV_HEADS * HEAD * costs.positions
    all_heads = count(generator=llama(num_key_value_heads=4))
    assert all_heads.kv_bytes == 2 * costs.kv_bytes
    assert costs.raw_kv_bytes_per_passage == 300 * 2 * 2 * L * KV_HEADS * HEAD


def test_memory_bytes_of_a_passage() -> None:
    joined = count()
    assert (joined.pages, joined.memory_entries, joined.memory_bytes_per_passage) == (3, 132, 132 * 16 * 2)
    apart = count(passage_tokens=100)  # 100 tokens: 43.75 latents, on a page of their own
    assert (apart.pages, apart.memory_entries, apart.memory_bytes_per_passage) == (3, 3 * 44, 44 * 16 * 2)
    assert apart.positions == 40 + 3 * (44 + 2)
    rest = count(passage_tokens=290)  # 127 latents on two pages, and a passage of 10 tokens
    assert (rest.pages, rest.memory_entries) == (3, 127 + 5)
    assert count(dtype=torch.float32).memory_bytes_per_passage == 132 * 16 * 4


def test_weights_are_counted_once_and_by_type() -> None:
    untied, tied = (count(generator=llama(tie_word_embeddings=tie)) for tie in (False, True))
    assert untied.weight_bytes - tied.weight_bytes == 2 * V * D
    assert count(dtype=torch.float32).weight_bytes == 2 * untied.weight_bytes
    compressor = tiny_compressor()
    for name in ("tower", "resampler"):
        part = untied.part(name)
        assert part is not None
        assert part.weight_bytes == 2 * sum(p.numel() for p in getattr(compressor, name).parameters())


def test_live_bytes_by_hand() -> None:
    with LiveBytes() as live:
        a = torch.empty(100)  # 400 bytes
        b = a + 1  # 800
        view = b.view(10, 10)
        assert live.live == 800
        del a, b
        gc.collect()
        assert live.live == 400  # the view keeps its storage
        view.add_(1)
        c = torch.cat((view, view))  # 1,200
        del view
        d = torch.empty(50, dtype=torch.float16)  # 900
    assert (live.live, live.peak) == (900, 1200)
    del c, d
    gc.collect()
    assert live.live == 0


def test_weights_are_no_activations() -> None:
    layer = torch.nn.Linear(1000, 10, bias=False)
    with torch.no_grad(), LiveBytes(layer) as live:
        layer(torch.empty(2, 1000))
    assert live.peak == 4 * (2 * 1000 + 2 * 10)


def test_activations_of_the_projector_by_hand() -> None:
    part = count(projector=FusionConfig(1, 1, hidden_width=512)).part("projector")
    assert part is not None
    # Its widest moment is GELU: the layer before and after, the input; a normalised input may be there still.
    assert 2 * 132 * (2 * 512 + 16) <= part.activation_bytes <= 2 * 132 * (2 * 512 + 16 + 16 + 4)


def test_eager_attention_holds_scores_and_costs_the_same_flops() -> None:
    config, tower = llama(), ViTConfig(**TOWER)
    before = copy.deepcopy((config.to_dict(), tower.to_dict(), config._attn_implementation))
    arguments: dict[str, Any] = {"encoded_tokens": 300, "text_tokens": 400, "resampler": RESAMPLER}
    fused, eager, again = (count_costs(tower, config, attention=a, **arguments) for a in ("fused", "eager", "fused"))
    assert fused == again
    assert before == (config.to_dict(), tower.to_dict(), config._attn_implementation)
    assert fused.flops == eager.flops
    scores = 2 * 4 * eager.positions**2  # fp16, four heads
    less, more = (costs.part("llm") for costs in (fused, eager))
    assert less is not None
    assert more is not None
    assert less.activation_bytes < scores < more.activation_bytes < 8 * scores


def test_eager_softmax_makes_no_copy_of_fp16_scores() -> None:
    """fp16 scores are a copy each before and after the softmax, which is in float32: 1 + 2 + 1 as on CUDA."""
    costs = count_costs(None, llama(), encoded_tokens=0, text_tokens=2000, attention="eager")
    part = costs.part("llm")
    assert part is not None
    scores = 2 * 4 * 2000**2  # fp16, four heads
    assert part.activation_bytes == pytest.approx(4 * scores, rel=0.15)


# -------------------------------------------------------------------------------------------------------- real tensors


def counted_for_real(function: Any) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        function()
    return int(counter.get_total_flops())


def test_compressor_on_real_tensors() -> None:
    compressor, costs = tiny_compressor(), count()
    pixels, mask = torch.rand(3, 1, 224, 224), torch.ones(3, PATCHES, dtype=torch.bool)
    features = compressor.features(pixels, mask)
    assert counted_for_real(lambda: compressor.features(pixels, mask)) == flops(costs, "tower")
    assert counted_for_real(lambda: compressor.resampler(features, mask)) == flops(costs, "resampler")


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_generator_on_real_tensors(family: str) -> None:
    model = causal_generator(family).model
    costs = count_costs(None, model.config, encoded_tokens=0, text_tokens=37)
    embeds = torch.randn(1, 37, 32)
    assert counted_for_real(lambda: model(inputs_embeds=embeds, logits_to_keep=1)) == flops(costs, "llm")
    cache = model(inputs_embeds=embeds, use_cache=True).past_key_values
    after = counted_for_real(lambda: model(inputs_embeds=embeds[:, :1], past_key_values=cache, logits_to_keep=1))
    assert after == costs.decode_flops


def test_cross_attention_on_real_tensors() -> None:
    block = CrossAttention(16, D, 4)
    states, memory = torch.randn(40, D), torch.randn(132, 16)
    real = counted_for_real(lambda: block(states, memory))
    assert L * real == flops(count(fusion="cross_attention"), "cross_attention")
    # What it computes is attention: against PyTorch's own.
    q, (k, v) = block.query(states), block.key_value(memory).chunk(2, dim=-1)
    oracle = torch.nn.MultiheadAttention(D, 4, bias=False, batch_first=True)
    with torch.no_grad():
        oracle.in_proj_weight.copy_(torch.eye(D).repeat(3, 1))
        oracle.out_proj.weight.copy_(block.output.weight)
    expected = oracle(q[None], k[None], v[None])[0][0]
    torch.testing.assert_close(block(states, memory), expected)
    torch.testing.assert_close(block(states, kept=block.key_value(memory)), expected)


def test_a_generator_that_copies_counts_as_if_every_position_showed_a_word() -> None:
    config = PrefixBertConfig(vocab_size=V, eos_token_id=3, **BERT_SIZES)
    costs = count_costs(None, config, encoded_tokens=0, text_tokens=20)
    model = PrefixBertForCausalLM(config).eval()
    inputs = {"inputs_embeds": torch.randn(1, 20, 32), "shown": torch.randint(0, V, (1, 20, 1))}
    assert counted_for_real(lambda: model(**inputs, use_cache=True, logits_to_keep=1)) == flops(costs, "llm")


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoded_tokens": -1}, "encoded_tokens must be 0 or more, got -1"),
        ({"text_tokens": 0}, "text_tokens must be 1 or more, got 0"),
        ({"passage_tokens": 0}, "passage_tokens must be 1 or more, got 0"),
        ({"tokens_per_page": 0}, "tokens_per_page must be more than 0, got 0"),
        ({"fusion": "deep"}, "fusion must be one of soft_prompt, cross_attention, got 'deep'"),
        ({"attention": "flash"}, "attention must be one of fused, eager, got 'flash'"),
        ({"generator": ViTConfig()}, "generator must be a causal language model, got vit"),
        ({"generator": GPT2Config(n_positions=128)}, "must fit 128 positions .* got 174; lower"),
    ],
)
def test_bad_sizes(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        count(**changes)


def test_encoded_tokens_need_an_encoder() -> None:
    with pytest.raises(ConfigError, match="encoder must be given to encode 5 tokens, got None; set them to 0"):
        count_costs(None, llama(), encoded_tokens=5, text_tokens=5)


def test_rotated_positions_have_no_limit() -> None:
    assert learned_positions(llama()) is None  # 32 positions in its config; the counts above take more
    assert learned_positions(GPT2Config(n_positions=128)) == 128


def test_a_shape_by_name_by_hub_id_and_by_directory(tmp_path: Path) -> None:
    assert shape("openai/clip-vit-large-patch14").to_dict() == SHAPES["vit-l-14"]().to_dict()
    llama(hidden_size=128).save_pretrained(tmp_path)
    assert shape(str(tmp_path)).hidden_size == 128
    with pytest.raises(
        ConfigError, match=r"tower must be one of tinyllama-1.1b, .* got 'no-such/tower' .*check the name"
    ):
        shape("no-such/tower", "tower")


# ---------------------------------------------------------------------------------------------------------- the paper


@pytest.fixture(scope="module")
def table() -> list[dict[str, Any]]:
    return compare_with_paper()


def test_sizes_of_the_paper_models() -> None:
    from transformers import AutoModel, AutoModelForCausalLM

    from vist_rag.evaluation.meters import on_meta

    def parameters(name: str, kind: Any) -> int:
        model = on_meta(lambda: kind.from_config(SHAPES[name]()), "fused", torch.float16)
        return sum(p.numel() for p in model.parameters())

    assert parameters("tinyllama-1.1b", AutoModelForCausalLM) == 1_100_048_384  # the published checkpoint's
    assert parameters("vit-l-14", AutoModel) == 303_179_776
    assert parameters("roberta-large", AutoModel) == 355_359_744


def test_table_1_within_three_per_cent(table: list[dict[str, Any]]) -> None:
    assert len(table) == len(TABLE_1) == 7
    for row in table:
        assert abs(row["reconciled_percent"]) < 3, row
        left_out = sum(row["left_out_tflops"].values())
        assert row["ours_tflops"] - row["reconciled_tflops"] == pytest.approx(left_out, abs=2e-3)
        assert row["ours_tflops"] == pytest.approx(sum(row["parts_tflops"].values()), abs=1e-3)
        if row["method"] == "CEPE*":
            assert row["ours_tflops"] == row["reconciled_tflops"]
        else:
            assert row["ours_percent"] > 10


def test_table_1_by_hand(table: list[dict[str, Any]]) -> None:
    d, layers, t = 2048, 22, 2048
    llm = 2 * (1_100_048_384 - 32000 * d - 45 * d) * t + layers * 4 * t * t * d  # no embeddings, no norms
    for row in table[1:]:
        assert row["parts_tflops"]["llm"] == pytest.approx(llm / 1e12, abs=1e-4)
        n = row["encoded_tokens"] if row["method"] == "CEPE*" else row["encoded_tokens"] * 7 // 1024 * 64
        cross = layers * (2 * linear(t, d, d) + linear(n, 1024, 2 * d) + 4 * t * n * d)
        assert row["parts_tflops"]["cross_attention"] == pytest.approx(cross / 1e12, abs=1e-4)


def test_the_page_in_the_docs_has_these_figures(table: list[dict[str, Any]]) -> None:
    page = Path(__file__).parents[3] / "docs" / "explanation" / "costs.md"
    if not page.is_file():
        pytest.skip("docs are not here")
    text = page.read_text("utf-8")
    for row in table:
        which = f"| {row['method']} | {row['encoded_tokens']:,} | {row['text_tokens']:,} |"
        ours = f"{row['ours_tflops']:.2f} ({row['ours_percent']:+.1f} %)"
        reconciled = f"{row['reconciled_tflops']:.2f} ({row['reconciled_percent']:+.1f} %)"
        assert f"{which} {row['paper_tflops']:.2f} | {ours} | {reconciled} |" in text
        parts = " | ".join(f"{row[name]:.2f}" for name in ("weights_gb", "kv_gb", "activations_gb"))
        gb = f"{row['ours_gb']:.2f} ({row['ours_gb_percent']:+.0f} %)"
        gib = f"{row['ours_gib']:.2f} ({row['ours_gib_percent']:+.0f} %)"
        peak = row["peak_part"].replace("_", "-")
        assert f"{which} {row['paper_gb']:.2f} | {gb} | {gib} | {parts}, {peak} |" in text


def test_slopes_by_hand(table: list[dict[str, Any]]) -> None:
    image, token = slopes(table)
    d, layers, t, n = 2048, 22, 2048, 64
    by_hand = {
        "tower.other": (linear(256, 3 * 14 * 14, 1024) + 24 * linear(257, 1024, 4096, 1024)) / 1e9,
        "tower.projections": 24 * 4 * linear(257, 1024, 1024) / 1e9,
        "tower.scores": 24 * 4 * 257**2 * 1024 / 1e9,
        "cross_attention.projections": layers * linear(n, 1024, 2 * d) / 1e9,
        "cross_attention.scores": layers * 4 * t * n * d / 1e9,
    }
    for name, gflops in by_hand.items():
        assert image["ours"][name] == pytest.approx(gflops, rel=1e-3), name
    assert image["paper"] == pytest.approx((19.52 - 7.72) * 1000 / 84, abs=1e-3)
    left_out = sum(image["ours"][name] for name in image["left_out"])
    assert sum(image["ours"].values()) - left_out == pytest.approx(image["paper"], abs=1.5)
    assert token["left_out"] == []
    assert token["ours"]["cross_attention.scores"] == pytest.approx(layers * 4 * t * d / 1e9, rel=1e-3)
    assert token["paper"] - sum(token["ours"].values()) == pytest.approx(0.04, abs=0.01)
    # Without anything encoded both are TinyLlama with queries and outputs of cross-attention.
    for one in (image, token):
        assert one["ours_base"] == pytest.approx(one["paper_base"], rel=0.01)


@pytest.fixture(scope="module")
def paper_costs() -> ModuleType:
    return load_benchmark("paper_costs")


def test_the_page_in_the_docs_shows_what_was_written(paper_costs: ModuleType, table: list[dict[str, Any]]) -> None:
    result = json.loads((FOLDER / "results" / "paper-costs.json").read_text("utf-8"))
    assert result["rows"] == table
    assert result["slopes"] == slopes(table)
    page = (FOLDER.parent / "docs" / "explanation" / "costs.md").read_text("utf-8")
    shown = paper_costs.tables(result).split("\n\n")
    assert len(shown) == 4
    assert all(f"\n\n{one}\n\n" in page for one in shown)


def test_a_counter_of_operations_sees_nothing_of_attention_in_inference(paper_costs: ModuleType) -> None:
    found = paper_costs.counters()
    projections, scores = found["formula"]["projections"], found["formula"]["scores"]
    assert projections == pytest.approx(4 * linear(257, 1024, 1024) / 1e9, abs=1e-4)
    assert scores == pytest.approx(4 * 257**2 * 1024 / 1e9, abs=1e-4)
    assert found["seen"]["inference"]["FlopCounterMode"] == 0
    assert found["seen"]["inference"]["hooks on nn.Linear"] == found["seen"]["training"]["hooks on nn.Linear"] == 0
    assert found["seen"]["training"]["FlopCounterMode"] >= projections


def test_cross_attention_as_it_is_built_here_has_fewer_heads_of_keys(
    paper_costs: ModuleType, table: list[dict[str, Any]]
) -> None:
    for row, counted in zip(paper_costs.implemented(), [row for row in table if row["method"] == "VIST"], strict=True):
        n = row["encoded_tokens"] * 7 // 1024 * 64
        saved = 22 * linear(n, 1024, 2 * (2048 - 256))  # four heads of 64 where the paper has 32
        whole = counted["parts_tflops"]["llm"] + counted["parts_tflops"]["cross_attention"]
        assert row["tflops"] == pytest.approx(whole - saved / 1e12, abs=1e-3)
