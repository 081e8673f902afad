"""Models of full shape with random weights, made where they run, for ``benchmarks/full_shape.py``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPVisionConfig, LlamaConfig, PreTrainedConfig

from vist_rag.checkpoint import embedded_checkpoint
from vist_rag.compression import VistCompressor
from vist_rag.config import FusionConfig, ResamplerConfig
from vist_rag.evaluation.paper_costs import SHAPES, TABLE_1
from vist_rag.generation import CrossAttentionFusion, SoftPromptFusion, VistGenerator
from vist_rag.training.parts import atlas
from vist_rag.training.recipe import load_recipe

SEED = 0
FUSIONS = ("soft_prompt", "cross_attention")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Shape:
    """A generator with a tower, and what it is asked.

    Attributes:
        generator: Of the generator. Its context is made long enough: what a position costs does not depend on it.
        tower: Of the vision tower.
        resampler: Of the resampler.
        points: ``(T_e, T_d)`` of Table 1: tokens read as memory, and as text.
        ks: Passages that are read.
        words: Of a passage.
        sequence: Tokens as memory, and tokens to be told, of a training sequence.
        batch: Sequences of one pass in training.
    """

    generator: PreTrainedConfig
    tower: PreTrainedConfig
    resampler: ResamplerConfig
    points: tuple[tuple[int, int], ...]
    ks: tuple[int, ...]
    words: int
    sequence: tuple[int, int]
    batch: int


def shapes(*, tiny: bool) -> dict[str, Shape]:
    """The shapes by name, the smaller one first."""
    recipe = load_recipe("paper")
    (stage,) = recipe["stages"]
    if tiny:
        lm = LlamaConfig(
            vocab_size=8192, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=4096,
        )  # fmt: skip
        tower = CLIPVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=224,
            patch_size=14,
        )  # fmt: skip
        sizes = ResamplerConfig(width=32, heads=2, layers=1)
        return {"tiny": Shape(lm, tower, sizes, ((0, 64), (292, 32)), (1, 2), 100, (292, 16), 2)}
    one = Shape(
        long_context(SHAPES["tinyllama-1.1b"]()),
        SHAPES["vit-l-14"](),
        ResamplerConfig(**recipe["resampler"]),
        tuple(dict.fromkeys((row.encoded_tokens, row.text_tokens) for row in TABLE_1)),
        (5, 10, 20, 50, 100),
        100,
        tuple(recipe["data"]["sequence"]),
        int(stage["batch"]),
    )
    llama3 = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, rope_theta=500000.0,
    )  # fmt: skip
    return {"tinyllama-1.1b": one, "llama3-8b": replace(one, generator=long_context(llama3))}


def long_context(config: Any) -> Any:
    """The config with positions enough for a hundred passages as text."""
    config.max_position_embeddings = 32768
    return config


def build_fusion(kind: str, lm: Any, memory_width: int) -> SoftPromptFusion:
    """A fresh fusion of ``FUSIONS`` for a generator."""
    if kind == "cross_attention":
        return CrossAttentionFusion.for_model(lm, memory_width)
    width = lm.get_input_embeddings().weight.shape[1]
    return SoftPromptFusion(FusionConfig(memory_width, width, hidden_width=2 * width))


# ---------------------------------------------------------------------------------------------------------- the models


class Models:
    """The parts of one shape on one device, each built when it is first asked for, with weights made there.

    Args:
        shape: Their sizes.
        device: Where they are.
        dtype: Of their weights.
    """

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype) -> None:
        self.shape, self.device, self.dtype = shape, device, dtype
        self.tokenizer = AutoTokenizer.from_pretrained(str(embedded_checkpoint() / "generator"))
        self._fused: tuple[str, VistGenerator] | None = None

    @cached_property
    def lm(self) -> Any:
        """The generator's language model."""
        torch.manual_seed(SEED)
        with torch.device(self.device):
            return AutoModelForCausalLM.from_config(self.shape.generator, dtype=self.dtype).eval()

    @cached_property
    def compressor(self) -> VistCompressor:
        """Tower and resampler."""
        torch.manual_seed(SEED)
        glyphs = atlas({})
        with torch.device(self.device):
            made = VistCompressor.build(self.shape.tower, glyphs, resampler=self.shape.resampler)
        return made.to(self.device, self.dtype).eval()

    def generator(self, fusion: str | None) -> VistGenerator:
        """The language model with a fusion, one at a time; None: for text alone."""
        if fusion is None:
            return VistGenerator(self.lm, self.tokenizer, prefix_cache_bytes=0)
        if self._fused is None or self._fused[0] != fusion:
            self._fused = None
            torch.manual_seed(SEED)
            with torch.device(self.device):
                made = build_fusion(fusion, self.lm, self.shape.resampler.memory_width).to(self.dtype)
            self._fused = fusion, VistGenerator(self.lm, self.tokenizer, made, prefix_cache_bytes=0)
        return self._fused[1]


def weight_bytes(*modules: nn.Module) -> int:
    """Bytes of all parameters, each once."""
    weights = {id(w): w for module in modules for w in module.parameters()}
    return sum(w.numel() * w.element_size() for w in weights.values())
