"""What a recipe trains: a compressor and a generator, from pretrained models or a sentence encoder; what is frozen."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, decoders, processors
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from vist_rag.compression import VistCompressor
from vist_rag.compression.vision import tower_config
from vist_rag.config import FusionConfig, RendererConfig, ResamplerConfig
from vist_rag.errors import CheckpointError, ConfigError, MissingDependencyError
from vist_rag.generation import CrossAttentionFusion, SoftPromptFusion, VistGenerator
from vist_rag.generation.prefix_bert import PrefixBertConfig, PrefixBertForCausalLM
from vist_rag.generation.words import word_embeddings
from vist_rag.references import resolve
from vist_rag.rendering import GlyphAtlas, Renderer
from vist_rag.retrieval.embedder import DEFAULT_MODEL, offline_files

if TYPE_CHECKING:
    from vist_rag.training.reading import MemoryReading


class SizesOfCompressor(VistCompressor):
    """A compressor on PyTorch's ``meta`` device: its weights have shapes and no values, and it renders all the same."""

    pages: Renderer

    @property
    def renderer(self) -> Renderer:
        """The renderer, on the CPU."""
        return self.pages


def build_compressor(recipe: Mapping[str, Any], *, meta: bool = False) -> VistCompressor:
    """The compressor of a recipe: its ``[tower]`` (pretrained, or sizes of a fresh one) and a fresh ``[resampler]``.

    Args:
        recipe: What ``load_recipe`` read.
        meta: Shapes alone, on PyTorch's ``meta`` device: no weights are downloaded or read.
    Raises:
        CheckpointError: If a pretrained tower is missing or cannot be read.
        ConfigError: If sizes do not fit each other.
    """
    tower: dict[str, Any] = dict(recipe["tower"])
    source: Any = tower
    if pretrained := tower.get("pretrained"):
        source = resolve(pretrained, tower.get("revision"), weights=not meta)
    renderer = RendererConfig(**recipe["renderer"]) if "renderer" in recipe else None
    resampler, glyphs = ResamplerConfig(**recipe.get("resampler", {})), atlas(recipe)
    if not meta:
        return VistCompressor.build(source, glyphs, renderer=renderer, resampler=resampler)
    if isinstance(source, Path):
        try:
            source = tower_config(source)
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"tower {pretrained} cannot be loaded ({error}); check the name.") from error
    with torch.device("meta"):
        sizes = cast(SizesOfCompressor, SizesOfCompressor.build(source, glyphs, renderer=renderer, resampler=resampler))
    sizes.pages = Renderer(glyphs.on_strip(sizes.renderer_config.patch_size_px), sizes.renderer_config)
    return sizes


_OF_SPELLING = ("norm_in", "project_spelling", "project_salience")
"""Of a resampler, what the spelling of a latent depends on, and what was measured of its words."""


def atlas(recipe: Mapping[str, Any]) -> GlyphAtlas:
    """The glyphs that a recipe renders with: those of the package, or of a file."""
    name = recipe.get("font_atlas", "assets")
    if name == "assets":
        return GlyphAtlas.load(Path(str(files("vist_rag"))) / "assets" / "noto-sans-10px.safetensors")
    return GlyphAtlas.load(name)


def fusion_config(recipe: Mapping[str, Any], sizes: ResamplerConfig, generator_width: int) -> FusionConfig:
    """Sizes of a fresh fusion."""
    settings = recipe["generator"]
    return FusionConfig(
        sizes.memory_width,
        generator_width,
        hidden_width=settings.get("projector_width", 2 * generator_width),
        spelling=settings.get("spelling", 0),
        spelling_width=sizes.spelling_width,
        packer_width=settings.get("packer_width", 0),
    )


def fresh_fusion(settings: Mapping[str, Any], config: FusionConfig, model: PreTrainedModel) -> SoftPromptFusion:
    """The fusion that a recipe's ``[generator]`` asks for, untaught.

    Args:
        settings: ``fusion`` (a soft prompt unless it says otherwise); ``every``, ``direct`` and ``pointed`` of
            cross-attention.
        config: Its sizes.
        model: The generator's; on the meta device, so is the fusion.
    Raises:
        ConfigError: If the model's layers take no cross-attention.
    """
    meta = model.device.type == "meta"
    with torch.device("meta") if meta else nullcontext():
        if settings.get("fusion", "soft_prompt") == "cross_attention":
            fusion: SoftPromptFusion = CrossAttentionFusion.for_model(
                model,
                config.memory_width,
                every=settings.get("every", 1),
                direct=settings.get("direct", True),
                pointed=settings.get("pointed", False),
                reads=config,
            )
        else:
            fusion = SoftPromptFusion(config)
    if not meta:
        fusion.match_scale(word_embeddings(model).detach().float())
    return fusion


def pretrained_generator(recipe: Mapping[str, Any], sizes: ResamplerConfig, *, meta: bool = False) -> VistGenerator:
    """Any causal LM with a fresh fusion; with ``[generator.lora]``, adapters are put into its layers.

    Args:
        recipe: What ``load_recipe`` read.
        sizes: Of the compressor.
        meta: Shapes alone, on PyTorch's ``meta`` device, with the tokenizer: no weights are downloaded or read.
    Raises:
        CheckpointError: If the model is missing or cannot be read.
        ConfigError: If the dtype is unknown, or peft refuses the adapter's settings.
        MissingDependencyError: If adapters are asked for and peft is missing, or 4 bits and bitsandbytes.
    """
    settings = recipe["generator"]
    quantize = settings.get("quantize")
    name = settings.get("dtype", "bfloat16" if quantize else "float32")
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ConfigError(f"dtype must be one of float32, bfloat16, float16, got {name!r}.")
    directory = resolve(settings["pretrained"], settings.get("revision"), weights=not meta)
    if meta:
        generator = _sizes_of_generator(directory, dtype)
    else:
        generator = VistGenerator.from_pretrained(directory, device="cpu", dtype=dtype, quantize=quantize)
    model = generator.model
    width = cast(Tensor, model.get_input_embeddings().weight).shape[1]
    if lora := settings.get("lora"):
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError as error:
            raise MissingDependencyError("[generator.lora]", "peft", "train") from error
        try:
            with torch.device("meta") if meta else nullcontext():
                model = cast(Any, get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **lora)))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"[generator.lora] must be settings of peft's LoraConfig ({error}).") from error
    fusion = fresh_fusion(settings, fusion_config(recipe, sizes, width), model)
    return VistGenerator(model, generator.tokenizer, fusion)


def _sizes_of_generator(directory: Path, dtype: torch.dtype) -> VistGenerator:
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(str(directory)), dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(str(directory))
    except Exception as error:  # a torn tokenizer and bad JSON each raise a class of their own
        raise CheckpointError(f"generator {directory} cannot be loaded ({error}); restore its files.") from error
    return VistGenerator(model, tokenizer)


def base_model(name: str) -> Path:
    """Directory of a base model: a path, the packaged encoder, or a hub id (downloaded)."""
    if name == DEFAULT_MODEL and not Path(name).is_dir() and (packaged := offline_files()):
        return packaged
    return resolve(name, None)


def plain(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer, without padding and truncation."""
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def written_decoder() -> decoders.Decoder:
    """Tokens to text as people write it: BERT's tokens stand apart at every hyphen, apostrophe and comma."""
    spaced = {
        r"(?<=\w) - (?=\w)": "-",
        r"(?<=\w) / (?=\w)": "/",
        r"(?<=\w) ' (?=\w)": "'",
        r"(?<=\b\d|\b\d\d|\b\d\d\d), (?=\d\d\d\b)": ",",
        r"(?<=\d)\. (?=\d)": ".",
        r"(?<=\d) %": "%",
        r"(?<=[(\[]) | (?=[)\]])": "",
    }
    written = [decoders.Replace(Regex(pattern), content) for pattern, content in spaced.items()]
    return decoders.Sequence([decoders.WordPiece(), decoders.Fuse(), *written])


def sentence_generator(
    recipe: Mapping[str, Any], sizes: ResamplerConfig, tokenizer: Tokenizer, old_ids: list[int]
) -> VistGenerator:
    """A generator whose layers come from a BERT-like encoder (``base``), with a pruned vocabulary."""
    base = base_model(recipe["generator"]["base"])
    fields = json.loads((base / "config.json").read_text())
    begin, end, pad = (tokenizer.token_to_id(name) for name in ("[CLS]", "[SEP]", "[PAD]"))
    config = PrefixBertConfig(
        **{
            name: fields[name]
            for name in (
                "hidden_size",
                "num_hidden_layers",
                "num_attention_heads",
                "intermediate_size",
                "max_position_embeddings",
            )
        },
        vocab_size=len(old_ids),
        copy_width=recipe["generator"].get("copy_width", 0),
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        bos_token_id=begin,
        eos_token_id=end,
        pad_token_id=pad,
    )
    model = PrefixBertForCausalLM(config)
    state = {f"bert.{k}": v for k, v in load_file(str(base / "model.safetensors")).items() if "pooler" not in k}
    words = "bert.embeddings.word_embeddings.weight"
    state[words] = state[words][torch.tensor(old_ids)]
    state = {name: tensor for name, tensor in state.items() if name in dict(model.named_parameters())}
    model.load_state_dict(state, strict=False)
    model.tie_weights()
    with torch.no_grad():
        # The head starts as the identity: a state is compared with the word embeddings as it is.
        model.cls.predictions.transform.dense.weight.copy_(torch.eye(config.hidden_size))
    tokenizer.decoder = written_decoder()
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", begin)])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        bos_token="[CLS]",
        eos_token="[SEP]",
        model_max_length=config.max_position_embeddings,
    )
    fusion = fresh_fusion(recipe["generator"], fusion_config(recipe, sizes, config.hidden_size), model)
    return VistGenerator(model, wrapped, fusion)


def train_only(model: MemoryReading, parts: Sequence[str], *, generator_runs: bool = True) -> None:
    """Freeze all but the named parts (``recipe.PARTS``); without the generator, also what only it learns from.

    Raises:
        ConfigError: If adapters are to be trained and the generator has none.
    """
    model.requires_grad_(False)
    embeddings = model.lm.get_input_embeddings()
    if "tower" in parts:
        model.compressor.tower.requires_grad_(True)
    if "resampler" in parts:
        for name, child in model.compressor.named_children():
            child.requires_grad_(name != "tower" or "tower" in parts)
    if "projector" in parts:
        model.fusion.requires_grad_(True)
    if "meaning" in parts:
        model.fusion.projector.requires_grad_(True)
        for name, weight in model.compressor.resampler.named_parameters():
            if name.partition(".")[0] not in _OF_SPELLING:
                weight.requires_grad_(True)
    if "packer" in parts and model.fusion.packer is not None:
        model.fusion.packer.requires_grad_(True)
    if not generator_runs:
        model.fusion.boundaries.requires_grad_(False)
        if model.fusion.packer is not None:
            model.fusion.packer.requires_grad_(False)
    if "boundaries" in parts:
        model.fusion.boundaries.requires_grad_(True)
    if "generator" in parts:
        for name, weight in model.lm.named_parameters():
            weight.requires_grad_("lora_" not in name)
        embeddings.requires_grad_("embeddings" in parts)
    elif "embeddings" in parts:
        embeddings.requires_grad_(True)
    if "lora" in parts:
        adapters = [weight for name, weight in model.lm.named_parameters() if "lora_" in name]
        if not adapters:
            raise ConfigError("train must name lora only where [generator.lora] sets adapters up, got none.")
        for weight in adapters:
            weight.requires_grad_(True)
