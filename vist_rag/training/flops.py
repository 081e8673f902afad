"""What a batch costs to learn from, by formula: FLOPs of each part, and what waits for the backward pass.

Multiplying and adding are two. A matrix of ``w`` weights takes ``2 w`` FLOPs at each position forward, as many again
for the gradients of what came in, where that or what it came from learns, and once more for its own, where it learns
itself. Attention scores and what they weigh take ``4 q k d`` for ``q`` queries and ``k`` keys of width ``d`` in all
heads, twice that backward; a mask saves nothing. Norms, activations and looking words up are not counted.

What waits for the backward pass is an estimate: what goes into and comes out of every matrix that gradients reach, and
the logits three times over in float32 (as they are, their log-softmax, its gradient). Where layers are computed again,
it is what goes into each, and one of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from vist_rag.compression import PassageCompressor
from vist_rag.compression.resampler import PerceiverResampler
from vist_rag.compression.text import TextTower
from vist_rag.compression.vision import VisionTower
from vist_rag.config import CrossAttentionConfig
from vist_rag.generation.fusion.cross_attention import CrossAttention, CrossAttentionFusion
from vist_rag.generation.prefix_bert import PrefixBertForCausalLM
from vist_rag.training.lexical import LexicalAlignment
from vist_rag.training.reading import MemoryReading
from vist_rag.training.tower import TowerReading

PARTS = ("tower", "resampler", "projector", "generator", "lora", "heads")
"""What has weights: ``projector`` is all of the fusion, ``heads`` teach a tower and are thrown away."""
_LOGITS_BYTES = 3 * 4
_COPY_BYTES = 7 * 4  # of a place that may be copied from: its score, its probability, its slot and what they come from


@dataclass(frozen=True, slots=True)
class Flops:
    """Floating-point operations.

    Attributes:
        forward: Of the forward pass.
        backward: Of the backward pass; with gradient checkpointing, what it computes again is among them.
    """

    forward: float = 0
    backward: float = 0

    @property
    def total(self) -> float:
        """Both."""
        return self.forward + self.backward

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.forward + other.forward, self.backward + other.backward)

    def times(self, count: float) -> Flops:
        """So many of these."""
        return Flops(self.forward * count, self.backward * count)


@dataclass
class BatchCosts:
    """What one batch holds and takes.

    Attributes:
        examples: Texts, or prompts with their targets.
        pages: Pages that are rendered.
        text_tokens: Positions of prompts that are read as text; padding is not among them, but among the FLOPs.
        memory_tokens: Positions of prompts, or latents of pages, that stand for memory, boundaries included.
        target_tokens: Tokens to be written, or pieces to be named.
        activation_bytes: What waits for the backward pass.
        flops: Of each part: ``PARTS`` but ``lora``, which is in ``generator``; ``teacher`` reads the same as text.
    """

    examples: int = 0
    pages: int = 0
    text_tokens: int = 0
    memory_tokens: int = 0
    target_tokens: int = 0
    activation_bytes: float = 0
    flops: dict[str, Flops] = field(default_factory=dict)


def part_of(name: str) -> str:
    """Which of ``PARTS`` a weight of a stage's model belongs to, by its name."""
    if "lora_" in name:
        return "lora"
    if name.startswith(("tower.", "compressor.tower.")):
        return "tower"
    known = {"compressor": "resampler", "fusion": "projector", "lm": "generator"}
    return known.get(name.partition(".")[0], "heads")


def batch_costs(
    model: nn.Module, batch: Mapping[str, Any], *, examples: int, value_bytes: int = 4, checkpointing: bool = False
) -> BatchCosts:
    """What a batch of a stage costs.

    Args:
        model: What the stage trains: ``TowerReading``, ``LexicalAlignment`` or ``MemoryReading``, on any device.
        batch: What its ``forward`` takes.
        examples: How many examples are in it.
        value_bytes: Of a value in the precision of training.
        checkpointing: Whether the generator's layers are computed again in the backward pass.
    """
    tally = _Tally(value_bytes)
    tally.costs.examples = examples
    if isinstance(model, MemoryReading):
        _reading(tally, model, batch, checkpointing=checkpointing)
    elif isinstance(model, LexicalAlignment):
        _lexical(tally, model, batch)
    else:
        mask = batch["patch_mask"]
        tally.costs.pages = len(mask)
        tower = cast(TowerReading, model)
        _tower(tally, tower.tower, len(mask), _longest(mask), mask.shape[1])
        _heads(tally, tower, mask, batch["words"])
        tally.costs.target_tokens = 2 * int(mask.sum())
    return tally.costs


def answer_flops(lm: nn.Module, prompt: int, written: int) -> Flops:
    """What a generator takes without its adapter to read a prompt of so many tokens and write so many."""
    tally = _Tally(0)
    _Reader(lm, [prompt], [written], 1, prompt, adapted=False).count(tally, "answers", flows=False, learn=False)
    return tally.costs.flops["answers"]


# ------------------------------------------------------------------------------------------------------------ counting


class _Tally:
    """Adds up what a batch costs."""

    def __init__(self, value_bytes: int) -> None:
        self.value_bytes = value_bytes
        self.costs = BatchCosts()

    def multiply(
        self, part: str, matrices: Iterable[Tensor], positions: int, *, flows: bool, learn: bool = True
    ) -> None:
        """Matrices at so many positions; ``flows``: gradients go through them; without ``learn``, none exist."""
        matrices = list(matrices)
        total = sum(weight.numel() for weight in matrices)
        trained = sum(weight.numel() for weight in matrices if weight.requires_grad) if learn else 0
        flows = flows and learn
        self.add(part, 2 * total * positions, 2 * positions * (total * flows + trained))
        if flows or trained:
            sides = sum(weight.shape[0] + weight.numel() // weight.shape[0] for weight in matrices)
            self.costs.activation_bytes += sides * positions * self.value_bytes

    def attend(self, part: str, times: int, queries: int, keys: int, width: int, *, flows: bool) -> None:
        """So many times attention with heads of ``width`` together."""
        flops = 4 * times * queries * keys * width
        self.add(part, flops, 2 * flops * flows)

    def add(self, part: str, forward: float, backward: float = 0) -> None:
        self.costs.flops[part] = self.costs.flops.get(part, Flops()) + Flops(forward, backward)


def _matrices(module: nn.Module, *, apart: Iterable[nn.Module] = ()) -> list[Tensor]:
    """Weights that are multiplied: matrices that are no table of embeddings, and that are not in ``apart``."""
    known = {id(weight) for other in apart for weight in other.parameters()}
    return [
        weight
        for part in module.modules()
        if not isinstance(part, nn.Embedding)
        for weight in part.parameters(recurse=False)
        if weight.ndim == 2 and id(weight) not in known
    ]


def _learns(*modules: nn.Module | None) -> bool:
    return any(weight.requires_grad for module in modules if module is not None for weight in module.parameters())


def _longest(mask: Tensor) -> int:
    return max(1, int(mask.sum(1).max()))


# ----------------------------------------------------------------------------------------------------------- the parts


def _tower(tally: _Tally, tower: nn.Module, pages: int, patches: int, page_patches: int) -> None:
    """A tower on pages whose longest text takes so many patches."""
    learns, model = _learns(tower), cast(Any, tower).model
    if isinstance(tower, VisionTower):
        config = model.config
        shape = (1, config.num_channels, config.image_size, config.image_size)
        with torch.no_grad():
            begins = tower.embed(torch.zeros(shape, device=model.device, dtype=model.dtype)).shape[1] - page_patches
        parts = tower.core.embeddings.modules()
        pixels = [part.weight for part in parts if isinstance(part, nn.Conv2d | nn.Linear)]
        tally.multiply("tower", pixels, pages * page_patches, flows=False)
        positions, matrices = begins + patches, _matrices(tower.layers)
    elif cast(TextTower, tower).model is not None:
        positions, matrices = patches + 1, _matrices(model)
    else:
        return
    tally.multiply("tower", matrices, pages * positions, flows=learns)
    layers, width = model.config.num_hidden_layers, model.config.hidden_size
    tally.attend("tower", layers * pages, positions, positions, width, flows=learns)


def _compressor(tally: _Tally, compressor: PassageCompressor, mask: Tensor) -> None:
    """Pages to latents."""
    blank = compressor.resampler_config.mask_blank
    pages, patches = len(mask), _longest(mask) if blank else mask.shape[1]
    _tower(tally, compressor.tower, pages, patches, mask.shape[1])
    resampler: Any = compressor.resampler
    windows, flows = -(-patches // resampler.window), _learns(compressor)
    if not isinstance(resampler, PerceiverResampler):
        tally.multiply("resampler", _matrices(resampler), pages * windows, flows=flows)
        return
    of_features = [resampler.project.weight, *(block.key_value.weight for block in cast(Any, resampler.blocks))]
    known = {id(weight) for weight in (*of_features, resampler.latents)}
    of_windows = [weight for weight in _matrices(resampler) if id(weight) not in known]
    tally.multiply("resampler", of_windows, pages * windows, flows=flows)
    tally.multiply("resampler", of_features, pages * patches, flows=flows)
    tally.multiply("resampler", of_features[1:], pages * windows, flows=flows)  # latents attend to themselves, too
    tally.attend(
        "resampler",
        len(resampler.blocks) * pages,
        windows,
        patches + windows,
        compressor.resampler_config.width,
        flows=flows,
    )


def _heads(tally: _Tally, reading: TowerReading, mask: Tensor, words: Tensor) -> None:
    """What teaches a tower to read: characters, and word pieces among those of the batch."""
    used, known = int(mask.sum()), len(words[mask].unique())
    flows = _learns(reading.tower)
    for head in (reading.characters, reading.words):
        tally.multiply("heads", _matrices(head), used, flows=flows or _learns(head))
    # Of the two pieces that each patch shows, half of the patches are asked in a step.
    told = 2 * used * known * reading.word_embeddings.shape[1]
    tally.add("heads", told, told)


def _lexical(tally: _Tally, model: LexicalAlignment, batch: Mapping[str, Any]) -> None:
    mask, fusion, costs = batch["patch_mask"], model.fusion, tally.costs
    _compressor(tally, model.compressor, mask)
    if model.reading is not None:
        _heads(tally, model.reading, mask, batch["words"])
    window, longest = model.compressor.window, _longest(mask)
    windows = -(-(longest if model.compressor.resampler_config.mask_blank else mask.shape[1]) // window)
    standing = sum(max(1, -(-int(used) // window)) for used in mask.sum(1))
    flows = _learns(model.compressor, fusion)
    tally.multiply("projector", _matrices(fusion.projector), len(mask) * windows, flows=flows)
    if fusion.speller is not None:
        tally.multiply("projector", _matrices(fusion.speller), standing, flows=flows)
    known = len(batch["pieces"].unique())
    told = 2 * standing * known * model.word_embeddings.shape[1]
    tally.add("projector", told, told * flows)
    costs.pages, costs.memory_tokens, costs.target_tokens = len(mask), standing, len(batch["pieces"])


def _reading(tally: _Tally, model: MemoryReading, batch: Mapping[str, Any], *, checkpointing: bool) -> None:
    rows = _Rows.of(model, batch)
    costs, fusion, lm = tally.costs, model.fusion, cast(Any, model.lm)
    costs.pages, costs.text_tokens = len(batch["patch_mask"]), sum(rows.text)
    costs.memory_tokens, costs.target_tokens = sum(rows.memory), sum(rows.targets)
    ideal, memories = batch["spelt"] is not None, len(batch["places"])
    before = memories > 0 and (fusion.boundaries.requires_grad or _learns(fusion.packer))
    if memories and not ideal:
        before = _learns(model.compressor, fusion.projector) or before
        _compressor(tally, model.compressor, batch["patch_mask"])
        latents = sum(n for *_, n in batch["windows"])
        flows = _learns(model.compressor, fusion.projector)
        # What memory means is asked for by cross-attention only where it does not take latents as they are, by PVE too.
        read = fusion.config.attention is None or not fusion.config.attention.direct
        drawn = batch["kept_words"] is not None and memories > 1
        tally.multiply("projector", _matrices(fusion.projector), latents * (read + drawn), flows=flows)
        if fusion.speller is not None:
            tally.multiply("projector", _matrices(fusion.speller), latents, flows=False, learn=False)
    if memories and fusion.packer is not None:
        tally.multiply("projector", [fusion.packer.read.weight], rows.shown - sum(rows.text), flows=False)
        positions = sum(rows.memory) - memories * fusion.boundary_tokens
        tally.multiply("projector", [fusion.packer.write.weight], positions, flows=_learns(fusion.packer))
    if isinstance(fusion, CrossAttentionFusion):
        prompts, slots, shown = rows.text, 1, sum(rows.text)
        before = before or (memories > 0 and _learns(fusion.blocks, fusion.norm))
    else:
        prompts = [text + memory for text, memory in zip(rows.text, rows.memory, strict=True)]
        slots, shown = rows.slots, rows.shown
    student = _Reader(lm, prompts, rows.targets, slots, shown)
    student.count(tally, "generator", flows=before or _learns(lm), checkpointing=checkpointing)
    if isinstance(fusion, CrossAttentionFusion) and any(rows.memory):
        _cross_attention(tally, fusion, student, max(rows.memory), flows=before or _learns(lm))
    if memories and batch["taught"] and (model.distil or model.states):
        ids = cast(Sequence[int], rows.raw)
        teacher = _Reader(lm, ids, rows.targets, 1, sum(ids), adapted=False)
        teacher.count(tally, "teacher", flows=False, learn=False)


def _cross_attention(tally: _Tally, fusion: CrossAttentionFusion, reader: _Reader, memory: int, *, flows: bool) -> None:
    """Every position of every row asks; keys and values are made once, of memories padded to the longest's bucket."""
    sizes = cast(CrossAttentionConfig, fusion.config.attention)
    padded = -(-memory // sizes.bucket) * sizes.bucket
    blocks = [cast(CrossAttention, block) for block in fusion.blocks.values()]
    asked = [weight for block in blocks for weight in (block.query.weight, block.output.weight)]
    given = [weight for block in blocks for weight in (block.key.weight, block.value.weight)]
    tally.multiply("projector", asked, reader.rows * reader.length, flows=flows)
    tally.multiply("projector", given, reader.rows * padded, flows=flows)
    width = sizes.heads * sizes.d_head
    tally.attend("projector", len(blocks) * reader.rows, reader.length, padded, width, flows=flows)


@dataclass(frozen=True)
class _Rows:
    """Positions of each prompt of a batch: as text, as memory, in all where memory is read raw; and of its target."""

    text: list[int]
    memory: list[int]
    raw: list[int]
    targets: list[int]
    slots: int  # the most tokens that one position shows
    shown: int  # tokens that prompts show, in all

    @classmethod
    def of(cls, model: MemoryReading, batch: Mapping[str, Any]) -> _Rows:
        segments, places, windows = batch["segments"], batch["places"], batch["windows"]
        text = [sum(len(part) for part in row if not isinstance(part, int)) for row in segments]
        read = [[part for part in row if isinstance(part, int)] for row in segments]
        boundaries = model.fusion.boundary_tokens
        memory = [sum(int(places[i][-1]) + 1 + boundaries for i in row) for row in read]
        raw = [words + sum(len(windows[i][0]) for i in row) for words, row in zip(text, read, strict=True)]
        spells = model.fusion.speller is not None or model.fusion.config.tokens > 0 or batch["spelt"] is not None
        slots, shown = 1, sum(text)
        if spells and places:  # as many as a memory that spells its words as they are
            fullest = (Counter(at[latents].tolist()) for at, (_, latents, _) in zip(places, windows, strict=True))
            slots = max((max(counts.values(), default=1) for counts in fullest), default=1)
            shown = sum(raw)
        return cls(text, memory, raw, [len(target) for target in batch["targets"]], slots, shown)


class _Reader:
    """A generator that reads prompts and writes targets in one pass, rows padded to the longest."""

    def __init__(
        self,
        lm: Any,
        prompts: Sequence[int],
        targets: Sequence[int],
        slots: int,
        shown: int,
        *,
        adapted: bool = True,
    ) -> None:
        self.lm = lm.get_base_model() if hasattr(lm, "get_base_model") else lm
        self.rows, self.slots, self.shown = len(prompts), slots, shown
        self.length = max(prompt + target for prompt, target in zip(prompts, targets, strict=True))
        self.last = max(targets) + 1
        left = () if adapted else {id(w) for name, w in self.lm.named_parameters() if "lora_" in name}
        self.head = [w for w in _matrices(self.lm.get_output_embeddings()) if id(w) not in left]
        apart = [self.lm.get_output_embeddings()]
        if isinstance(self.lm, PrefixBertForCausalLM):
            apart += [self.lm.cls, self.lm.copy]
        self.matrices = [w for w in _matrices(self.lm, apart=apart) if id(w) not in left]

    def count(self, tally: _Tally, part: str, *, flows: bool, learn: bool = True, checkpointing: bool = False) -> None:
        config, costs = self.lm.config.get_text_config(), tally.costs
        heads, layers = config.num_attention_heads, config.num_hidden_layers
        width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
        before, kept = costs.flops.get(part, Flops()), costs.activation_bytes
        tally.multiply(part, self.matrices, self.rows * self.length, flows=flows, learn=learn)
        tally.attend(part, layers * self.rows, self.length, self.length, width, flows=flows)
        if checkpointing and flows:
            tally.add(part, 0, costs.flops[part].forward - before.forward)
            inputs = layers * self.rows * self.length * config.hidden_size * tally.value_bytes
            costs.activation_bytes = kept + inputs + (costs.activation_bytes - kept) / layers
        written = self.rows * self.last
        tally.multiply(part, self.head, written, flows=flows, learn=learn)
        if flows:
            costs.activation_bytes += written * len(self.head[0]) * _LOGITS_BYTES
        if isinstance(self.lm, PrefixBertForCausalLM):
            self._copy(tally, part, self.lm, written, flows=flows, learn=learn)

    def _copy(
        self, tally: _Tally, part: str, lm: PrefixBertForCausalLM, written: int, *, flows: bool, learn: bool
    ) -> None:
        """The head's own layer, and ``CopyAttention``: its keys are of states, and of the tokens that are shown."""
        width, words = lm.config.hidden_size, lm.config.vocab_size
        tally.multiply(part, _matrices(lm.cls.predictions.transform), written, flows=flows, learn=learn)
        tally.multiply(part, [lm.copy.query.weight], written, flows=flows, learn=learn)
        trained = learn and lm.copy.key.weight.requires_grad
        of_states = 2 * width * width * self.rows * self.length
        tally.add(part, of_states, of_states * (flows + trained))
        of_words = 2 * 2 * width * width * self.shown
        tally.add(part, of_words, of_words * trained)
        if lm.copy.local is not None:
            tally.multiply(part, _matrices(lm.copy.local), self.shown, flows=flows, learn=learn)
        scores = 2 * written * (self.length * self.slots + 1) * width
        tally.add(part, scores, 2 * scores * flows)
        tally.add(part, 2 * written * words * width)  # which words are in the answer already
        if flows:
            places = self.length * self.slots
            keys = self.rows * places * width * tally.value_bytes
            tally.costs.activation_bytes += keys + written * places * _COPY_BYTES
