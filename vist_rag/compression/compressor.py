"""The noun: text -> pages -> patch features -> latents, as one Hugging Face model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, Self, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from tqdm.auto import tqdm
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init

from vist_rag.codec import DEFAULT_FORM, check_form
from vist_rag.compression.memory import VisualMemory
from vist_rag.compression.referenced import load_tower
from vist_rag.compression.resampler import PerceiverResampler, windows_of_text
from vist_rag.compression.vision import VisionTower, tower_config
from vist_rag.config import RendererConfig, ResamplerConfig
from vist_rag.errors import CheckpointError, ConfigError, InputError
from vist_rag.references import Reference
from vist_rag.rendering import GlyphAtlas, Pages, Renderer
from vist_rag.rendering.pages import check_texts

_NO_SETTING = frozenset({"architectures", "dtype", "transformers_version"})
"""Fields of a tower's config that change no feature."""
_BATCH_ON_CPU, _BATCH = 8, 32
"""Full pages in a forward pass (``benchmarks/encode.py``)."""
_RENDERED_TEXTS, _RENDERED_CHARACTERS = 128, 75_000
"""Texts whose pages are held at a time, and their length: a page of 200 kB takes some 600 characters."""


class VistConfig(PreTrainedConfig):
    """Config of a ``VistCompressor``.

    Attributes:
        renderer: Fields of ``RendererConfig``.
        tower: Config of the vision tower, with its ``model_type``.
        resampler: Fields of ``ResamplerConfig``.
        atlas: Sizes of the glyph atlas that the checkpoint holds: ``glyphs``, ``width``, ``codepoints``, ``origin``.
        tower_reference: Fields of the ``Reference`` that the tower's weights come from; None: from the checkpoint. A
            model in memory holds all its weights, so there it is None.
        memory_form: How its memories are stored where an index does not say (``vist_rag.codec``): the
            smallest form that was measured to answer as well. No part of the fingerprint.
    """

    model_type = "vist_compressor"
    renderer: dict[str, Any] | None = None
    tower: dict[str, Any] | None = None
    resampler: dict[str, Any] | None = None
    atlas: dict[str, int] | None = None
    tower_reference: dict[str, Any] | None = None
    memory_form: str = DEFAULT_FORM

    def to_dict(self) -> dict[str, Any]:
        """The fields; ``tower_reference`` where there is one."""
        fields: dict[str, Any] = super().to_dict()
        if fields.get("tower_reference") is None:
            fields.pop("tower_reference", None)
        return fields

    def __post_init__(self, **kwargs: Any) -> None:
        check_form(self.memory_form)
        self.renderer = asdict(RendererConfig(**(self.renderer or {})))
        self.resampler = {**asdict(ResamplerConfig(**(self.resampler or {})))}
        self.resampler["tower_layers"] = list(self.resampler["tower_layers"])
        super().__post_init__(**kwargs)


class PageRenderer(Protocol):
    """Texts in, pages out: of pixels (``Renderer``), or of tokens."""

    def render(self, texts: Sequence[str]) -> Pages:
        """Pages of the texts, in order."""

    def count_patches(self, texts: Sequence[str]) -> list[int]:
        """Patches that hold text on each of these pages, without making them."""


class PassageCompressor(PreTrainedModel):
    """What every compressor of passages does alike: pages -> features of a frozen tower -> latents.

    ``VistCompressor`` reads pages of pixels; the baselines of ``vist_rag.compression.text`` read tokens.
    """

    main_input_name = "pixel_values"
    tower: nn.Module
    resampler: nn.Module
    resampler_config: ResamplerConfig
    _fingerprint: str | None = None

    @property
    def renderer(self) -> PageRenderer:
        """What makes this compressor's pages of a text, on its device."""
        raise NotImplementedError

    @property
    def window(self) -> int:
        """Patches that a latent stands for."""
        return int(cast(Any, self.resampler).window)

    @property
    def memory_width(self) -> int:
        """Width ``d`` of a latent with all its parts."""
        return self.resampler_config.memory_width

    @property
    def memory_form(self) -> str:
        """How its memories are stored where an index does not say."""
        return str(getattr(self.config, "memory_form", DEFAULT_FORM))

    def _settings(self) -> list[Any]:
        """What changes a memory beside the weights."""
        raise NotImplementedError

    def _init_weights(self, module: torch.nn.Module) -> None:
        # Loading happens on the meta device: what __init__ set is lost, so initial values belong here.
        super()._init_weights(module)
        if isinstance(module, PerceiverResampler):
            init.normal_(module.latents, std=0.02)

    @property
    def fingerprint(self) -> str:
        """sha256 over all settings and weights, in hexadecimal: glyph atlas or vocabulary, tower, resampler.

        Weights count as their bf16 values, so that the same checkpoint has one fingerprint in float32 and bf16. A model
        in training mode is hashed anew each time.
        """
        if self._fingerprint is None or self.training:
            sha = hashlib.sha256(json.dumps(self._settings(), sort_keys=True, default=str).encode())
            for name, tensor in sorted(self.state_dict().items()):
                tensor = tensor.to(torch.bfloat16).view(torch.int16) if tensor.is_floating_point() else tensor
                sha.update(name.encode())
                sha.update(np.ascontiguousarray(tensor.cpu().numpy()).tobytes())
            self._fingerprint = sha.hexdigest()
        return self._fingerprint

    def train(self, mode: bool = True) -> Self:
        """Training mode for the resampler alone: the tower stays frozen, dropout included."""
        if mode or self.training:  # weights change in training mode only, and a hash of them costs time
            self._fingerprint = None
        super().train(mode)
        self.tower.eval()
        return self

    def features(self, pixel_values: Tensor, patch_mask: Tensor) -> Tensor:
        """What the tower sees: float ``[p, s', d_v * layers read]``; ``s'`` stops at the longest text."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._tower_trains()):
            return torch.cat(self.tower(pixel_values, patch_mask, self.resampler_config.tower_layers), dim=-1)

    def forward(self, pixel_values: Tensor, patch_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Compress pages.

        Args:
            pixel_values: float ``[p, c, size, size]``.
            patch_mask: bool ``[p, s]``.
        Returns:
            Latents, float ``[p, n, d]``, and which of them stand for text, bool ``[p, n]``.
        """
        features, attended, standing = self._read(pixel_values, patch_mask)
        latents, _ = self.resampler(features, attended)
        return latents, windows_of_text(standing, self.window)

    def _read(self, pixel_values: Tensor, patch_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features, float ``[p, s', d_v]``, which of them are attended to, and which hold text, bool ``[p, s']``."""
        first = torch.arange(patch_mask.shape[1], device=patch_mask.device) == 0
        patch_mask = patch_mask | first  # a blank page is its first patch: attention over nothing is NaN
        attended = patch_mask if self.resampler_config.mask_blank else torch.ones_like(patch_mask)
        features = self.features(pixel_values, attended)
        return features, attended[:, : features.shape[1]], patch_mask[:, : features.shape[1]]

    @torch.no_grad()
    def attention(self, pages: Pages, page: int = 0) -> Tensor:
        """Where the latents of a page look, layer by layer and head by head.

        Args:
            pages: What this compressor's renderer made of a text.
            page: Which of them.
        Returns:
            Weights of the resampler, float32 ``[layers, heads, n, s + n]``, on the CPU: first those of the patches,
            then those of the latents themselves; they sum to one. The latents are those that ``encode`` makes.
        Raises:
            InputError: If there is no such page.
        """
        pages.check(page)
        features, attended, _ = self._read(pages.pixel_values[page : page + 1], pages.patch_mask[page : page + 1])
        weights = cast(PerceiverResampler, self.resampler).attention(features, attended)[:, 0].float().cpu()
        seen, s = features.shape[1], pages.patch_mask.shape[1]
        n = self._latents_of(int(pages.patch_mask[page].sum()))
        return torch.cat((F.pad(weights[..., :n, :seen], (0, s - seen)), weights[..., :n, seen:]), dim=-1)

    def count_latents(self, text: str) -> int:
        """How many latents ``encode`` will make of a text: known from its layout alone, without the tower."""
        return sum(self._latents_of(n) for n in self.renderer.count_patches([text]))

    def _latents_of(self, patches: int) -> int:
        """Latents of a page with text on so many patches; a blank page has one."""
        return max(1, -(-patches // self.window))

    def _tower_trains(self) -> bool:
        return any(p.requires_grad for p in self.tower.parameters())

    @torch.no_grad()  # not inference_mode: what is trained on memories needs ordinary tensors
    def encode(
        self, texts: Sequence[str], *, batch_size: int | None = None, progress: bool = False
    ) -> list[VisualMemory]:
        """Compress texts, each on pages of its own, so that a memory depends on its text alone.

        Args:
            texts: What to compress; an empty text has a memory of one latent.
            batch_size: Full pages in one forward pass, or as many shorter ones as take no more patches. None: few on a
                CPU, so that its caches hold what is computed, and more elsewhere.
            progress: Show a progress bar.
        Returns:
            A memory for each text, in order, on the CPU.
        Raises:
            InputError: If an item is not a string.
            ConfigError: If ``batch_size`` is less than 1.
        """
        if isinstance(texts, str):
            raise InputError("texts must be a list of strings, got one string; wrap it in a list.")
        check_texts(texts)
        if batch_size is None:
            batch_size = _BATCH_ON_CPU if self.device.type == "cpu" else _BATCH
        if batch_size < 1:
            raise ConfigError(f"batch_size must be 1 or more, got {batch_size}.")
        was_training = self.training
        self.eval()
        latents: list[list[Tensor]] = [[] for _ in texts]
        try:
            with tqdm(total=len(texts), desc="compressing", unit=" passages", disable=not progress) as bar:
                for some in _rendered_together(texts):
                    pages = self.renderer.render([texts[i] for i in some])
                    read = self._page_latents(pages, batch_size)
                    for text_id, page in zip(pages.text_ids.tolist(), read, strict=True):
                        latents[some[text_id]].append(page)
                    bar.update(len(some))
        finally:
            self.train(was_training)
        return [self.memory(torch.cat(parts)) for parts in latents]

    def memory(self, latents: Tensor) -> VisualMemory:
        """The memory whose latents, float ``[n, d]``, this compressor made."""
        return VisualMemory(latents, self.fingerprint)

    def _page_latents(self, pages: Pages, batch_size: int) -> list[Tensor]:
        """Latents of each page, float32 ``[n, d]``, on the CPU."""
        lengths = pages.patch_mask.sum(1).clamp(min=1)
        order = lengths.argsort(stable=True)
        counts, held = lengths.tolist(), order.tolist()
        found: list[Tensor] = [lengths] * len(held)
        begin = 0
        while begin < len(held):  # neighbours in length share a pass, so that hardly a blank patch is computed
            end, room = begin + 1, batch_size * pages.patch_mask.shape[1]
            while end < len(held) and counts[held[end]] * (end + 1 - begin) <= room:
                end += 1
            part = order[begin:end]
            latents, _ = self(pages.pixel_values[part], pages.patch_mask[part])
            rows = latents.float().cpu()  # one transfer
            for page, row in zip(held[begin:end], rows, strict=True):
                found[page] = row[: self._latents_of(counts[page])]
            begin = end
        return found


def _rendered_together(texts: Sequence[str]) -> Iterator[list[int]]:
    """Which texts are rendered at a time: neighbours in length, as many as take some 25 MB."""
    some: list[int] = []
    characters = 0
    for i in sorted(range(len(texts)), key=lambda i: len(texts[i])):
        full = some and characters + len(texts[i]) > _RENDERED_CHARACTERS
        if full or len(some) == _RENDERED_TEXTS:
            yield some
            some, characters = [], 0
        some.append(i)
        characters += len(texts[i])
    if some:
        yield some


class VistCompressor(PassageCompressor):
    """Reads passages as pictures and keeps a few latents of each.

    The vision tower is frozen. The glyph atlas is part of the weights, so a checkpoint renders the same pixels on
    every machine without a font.
    """

    config_class = VistConfig
    base_model_prefix = "compressor"
    atlas_ink: Tensor
    atlas_advances: Tensor
    atlas_codepoints: Tensor
    atlas_glyph_ids: Tensor

    def __init__(self, config: VistConfig) -> None:
        super().__init__(config)
        if config.tower is None or config.atlas is None:
            raise ConfigError(
                "VistConfig must hold a tower and an atlas; make the model with VistCompressor.build(...)."
            )
        self.renderer_config = RendererConfig(**(config.renderer or {}))
        self.resampler_config = ResamplerConfig(**(config.resampler or {}))
        vision = tower_config(config.tower)
        _check_sizes(vision, self.renderer_config)
        vision.dtype = None  # that of the whole model, however the tower was stored before
        self.tower = VisionTower.from_config(vision)
        layers = self.resampler_config.tower_layers
        self.resampler = PerceiverResampler(
            self.resampler_config, self.tower.width * len(layers), self.renderer_config.page_patches
        )
        sizes, height = config.atlas, self.renderer_config.patch_size_px
        self.register_buffer("atlas_ink", torch.zeros(sizes["glyphs"], height, sizes["width"], dtype=torch.uint8))
        self.register_buffer("atlas_advances", torch.zeros(sizes["glyphs"], dtype=torch.int32))
        self.register_buffer("atlas_codepoints", torch.zeros(sizes["codepoints"], dtype=torch.int32))
        self.register_buffer("atlas_glyph_ids", torch.zeros(sizes["codepoints"], dtype=torch.int32))
        self._renderer: Renderer | None = None
        self._fingerprint: str | None = None
        self.register_load_state_dict_post_hook(_forget)
        self.tower.requires_grad_(False)
        self.post_init()
        if config.tower_reference is not None:  # from_pretrained fills it in
            self._keys_to_ignore_on_load_missing = {*(self._keys_to_ignore_on_load_missing or ()), r"^tower\."}

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Self:
        """As of every ``PreTrainedModel``; the tower may come from the model that the checkpoint refers to.

        Raises:
            CheckpointError: If that model is missing, was changed, or does not fit.
        """
        loaded: Any = super().from_pretrained(*args, **kwargs)  # with output_loading_info, a tuple
        compressor = cast(VistCompressor, loaded[0] if isinstance(loaded, tuple) else loaded)
        config = compressor.config
        if config.tower_reference is not None:
            reference = Reference.read(config.tower_reference, f"config of {compressor.name_or_path}")
            tower = load_tower(reference, tower_config(config.tower))
            cast(VisionTower, compressor.tower).model.load_state_dict(tower.state_dict())
            config.tower_reference = None
            _forget(compressor, None)
        compressor.tower.requires_grad_(False)  # loading makes new parameters
        return cast(Self, loaded)

    @classmethod
    def build(
        cls,
        tower: str | Path | dict[str, Any] | PreTrainedConfig | PreTrainedModel,
        atlas: GlyphAtlas,
        *,
        renderer: RendererConfig | None = None,
        resampler: ResamplerConfig | None = None,
    ) -> VistCompressor:
        """A compressor with a fresh resampler.

        Args:
            tower: A hub id or local path (pretrained weights are loaded), a loaded model, or a config (fresh weights).
            atlas: The glyphs to render with, as they are, in the middle of the tower's patches.
            renderer: Sizes of a page; None takes them from the tower.
            resampler: Sizes of the memory.
        Raises:
            CheckpointError: If the tower's weights cannot be loaded.
            ConfigError: If the tower has no patches, or lower ones than glyphs, or its sizes are not the renderer's.
        """
        model = _pretrained_tower(tower)
        vision = tower_config(model.config if model is not None else tower)  # type: ignore[arg-type]
        renderer = renderer or RendererConfig(
            tower_size_px=int(vision.image_size),
            patch_size_px=int(vision.patch_size),
            channels=int(vision.num_channels),
        )
        atlas = atlas.on_strip(renderer.patch_size_px)
        config = VistConfig(
            renderer=asdict(renderer),
            tower=vision.to_dict(),
            resampler=asdict(resampler or ResamplerConfig()),
            atlas={
                "glyphs": len(atlas.ink),
                "width": atlas.ink.shape[2],
                "codepoints": len(atlas.codepoints),
                "origin": atlas.origin,
            },
        )
        compressor = cls(config)
        if model is not None:
            missing = (
                cast(VisionTower, compressor.tower).model.load_state_dict(model.state_dict(), strict=False).missing_keys
            )
            if missing:  # what is left over (a pooler, a head) is not read
                raise CheckpointError(f"tower must bring all its weights, got none for {', '.join(missing[:3])}.")
        compressor.atlas_ink.copy_(atlas.ink)
        for name in ("advances", "codepoints", "glyph_ids"):
            getattr(compressor, f"atlas_{name}").copy_(torch.from_numpy(getattr(atlas, name)))
        return compressor

    @property
    def renderer(self) -> Renderer:
        """The renderer of this compressor's pages, on its device."""
        if self._renderer is None:
            atlas = GlyphAtlas(
                self.atlas_ink.cpu(),
                self.atlas_advances.cpu().numpy(),
                self.atlas_codepoints.cpu().numpy(),
                self.atlas_glyph_ids.cpu().numpy(),
                self.config.atlas["origin"],
            )
            self._renderer = Renderer(atlas, self.renderer_config)
        return self._renderer.to(self.device)

    def _settings(self) -> list[Any]:
        config = self.config
        tower = {k: v for k, v in config.tower.items() if k not in _NO_SETTING and not k.startswith("_")}
        # What changes nothing where it is not set leaves the memories of before their fingerprint.
        resampler = {k: v for k, v in config.resampler.items() if k != "mask_blank" or not v}
        return [config.renderer, resampler, config.atlas, tower]


def _forget(compressor: PassageCompressor, _: Any) -> None:
    """Other weights were loaded: what was derived from the old ones is void."""
    compressor._fingerprint = None
    if isinstance(compressor, VistCompressor):
        compressor._renderer = None


def _pretrained_tower(tower: Any) -> PreTrainedModel | None:
    """The vision model of a hub id, a path or a loaded model; None for a config, which has no weights."""
    if isinstance(tower, (str, Path)):
        try:
            tower = AutoModel.from_pretrained(str(tower))
        except Exception as error:  # missing, torn, or no model at all: each raises a class of its own
            raise CheckpointError(f"tower {tower} cannot be loaded ({error}); check the name or restore it.") from error
    return getattr(tower, "vision_model", tower) if isinstance(tower, PreTrainedModel) else None


def _check_sizes(vision: PreTrainedConfig, renderer: RendererConfig) -> None:
    for name, got, allowed in (
        ("image_size", vision.image_size, renderer.tower_size_px),
        ("patch_size", vision.patch_size, renderer.patch_size_px),
        ("num_channels", vision.num_channels, renderer.channels),
    ):
        if got != allowed:
            raise ConfigError(f"the tower's {name} must be the renderer's, {allowed}, got {got}; change either.")
