"""Settings, validated where they are made. Plain frozen dataclasses; a checkpoint stores them as JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vist_rag.errors import ConfigError


def _check(name: str, value: Any, *, allowed: str, ok: bool, remedy: str = "") -> None:
    if not ok:
        raise ConfigError(f"{name} must be {allowed}, got {value!r}{'; ' + remedy if remedy else ''}.")


@dataclass(frozen=True, slots=True)
class RendererConfig:
    """How text becomes pages.

    A page is a strip ``patch_size_px`` high and ``page_patches * patch_size_px`` wide, cut every ``tower_size_px``
    pixels and stacked into the square image that a vision tower takes. So a patch of the image is a piece of the
    strip, and patches in row-major order are the text from left to right.

    Attributes:
        tower_size_px: Side of the square image.
        patch_size_px: Side of a patch, and height of the strip.
        font_size_px: Height of the em square when an atlas is built from a font.
        channels: 1 (grey) or 3 (RGB, the same value three times).
        normalize: ``"per_image"`` (mean 0, standard deviation 1 over each page's text patches) or ``"none"``
            (0 is black, 1 is white).
    Source: VIST, arXiv:2502.00791, appendix A.1 and D.
    """

    tower_size_px: int = 224
    patch_size_px: int = 14
    font_size_px: int = 10
    channels: int = 3
    normalize: str = "per_image"

    def __post_init__(self) -> None:
        _check("channels", self.channels, allowed="1 (grey) or 3 (RGB)", ok=self.channels in (1, 3))
        _check("normalize", self.normalize, allowed="'per_image' or 'none'", ok=self.normalize in ("per_image", "none"))
        _check("patch_size_px", self.patch_size_px, allowed="8 or more", ok=self.patch_size_px >= 8)
        _check(
            "tower_size_px",
            self.tower_size_px,
            allowed=f"a multiple of patch_size_px ({self.patch_size_px})",
            ok=self.tower_size_px > 0 and self.tower_size_px % self.patch_size_px == 0,
        )
        _check(
            "font_size_px",
            self.font_size_px,
            allowed=f"in 4..{self.patch_size_px} (the strip is {self.patch_size_px} px high)",
            ok=4 <= self.font_size_px <= self.patch_size_px,
        )

    @property
    def page_patches(self) -> int:
        """Patches a page, ``s``: 256 at the default sizes."""
        return (self.tower_size_px // self.patch_size_px) ** 2

    @property
    def page_width_px(self) -> int:
        """Width of the strip: 3,584 at the default sizes."""
        return self.page_patches * self.patch_size_px


@dataclass(frozen=True, slots=True)
class ResamplerConfig:
    """The Perceiver Resampler: patch features of one page -> at most ``latents_per_page`` latents.

    Attributes:
        latents_per_page: Latents for a page that is full of text; a shorter text takes proportionally fewer,
            at least one.
        width: Width of a latent, and of the memory that is stored (but for ``spelling_width``).
        layers: Cross-attention blocks.
        heads: Attention heads; must divide ``width``.
        expansion: Width of the feed-forward layer, in multiples of ``width``.
        tower_layers: Which hidden states of the tower are read: 0 is the patch embedding, -1 the last layer. More
            than one are concatenated, so that memory keeps both how a word is spelt and what it means.
        spelling_width: Width of a second part of each latent, a linear view of its own window: how its words are
            spelt. 0 leaves it out.
        salience: Whether the first number of each latent says how rare the words of its window are; the projector
            reads it with the rest.
        mask_blank: Whether blank patches are left out of attention, as they should be; an ablation.
    """

    latents_per_page: int = 64
    width: int = 256
    layers: int = 2
    heads: int = 4
    expansion: int = 4
    tower_layers: tuple[int, ...] = (-1,)
    spelling_width: int = 0
    salience: bool = False
    mask_blank: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "tower_layers", tuple(self.tower_layers))
        for name in ("latents_per_page", "width", "layers", "heads", "expansion"):
            _check(name, getattr(self, name), allowed="1 or more", ok=getattr(self, name) >= 1)
        _check("heads", self.heads, allowed=f"a divisor of width ({self.width})", ok=self.width % self.heads == 0)
        _check("tower_layers", self.tower_layers, allowed="at least one layer", ok=len(self.tower_layers) > 0)
        _check("spelling_width", self.spelling_width, allowed="0 or more", ok=self.spelling_width >= 0)

    @property
    def memory_width(self) -> int:
        """Width ``d`` of a latent with all its parts."""
        return self.salience + self.width + self.spelling_width


@dataclass(frozen=True, slots=True)
class CrossAttentionConfig:
    """Sizes of gated cross-attention in a generator's layers: those of the layers' own self-attention.

    Attributes:
        layers: Numbers of the layers that read memory, ascending.
        heads: Query heads.
        kv_heads: Heads of keys and values; must divide ``heads``.
        d_head: Width of a head.
        scale: What scores are multiplied by.
        direct: Whether keys and values are made of the latents themselves, as in the paper; else of what the projector
            makes of them, spelling included.
        pointed: Whether a generator that copies words (``CopyAttention``) may copy those that memory spells.
        bias: Whether the projections of queries, keys and values have a bias.
        norm: Whether states are normed before they ask: in layers that norm before and not after.
        head_norm: Whether queries and keys are normed in each head, as in Qwen3 and Gemma 3.
        bucket: Memories of a batch are padded to a multiple of so many latents, so that ``torch.compile`` meets few
            lengths.
    Source: VIST, arXiv:2502.00791, appendix A.1.
    """

    layers: tuple[int, ...]
    heads: int
    kv_heads: int
    d_head: int
    scale: float
    direct: bool = True
    pointed: bool = False
    bias: bool = False
    norm: bool = True
    head_norm: bool = False
    bucket: int = 64

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        _check(
            "layers",
            self.layers,
            allowed="numbers of layers, ascending, one at least",
            ok=len(self.layers) > 0 and list(self.layers) == sorted({*self.layers}) and self.layers[0] >= 0,
        )
        for name in ("heads", "kv_heads", "d_head", "bucket"):
            _check(name, getattr(self, name), allowed="1 or more", ok=getattr(self, name) >= 1)
        _check(
            "kv_heads",
            self.kv_heads,
            allowed=f"a divisor of heads ({self.heads})",
            ok=self.heads % self.kv_heads == 0,
        )
        _check(
            "pointed",
            self.pointed,
            allowed="False where latents are read as they are (direct)",
            ok=not (self.pointed and self.direct),
        )
        _check("scale", self.scale, allowed="above 0", ok=self.scale > 0)


@dataclass(frozen=True, slots=True)
class FusionConfig:
    """How memory enters the generator.

    Attributes:
        memory_width: Width ``d`` of the latents that come in.
        generator_width: Width ``d_llm`` of the generator's token embeddings.
        hidden_width: Width of the projector's hidden layer.
        fingerprint: Of the compressor that this fusion was trained for; empty means "not trained yet, takes any".
        spelling: Characters that a latent spells at most; 0 where this fusion does not read spelling.
        spelling_width: How many of the last dimensions of a latent are for spelling alone; the projector reads the
            others.
        tokens: Tokens whose ids a latent ends with, ``spelling_width`` numbers in all; 0 where it spells characters.
        packer_width: Width of the hidden layer that tells in which order a position's tokens stand; 0: their mean
            alone, which does not.
        attention: Sizes of the cross-attention by which memory enters; None: it enters as soft prompt.
    """

    memory_width: int
    generator_width: int
    hidden_width: int = 1024
    fingerprint: str = ""
    spelling: int = 0
    spelling_width: int = 0
    tokens: int = 0
    packer_width: int = 0
    attention: CrossAttentionConfig | None = None

    def __post_init__(self) -> None:
        given: Any = self.attention
        if isinstance(given, dict):  # as a checkpoint has it
            object.__setattr__(self, "attention", CrossAttentionConfig(**given))
        _check("packer_width", self.packer_width, allowed="0 or more", ok=self.packer_width >= 0)
        _check("spelling_width", self.spelling_width, allowed="0 or more", ok=self.spelling_width >= 0)
        _check("spelling", self.spelling, allowed="0 or more", ok=self.spelling >= 0)
        _check(
            "spelling_width",
            self.spelling_width,
            allowed=f"3 numbers for each of the {self.tokens} tokens",
            ok=self.tokens <= 0 or self.spelling_width == 3 * self.tokens,
        )
        _check(
            "tokens",
            self.tokens,
            allowed="0, or 1 or more without spelling",
            ok=self.tokens >= 0 and not (self.tokens and self.spelling),
        )
        for name in ("memory_width", "generator_width", "hidden_width"):
            _check(name, getattr(self, name), allowed="1 or more", ok=getattr(self, name) >= 1)
