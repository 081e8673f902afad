"""Tiny seeded models built from config, for tests: nothing is downloaded, nothing is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from vist_rag.compression import VistCompressor
from vist_rag.config import FusionConfig, ResamplerConfig
from vist_rag.generation import SoftPromptFusion, VistGenerator
from vist_rag.generation.prefix_bert import PrefixBertConfig, PrefixBertForCausalLM
from vist_rag.rendering import GlyphAtlas
from vist_rag.training.export import save_checkpoint

ATLAS = Path(__file__).parents[2] / "vist_rag" / "assets" / "noto-sans-10px.safetensors"
WORDS = (
    "the river runs from a lake to the sea and the old bridge was built in 1867 by marie curie question answer document"
)
TOWER: dict[str, Any] = {
    "model_type": "vit",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 224,
    "patch_size": 14,
    "num_channels": 1,
}


def tiny_compressor(seed: int = 0, **resampler: Any) -> VistCompressor:
    torch.manual_seed(seed)
    sizes = {"width": 16, "heads": 2, "layers": 1, "tower_layers": (1, -1)} | resampler
    return VistCompressor.build(TOWER, GlyphAtlas.load(ATLAS), resampler=ResamplerConfig(**sizes)).eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    # Listed, not trained: the trainer breaks ties by chance, and another vocabulary is another model.
    letters = sorted(set(WORDS) - {" "})
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *(f"##{letter}" for letter in letters), *WORDS.split()]
    core = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(dict.fromkeys(pieces))}, unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    core.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", bos_token="[CLS]", eos_token="[SEP]"
    )


BERT_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 512,
}


def tiny_generator(seed: int = 0, *, memory_width: int = 16) -> VistGenerator:
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    config = PrefixBertConfig(
        vocab_size=len(tokenizer),
        **BERT_SIZES,
        initializer_range=0.2,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=0,
    )
    fusion = SoftPromptFusion(FusionConfig(memory_width, 32, hidden_width=32, spelling=20))
    model = PrefixBertForCausalLM(config)
    model.tell_apart(8)
    torch.nn.init.normal_(model.copy.local[2].weight, std=0.1)  # which starts from nothing
    return VistGenerator(model, tokenizer, fusion)


def save_tiny_checkpoint(directory: Path, seed: int = 0) -> Path:
    settings = {"budget": {"k_raw": 0, "k_memory": 2, "latents": 16}, "max_new_tokens": 6}
    return save_checkpoint(directory, tiny_compressor(seed), tiny_generator(seed), settings=settings)
