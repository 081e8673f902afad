"""Tiny causal language models of the families that people use, each with a tokenizer and a chat template of its kind.

The configs are of the real classes; weights are random, and the templates say what each family's does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2Tokenizer,
    Qwen3Config,
)

from tests.support.tiny import WORDS, tiny_generator
from vist_rag.config import FusionConfig
from vist_rag.generation import CrossAttentionFusion, SoftPromptFusion, VistGenerator

_BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


# ---------------------------------------------------------------------------------------------------------- tokenizers


def byte_level_tokenizer(*special: str, opens: bool = False, **names: Any) -> PreTrainedTokenizerFast:
    """As GPT-2's and Qwen's: nothing is unknown, nothing is put before a text; or what ``opens`` it (Llama-3)."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=list(special), initial_alphabet=_BYTES, show_progress=False
    )
    core.train_from_iterator([f"{WORDS} {WORDS.title()}"] * 3, trainer)
    if opens:
        core.post_processor = processors.TemplateProcessing(single=f"{special[0]} $A", special_tokens=[(special[0], 0)])
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)


def metaspace_tokenizer(
    *special: str, opening: str = "<s>", prepends: bool = True, **names: Any
) -> PreTrainedTokenizerFast:
    """As Llama's: ``<s>`` opens a text, spaces are part of the words, unknown characters are bytes.

    Gemma's is of this kind too, and puts no space before a text (``prepends``).
    """
    special = special or ("<unk>", "<s>", "</s>")
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    spaces = [normalizers.Replace(" ", "▁")]
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *spaces] if prepends else spaces)
    written = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    core.decoder = decoders.Sequence([*written, decoders.Strip(" ", 1, 0)] if prepends else written)
    core.train_from_iterator(
        [WORDS] * 3, trainers.BpeTrainer(vocab_size=140, special_tokens=list(special), show_progress=False)
    )
    state = json.loads(core.to_str())
    vocabulary = state["model"]["vocab"]
    vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    core = Tokenizer.from_str(json.dumps(state))
    core.post_processor = processors.TemplateProcessing(
        single=f"{opening} $A", special_tokens=[(opening, special.index(opening))]
    )
    names = {"eos_token": "</s>"} | names
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token=opening, **names)


_gemma_tokenizer = partial(
    metaspace_tokenizer,
    *("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"),
    opening="<bos>",
    prepends=False,
    eos_token="<eos>",
    pad_token="<pad>",
)
_QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_qwen_tokenizer = partial(byte_level_tokenizer, *_QWEN, eos_token=_QWEN[2], pad_token=_QWEN[0])


def _qwen2_tokenizer() -> PreTrainedTokenizerFast:
    """Of Qwen's own class: transformers loads every tokenizer beside a Qwen2 as one."""
    core = json.loads(_qwen_tokenizer().backend_tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in core["merges"]]
    names: dict[str, Any] = {"eos_token": _QWEN[2], "pad_token": _QWEN[0], "extra_special_tokens": [_QWEN[1]]}
    return Qwen2Tokenizer(vocab=core["vocab"], merges=merges, **names)


# ----------------------------------------------------------------------------------------------------------- templates

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_TAKES_TURNS = (
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('user and assistant must take turns') }}{% endif %}"
)
_GEMMA_TURNS = (
    "{% for message in messages %}"
    + _TAKES_TURNS
    + "<start_of_turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n{{ first if loop.first }}"
    "{{ message['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
_APART = (  # what the system says is no turn
    "{% set first = '' %}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}"
    "{% set messages = messages[1:] %}{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    # A system prompt of its own, where the conversation has none.
    "qwen2": "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou answer.<|im_end|>\n{% endif %}" + CHATML,
    # No <s>: the tokenizer brings it.
    "tinyllama": "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    "llama3": "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>"
    "\n\n{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
    "mistral": _APART
    + "{{ bos_token }}{% for message in messages %}"
    + _TAKES_TURNS
    + "{% if message['role'] == 'user' %}[INST] {{ first if loop.first }}{{ message['content'] }}[/INST]"
    "{% else %} {{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}",
    "gemma": "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}{{ bos_token }}"
    + _GEMMA_TURNS,
    "gemma3": _APART + "{{ bos_token }}" + _GEMMA_TURNS,
}


# ------------------------------------------------------------------------------------------------------------ families


@dataclass(frozen=True)
class Family:
    """What a family's models have of their own.

    Attributes:
        config: Class of the config.
        tokenizer: Makes one of its kind.
        template: Name in ``TEMPLATES``; None: no chat template.
        ends: Tokens that end an answer, beside the tokenizer's.
        own: Fields of the config.
    """

    config: Callable[..., PreTrainedConfig]
    tokenizer: Callable[[], PreTrainedTokenizerFast]
    template: str | None = None
    ends: tuple[str, ...] = ()
    own: Mapping[str, Any] = field(default_factory=dict)


_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 256}
_GATED = _SIZES | {"intermediate_size": 48, "num_key_value_heads": 2}
_HEADS = _GATED | {"head_dim": 8}
_WINDOW = 24
_EITHER: dict[str, Any] = {"sliding_window": _WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
# With larger weights its scaled embeddings drown what layers add: it says one thing whatever it reads.
_EITHER |= {"initializer_range": 0.05}
_LLAMA3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_END = "<|endoftext|>"
TABLE = {
    "llama": Family(LlamaConfig, metaspace_tokenizer, own=_GATED),
    "gpt2": Family(
        GPT2Config,
        partial(byte_level_tokenizer, _END, eos_token=_END, bos_token=_END),
        own={"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
    ),
    "qwen3": Family(Qwen3Config, _qwen_tokenizer, "chatml", own=_HEADS | {"tie_word_embeddings": True}),
    "qwen2": Family(Qwen2Config, _qwen2_tokenizer, "qwen2", (_END,), own=_GATED),
    "tinyllama": Family(LlamaConfig, metaspace_tokenizer, "tinyllama", own=_GATED),
    "llama3": Family(
        LlamaConfig,
        partial(byte_level_tokenizer, *_LLAMA3, opens=True, bos_token=_LLAMA3[0], eos_token=_LLAMA3[4]),
        "llama3",
        (_LLAMA3[1],),
        own=_GATED
        | {
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "mistral": Family(
        MistralConfig,
        partial(metaspace_tokenizer, "<unk>", "<s>", "</s>", "[INST]", "[/INST]"),
        "mistral",
        own=_GATED | {"sliding_window": _WINDOW},
    ),
    "gemma": Family(GemmaConfig, _gemma_tokenizer, "gemma", ("<end_of_turn>",), own=_HEADS),
    "gemma2": Family(Gemma2Config, _gemma_tokenizer, "gemma", ("<end_of_turn>",), own=_HEADS | _EITHER),
    "gemma3": Family(Gemma3TextConfig, _gemma_tokenizer, "gemma3", ("<end_of_turn>",), own=_HEADS | _EITHER),
}
FAMILIES = ("prefix_bert", *TABLE)
SOFT_ONLY = ("gpt2",)
"""Families whose layers are of no shape that takes cross-attention."""
FUSED = [
    *((family, "soft_prompt") for family in FAMILIES),
    *((family, "cross_attention") for family in FAMILIES if family not in SOFT_ONLY),
    ("prefix_bert", "pointed"),
]
"""Each family with each fusion that it can take; ``pointed``: cross-attention whose memory can be copied from."""


def causal_generator(family: str, *, memory_width: int = 16, seed: int = 0) -> VistGenerator:
    """A generator of random weights, large enough that what it writes depends on what it reads."""
    if family == "prefix_bert":
        return tiny_generator(seed, memory_width=memory_width)
    kind = TABLE[family]
    tokenizer = kind.tokenizer()
    if kind.template:
        tokenizer.chat_template = TEMPLATES[kind.template]
    ends = [tokenizer.eos_token_id, *map(tokenizer.convert_tokens_to_ids, kind.ends)]
    fields: dict[str, Any] = {
        "initializer_range": 0.3,
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": ends if kind.ends else ends[0],
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = kind.config(**fields | kind.own)
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
    pointed = fusion == "pointed"
    sizes = replace(generator.fusion.config, attention=None)
    cross = CrossAttentionFusion.for_model(
        generator.model, memory_width, direct=not pointed, pointed=pointed, reads=sizes if pointed else None
    )
    taught(cross)
    return VistGenerator(generator.model, generator.tokenizer, cross)


def taught(fusion: CrossAttentionFusion) -> None:
    """Output projections of random weights: a fresh fusion adds nothing to what the model says."""
    for block in fusion.blocks.values():
        torch.nn.init.normal_(block.output.weight, std=0.5)
