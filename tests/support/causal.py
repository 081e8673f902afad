"""Tiny causal language models of several families, each with a tokenizer of its own kind."""

from __future__ import annotations

import json
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from tests.support.tiny import WORDS, tiny_generator
from vist_rag.config import FusionConfig
from vist_rag.generation import CrossAttentionFusion, SoftPromptFusion, VistGenerator

FAMILIES = ("prefix_bert", "llama", "gpt2", "qwen3")
SOFT_ONLY = ("gpt2",)
"""Families whose layers are of no shape that takes cross-attention."""
FUSED = [
    *((family, "soft_prompt") for family in FAMILIES),
    *((family, "cross_attention") for family in FAMILIES if family not in SOFT_ONLY),
]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


def byte_level_tokenizer(*special: str, **names: Any) -> PreTrainedTokenizerFast:
    """As GPT-2's and Qwen's: nothing is unknown, nothing is put before a text."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=list(special), initial_alphabet=_BYTES, show_progress=False
    )
    core.train_from_iterator([f"{WORDS} {WORDS.title()}"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama's: ``<s>`` opens a text, spaces are part of the words, unknown characters are bytes."""
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>"]
    core.train_from_iterator(
        [WORDS] * 3, trainers.BpeTrainer(vocab_size=140, special_tokens=special, show_progress=False)
    )
    state = json.loads(core.to_str())
    vocabulary = state["model"]["vocab"]
    vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    core = Tokenizer.from_str(json.dumps(state))
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def causal_generator(family: str, *, memory_width: int = 16, seed: int = 0) -> VistGenerator:
    """A generator of random weights, large enough that what it writes depends on what it reads."""
    if family == "prefix_bert":
        return tiny_generator(seed, memory_width=memory_width)
    sizes: dict[str, Any] = {"initializer_range": 0.3, "hidden_size": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "max_position_embeddings": 256}
    if family == "llama":
        tokenizer = metaspace_tokenizer()
        config: Any = LlamaConfig(
            **sizes, intermediate_size=48, num_key_value_heads=2, bos_token_id=1, eos_token_id=2,
            vocab_size=len(tokenizer),
        )  # fmt: skip
    elif family == "gpt2":
        end = "<|endoftext|>"
        tokenizer = byte_level_tokenizer(end, eos_token=end, bos_token=end)
        config = GPT2Config(
            initializer_range=0.3, n_embd=32, n_layer=2, n_head=4, n_positions=256, vocab_size=340,
            bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
    else:
        special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
        tokenizer = byte_level_tokenizer(*special, eos_token=special[2], pad_token=special[0])
        tokenizer.chat_template = CHATML
        config = Qwen3Config(
            **sizes, intermediate_size=48, num_key_value_heads=2, head_dim=8, vocab_size=340,
            bos_token_id=None, eos_token_id=2, pad_token_id=0, tie_word_embeddings=True,
        )  # fmt: skip
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    # Half characters and control characters make poor answers.
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    model.generation_config.suppress_tokens = [
        i for i, text in enumerate(texts) if not (text.isascii() and text.isprintable())
    ]
    return VistGenerator(model, tokenizer, SoftPromptFusion(FusionConfig(memory_width, 32, hidden_width=32)))


def fused_generator(family: str, fusion: str, *, memory_width: int = 16, seed: int = 0) -> VistGenerator:
    """A generator of random weights that reads memory by this fusion."""
    generator = causal_generator(family, memory_width=memory_width, seed=seed)
    if fusion == "soft_prompt":
        return generator
    cross = CrossAttentionFusion.for_model(generator.model, memory_width)
    taught(cross)
    return VistGenerator(generator.model, generator.tokenizer, cross)


def taught(fusion: CrossAttentionFusion) -> None:
    """Output projections of random weights: a fresh fusion adds nothing to what the model says."""
    for block in fusion.blocks.values():
        torch.nn.init.normal_(block.output.weight, std=0.5)
