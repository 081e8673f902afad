"""Teach the baselines, and VIST again beside them: one start, one generator, the same data, steps and seed for all."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import BertConfig, BertModel

from vist_rag.compression import PassageCompressor, TextCompressor, VistCompressor
from vist_rag.compression.text import DIGITS
from vist_rag.compression.vision import VisionTower
from vist_rag.config import ResamplerConfig
from vist_rag.errors import ConfigError
from vist_rag.generation import SoftPromptFusion, VistGenerator
from vist_rag.pipeline import find_checkpoint, load_compressor
from vist_rag.training.recipe import RecipeRun, base_model, plain


def recipe_runs(recipe: dict[str, Any], data: Path, output: Path) -> list[RecipeRun]:
    """What a recipe asks for: one run, or one for each of its ``[compressors]``, in a folder of its own."""
    if "compressors" not in recipe:
        return [RecipeRun(recipe, data, output)]
    return [
        BaselineRun({**recipe, "compressor": {"kind": name, **settings}}, data, output / name)
        for name, settings in recipe["compressors"].items()
    ]


KINDS = ("vist", "text_encoder", "text_encoder_flat", "mean_pool")


class BaselineRun(RecipeRun):
    """A recipe whose ``[start]`` names a finished checkpoint: its generator stays as it is, its compressor is replaced.

    ``kind`` in ``[compressor]``: ``vist`` (the checkpoint's vision tower, a fresh resampler), ``text_encoder`` (a text
    encoder in the tower's place, a fresh resampler), ``text_encoder_flat`` (the same without a resampler: a latent a
    token), ``mean_pool`` (the generator's token embeddings, pooled in windows and projected).
    """

    def parts(self) -> tuple[PassageCompressor, VistGenerator]:
        """A compressor and a fusion with fresh weights, and the generator of the checkpoint."""
        torch.manual_seed(self.seed)
        directory = self._checkpoint()
        generator = VistGenerator.from_pretrained(directory / "generator", fusion=directory / "fusion", device="cpu")
        compressor, old = self._compressor(generator), generator.fusion
        spelling_width = compressor.resampler_config.spelling_width
        config = replace(
            old.config, memory_width=compressor.memory_width, spelling_width=spelling_width, fingerprint=""
        )
        if isinstance(compressor, TextCompressor):
            window = compressor.window
            config = replace(config, spelling=0, spelling_width=window * DIGITS, tokens=window)
        fusion = SoftPromptFusion(config)
        fusion.match_scale(cast(Tensor, generator.model.get_input_embeddings().weight))
        fusion.boundaries.data.copy_(old.boundaries)  # the generator knows these
        return compressor, VistGenerator(generator.model, generator.tokenizer, fusion)

    def tokenizer(self) -> tuple[Tokenizer, list[int]]:
        """The generator's tokenizer, and the id that each of its tokens has in the base model."""
        own = plain(Tokenizer.from_file(str(self._checkpoint() / "generator" / "tokenizer.json")))
        full = Tokenizer.from_file(str(base_model(self.recipe["generator"]["base"]) / "tokenizer.json"))
        pieces = sorted(own.get_vocab().items(), key=lambda item: item[1])
        return own, [cast(int, full.token_to_id(piece)) for piece, _ in pieces]

    def _checkpoint(self) -> Path:
        name = self.recipe["start"]["checkpoint"]
        return find_checkpoint(None if name == "embedded" else name)

    def _compressor(self, generator: VistGenerator) -> PassageCompressor:
        """The compressor that the recipe names."""
        settings: dict[str, Any] = self.recipe["compressor"]
        kind, window = settings["kind"], int(settings.get("window", 1))
        if kind not in KINDS:
            raise ConfigError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}.")
        sizes = ResamplerConfig(**settings.get("resampler", {}))
        if kind == "vist":
            shipped = cast(VistCompressor, load_compressor(self._checkpoint(), device="cpu"))
            return VistCompressor.build(
                cast(VisionTower, shipped.tower).model, self.atlas, renderer=shipped.renderer_config, resampler=sizes
            )
        tokenizer, old_ids = self.tokenizer()
        if kind == "mean_pool":
            encoder: Any = cast(Tensor, generator.model.get_input_embeddings().weight).detach()
        else:
            encoder = _text_encoder(base_model(self.recipe["generator"]["base"]), old_ids)
        return TextCompressor.build(
            encoder,
            tokenizer,
            begin_token_id=cast(int, generator.tokenizer.bos_token_id),
            page_tokens=window * sizes.latents_per_page,
            pooled=kind != "text_encoder",
            resampler=sizes,
        )


def _text_encoder(base: Path, old_ids: list[int]) -> BertModel:
    """The base model's layers, with the embeddings of the generator's vocabulary."""
    fields = json.loads((base / "config.json").read_text())
    config = BertConfig(**{k: v for k, v in fields.items() if k not in ("architectures", "model_type")})
    config.vocab_size = len(old_ids)
    model: BertModel = BertModel(config, add_pooling_layer=False).eval()
    state = load_file(str(base / "model.safetensors"))
    words = "embeddings.word_embeddings.weight"
    state[words] = state[words][torch.tensor(old_ids)]
    model.load_state_dict({k: v for k, v in state.items() if k in model.state_dict()})
    return model
