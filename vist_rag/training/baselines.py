"""Teach the baselines, and VIST again beside them: one start, one generator, the same data, steps and seed for all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import BertConfig, BertModel

from vist_rag.checkpoint import find_checkpoint, load_compressor
from vist_rag.compression import PassageCompressor, TextCompressor, VistCompressor
from vist_rag.compression.text import DIGITS
from vist_rag.compression.vision import VisionTower
from vist_rag.config import ResamplerConfig
from vist_rag.errors import ConfigError
from vist_rag.generation import SoftPromptFusion, VistGenerator
from vist_rag.generation.prefix_bert import PrefixBertForCausalLM
from vist_rag.generation.words import word_embeddings
from vist_rag.training.parts import atlas, base_model, fresh_fusion, plain
from vist_rag.training.recipe import override
from vist_rag.training.run import RecipeRun


def recipe_runs(
    recipe: Mapping[str, Any], data: Path, output: Path, *, only: str | None = None, **options: Any
) -> list[RecipeRun]:
    """What a recipe asks for: one run, or one for each of its ``[compressors]`` or ``[ablations]``, each in its folder.

    Args:
        recipe: What ``load_recipe`` read.
        data: Folder of the data.
        output: Folder of the runs.
        only: Names of runs, separated by commas; None means all.
        **options: ``skip_bad`` and ``judge`` of ``RecipeRun``.
    Raises:
        ConfigError: If ``only`` names no run.
    """
    kinds, ablations = recipe.get("compressors", {}), recipe.get("ablations", {})
    known = [*kinds, *ablations]
    names = known if only is None else only.split(",")
    if unknown := [name for name in names if name not in known]:
        listed = ", ".join(known) or "none (this recipe is one run)"
        raise ConfigError(f"--only must name runs among {listed}, got {unknown[0]!r}.")
    plans = dict.fromkeys(names, recipe) or {"": recipe}
    plans |= {name: {**recipe, "compressor": {"kind": name, **kinds[name]}} for name in names if name in kinds}
    plans |= {name: override(recipe, ablations[name].get("set", ())) for name in names if name in ablations}

    def run_of(plan: Mapping[str, Any]) -> type[RecipeRun]:
        return BaselineRun if "compressor" in plan else ContinuedRun if "start" in plan else RecipeRun

    return [run_of(plan)(plan, data, output / name, **options) for name, plan in plans.items()]


class ContinuedRun(RecipeRun):
    """A recipe whose ``[start]`` names a finished checkpoint, a directory or ``embedded``: it is taught further."""

    def parts(self) -> tuple[PassageCompressor, VistGenerator]:
        """Compressor and generator of the checkpoint."""
        torch.manual_seed(self.seed)
        directory = self._checkpoint()
        generator = VistGenerator.from_pretrained(directory / "generator", fusion=directory / "fusion", device="cpu")
        generator.fusion.bind("")  # what is trained on becomes another compressor
        wanted = self.recipe.get("generator", {})
        model = generator.model
        if (width := wanted.get("copy_width", 0)) and isinstance(model, PrefixBertForCausalLM) and not model.copy.local:
            model.tell_apart(width)
        if "fusion" in wanted:
            return load_compressor(directory, device="cpu"), entered_anew(generator, wanted)
        if (width := wanted.get("packer_width", 0)) and generator.fusion.packer is None:
            fusion = SoftPromptFusion(replace(generator.fusion.config, packer_width=width))
            fusion.load_state_dict(generator.fusion.state_dict(), strict=False)
            generator.fusion = fusion
        return load_compressor(directory, device="cpu"), generator

    def tokenizer(self) -> tuple[Tokenizer, list[int]]:
        """The generator's tokenizer, and the id that each of its tokens has in the base model."""
        own = plain(Tokenizer.from_file(str(self._checkpoint() / "generator" / "tokenizer.json")))
        if "base" not in self.recipe.get("generator", {}):
            return own, []
        full = Tokenizer.from_file(str(base_model(self.recipe["generator"]["base"]) / "tokenizer.json"))
        pieces = sorted(own.get_vocab().items(), key=lambda item: item[1])
        return own, [cast(int, full.token_to_id(piece)) for piece, _ in pieces]

    def generator_directory(self) -> Path:
        """That of the checkpoint."""
        return self._checkpoint() / "generator"

    def _checkpoint(self) -> Path:
        name = self.recipe["start"]["checkpoint"]
        return find_checkpoint(None if name == "embedded" else name)


def entered_anew(generator: VistGenerator, settings: Mapping[str, Any]) -> VistGenerator:
    """A generator whose memory enters by another fusion, or by the same one untaught.

    What was learned of how memory is spelt is kept (speller, packer, boundaries): that is the compressor's side. The
    projector and cross-attention start afresh, so that two ways in can be compared at the same steps.
    """
    old = generator.fusion
    config = replace(old.config, fingerprint="", attention=None)
    fusion = fresh_fusion({"direct": not config.spelling, **settings}, config, generator.model)
    kept = {name: weight for name, weight in old.state_dict().items() if name.startswith(("speller.", "packer."))}
    if fusion.in_context and old.in_context:
        kept["boundaries"] = old.boundaries.detach()
    fusion.load_state_dict(kept, strict=False)
    return VistGenerator(generator.model, generator.tokenizer, fusion)


class BaselineRun(ContinuedRun):
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
        fusion.match_scale(word_embeddings(generator.model))
        fusion.boundaries.data.copy_(old.boundaries)  # the generator knows these
        if fusion.packer is not None and old.packer is not None:
            fusion.packer.load_state_dict(old.packer.state_dict())
        return compressor, VistGenerator(generator.model, generator.tokenizer, fusion)

    def _compressor(self, generator: VistGenerator) -> PassageCompressor:
        """The compressor that the recipe names."""
        settings: dict[str, Any] = self.recipe["compressor"]
        kind, window = settings["kind"], int(settings.get("window", 1))
        sizes = ResamplerConfig(**settings.get("resampler", {}))
        if kind == "vist":
            shipped = cast(VistCompressor, load_compressor(self._checkpoint(), device="cpu"))
            tower = cast(VisionTower, shipped.tower).model
            return VistCompressor.build(
                tower,
                atlas(self.recipe),
                renderer=shipped.renderer_config,
                resampler=sizes,
            )
        tokenizer, old_ids = self.tokenizer()
        if kind == "mean_pool":
            encoder: Any = word_embeddings(generator.model).detach()
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
