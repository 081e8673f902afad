"""Memory as soft prompt: latents projected to the generator's width and spliced into ``inputs_embeds``."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from inspect import signature
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from vist_rag.compression import VisualMemory
from vist_rag.compression.text import read_ids
from vist_rag.config import FusionConfig
from vist_rag.errors import CheckpointError, ConfigError, IncompatibleMemoryError, ShapeError
from vist_rag.generation.prefix_bert import Once, ranks
from vist_rag.generation.prompt import Prompt
from vist_rag.generation.words import embedding_scale

if TYPE_CHECKING:
    from vist_rag.generation.generator import VistGenerator


CHARACTERS = "".join(map(chr, range(32, 127)))
CHARACTER_CLASSES = len(CHARACTERS) + 2
"""Printable ASCII, then "no character here" and "another character"."""
_PLACES = 16  # of the tokens of a position, told apart by a packer; those behind share the last


def show(ids: Tensor, places: Tensor, n: int) -> Tensor:
    """Tokens in the slots of their places, int64 ``[m]`` twice -> int64 ``[n, s]``, -1 where a slot is empty.

    There are as many slots as the fullest place needs, and one at least.
    """
    slots = ranks(places)
    shown = torch.full((n, int(slots.max()) + 1 if len(slots) else 1), -1, device=ids.device)
    shown[places, slots] = ids
    return shown


def side_by_side(shown: Sequence[Tensor], *, batch: bool = False) -> Tensor:
    """Rows of slots ``[t, s]`` after one another, or as a batch padded on the left; -1 fills what is missing."""
    slots = max(rows.shape[1] for rows in shown)
    equal = [F.pad(rows, (0, slots - rows.shape[1]), value=-1) for rows in shown]
    return pad_sequence(equal, batch_first=True, padding_value=-1, padding_side="left") if batch else torch.cat(equal)


def merged(meaning: Tensor, places: Tensor) -> Tensor:
    """The mean of the latents at each position: float ``[n, d]``, int64 ``[n]`` ascending -> float ``[m, d]``."""
    counts = torch.bincount(places)
    # A sum of many latents is not exact enough in half precision.
    sums = meaning.new_zeros(len(counts), meaning.shape[1], dtype=torch.float32).index_add(0, places, meaning.float())
    return (sums / counts[:, None]).to(meaning.dtype)


class Packer(nn.Module):
    """The order of a position's tokens, which their mean does not tell: what is added to it.

    Each token goes through one layer with a bias for its place and a view of the token before it; the mean of what
    comes out is projected. Starts from nothing.

    Args:
        width: ``d_llm``.
        hidden: Width of the layer.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.read = nn.Linear(2 * width, hidden, bias=False)
        self.place = nn.Parameter(torch.randn(_PLACES, hidden) * 0.5)
        self.write = nn.Linear(hidden, width, bias=False)
        nn.init.zeros_(self.write.weight)

    def forward(self, named: Tensor, there: Tensor, size: Tensor) -> Tensor:
        """What the order of tokens adds.

        Args:
            named: Embeddings of the tokens of each position, centred, float ``[m, s, d_llm]``.
            there: Which slots hold a token, the first ones of each position, bool ``[m, s]``.
            size: Spread of an embedding: what is read and written is in units of it.
        Returns:
            float ``[m, d_llm]``, nothing where no slot holds a token.
        """
        position, slot = there.nonzero(as_tuple=True)
        before = F.pad(named, (0, 0, 1, -1))
        tokens = torch.cat((named[position, slot], before[position, slot]), dim=-1) / size  # [k, 2 d_llm]
        read = F.gelu(self.read(tokens) + self.place[slot.clamp(max=_PLACES - 1)])
        sums = read.new_zeros(len(named), read.shape[-1]).index_add(0, position, read)
        written: Tensor = self.write(sums / there.sum(1, keepdim=True).clamp(min=1))
        return written * size


class SoftPromptFusion(nn.Module):
    """Projector and boundary embeddings.

    Args:
        config: Widths, and the compressor whose memories this was trained for.
    """

    kind: ClassVar[str] = "soft_prompt"
    in_context: ClassVar[bool] = True
    """Whether memory takes positions of the generator's context."""

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        self.config = config
        self.projector = nn.Sequential(
            nn.LayerNorm(config.memory_width - config.spelling_width),
            nn.Linear(config.memory_width - config.spelling_width, config.hidden_width),
            nn.GELU(),
            nn.Linear(config.hidden_width, config.generator_width),
        )
        self.boundaries = nn.Parameter(torch.randn(2, config.generator_width) * 0.02)
        self.speller = (
            nn.Sequential(
                nn.LayerNorm(config.spelling_width or config.memory_width),
                nn.Linear(config.spelling_width or config.memory_width, config.spelling * CHARACTER_CLASSES),
            )
            if config.spelling
            else None
        )
        self.packer = Packer(config.generator_width, config.packer_width) if config.packer_width else None
        self._centre_and_spread = Once(lambda words: (words.mean(0), words.std()))

    @classmethod
    def text_only(cls, generator_width: int) -> SoftPromptFusion:
        """A fusion for a generator that reads no memory: it refuses every memory."""
        return cls(FusionConfig(1, generator_width, hidden_width=1, fingerprint="none: this generator has no fusion"))

    @torch.no_grad()
    def match_scale(self, embeddings: Tensor) -> None:
        """Make soft prompts as large as the generator's token embeddings, ``[v, d_llm]``, before training.

        Larger ones drown the position embeddings that some models add to their input: nothing is learned for hundreds
        of steps.
        """
        probe = self.meaning(torch.randn(256, self.config.memory_width, generator=torch.Generator().manual_seed(0)))
        last = cast(nn.Linear, self.projector[-1])
        last.weight.mul_(embeddings.std() / probe.std())
        last.bias.zero_()
        if len(self.boundaries):
            self.boundaries.mul_(embeddings.std() / self.boundaries.std())

    @property
    def boundary_tokens(self) -> int:
        """Positions that each memory takes beside those of its latents."""
        return len(self.boundaries)

    def attach(self, model: PreTrainedModel) -> None:
        """Make a model ready for memory: nothing is needed where memory stands in the prompt."""

    def bind(self, fingerprint: str) -> None:
        """Take memories of this compressor only, from now on."""
        self.config = replace(self.config, fingerprint=fingerprint)

    def check(self, memory: VisualMemory) -> None:
        """Refuse a memory that this fusion was not trained for.

        Raises:
            IncompatibleMemoryError: If another compressor made it.
            ShapeError: If its width is another.
        """
        if self.config.fingerprint and memory.fingerprint != self.config.fingerprint:
            raise IncompatibleMemoryError(
                f"memory must come from compressor {self.config.fingerprint[:12]} (which this fusion was trained for), "
                f"got {memory.fingerprint[:12] or 'none'}; encode the passages anew with that compressor."
            )
        if memory.latents.shape[1] != self.config.memory_width:
            raise ShapeError(
                f"latents must be {self.config.memory_width} wide, got {memory.latents.shape[1]}; "
                "use the compressor that this fusion was trained for."
            )

    def read(self, generator: VistGenerator, latents: Tensor, places: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What the generator is given of one memory ``[n, d]``, boundaries included.

        Args:
            generator: Whose tokens are shown.
            latents: Of the memory, float ``[n, d]``.
            places: Position of each latent, int64 ``[n]``, ascending from 0 to ``m - 1`` without a gap
                (``VisualMemory.places``); None: one each.
        Returns:
            The soft prompt, float ``[m + 2, d_llm]``, and the tokens that each of its positions spells, int64
            ``[m + 2, s]``, -1 for none.
        """
        return self.read_many(generator, [(latents, places)])[0]

    def looked_at(
        self, generator: VistGenerator, latents: Tensor, places: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """What enters the generator of one memory, and the tokens that it shows: as :meth:`read` gives them."""
        return self.read(generator, latents, places)

    def read_many(
        self, generator: VistGenerator, memories: Sequence[tuple[Tensor, Tensor | None]]
    ) -> list[tuple[Tensor, Tensor]]:
        """As :meth:`read` of each memory, latents and places, in one pass of every layer."""
        counts = [len(latents) for latents, _ in memories]
        own = [
            torch.arange(n) if places is None else places.cpu() for n, (_, places) in zip(counts, memories, strict=True)
        ]
        sizes = [int(places[-1]) + 1 for places in own]
        starts = [0, *accumulate(sizes)]
        latents = torch.cat([latents for latents, _ in memories]).to(self.boundaries.device, self.boundaries.dtype)
        places = torch.cat([places + start for places, start in zip(own, starts, strict=False)]).to(latents.device)
        shown = self.shown(generator, latents, places, counts)
        words = cast(Tensor, generator.model.get_input_embeddings().weight)
        inside = self.inside(merged(self.meaning(latents), places), shown, words, embedding_scale(generator.model))
        return [
            (self.bounded(soft), self.between(told))
            for soft, told in zip(inside.split(sizes), shown.split(sizes), strict=True)
        ]

    def join(self, meaning: Tensor, shown: Tensor, words: Tensor, scale: float | Tensor = 1.0) -> Tensor:
        """Meaning ``[m, d_llm]`` and spelling as one soft prompt between its boundaries, ``[m + 2, d_llm]``.

        Args:
            meaning: What the projector makes of the latents of each position, float ``[m, d_llm]``.
            shown: Tokens that each position spells, int64 ``[m, s]``, -1 for none.
            words: The generator's embeddings, float ``[v, d_llm]``.
            scale: How many times larger it reads them (``embedding_scale``).
        """
        return self.bounded(self.inside(meaning, shown, words, scale))

    def inside(self, meaning: Tensor, shown: Tensor, words: Tensor, scale: float | Tensor = 1.0) -> Tensor:
        """As :meth:`join`, without the boundaries: ``[m, d_llm]``."""
        if self.speller is not None or self.config.tokens:
            there, (centre, spread) = shown >= 0, self._centre_and_spread(words)
            named = ((words[shown.clamp(min=0)] - centre) * there[..., None] * scale).to(meaning.dtype)
            meaning = meaning + named.sum(1) / there.sum(1, keepdim=True).clamp(min=1)
            if self.packer is not None:
                meaning = meaning + self.packer(named, there, spread * scale)
        return meaning

    def bounded(self, soft: Tensor) -> Tensor:
        """A soft prompt between its boundaries."""
        return torch.cat((self.boundaries[:1], soft, self.boundaries[1:]))

    def between(self, shown: Tensor) -> Tensor:
        """Tokens that positions spell, int64 ``[m, s]``, with those of the boundaries, which spell nothing."""
        return F.pad(shown, (0, 0, len(self.boundaries[:1]), len(self.boundaries[1:])), value=-1)

    def meaning(self, latents: Tensor) -> Tensor:
        """What the generator reads of latents: float ``[..., d]`` -> ``[..., d_llm]``."""
        read: Tensor = self.projector(latents[..., : latents.shape[-1] - self.config.spelling_width])
        return read

    def spelt(self, latents: Tensor) -> Tensor:
        """Scores of the characters that latents spell: float ``[..., d]`` -> ``[..., spelling, CHARACTER_CLASSES]``.

        Raises:
            ConfigError: If this fusion does not read spelling.
        """
        if self.speller is None:
            raise ConfigError("spelling must be 1 or more to spell a memory, got 0; train a fusion that reads it.")
        scores = self.speller(latents[..., -(self.config.spelling_width or latents.shape[-1]) :])
        return cast(Tensor, scores.unflatten(-1, (-1, CHARACTER_CLASSES)))

    def spell(self, latents: Tensor) -> list[str]:
        """The characters that each latent of a memory ``[n, d]`` spells, as far as they can be told.

        Raises:
            ConfigError: If this fusion does not read spelling.
        """
        latents = latents.to(self.boundaries.device, self.boundaries.dtype)
        classes = self.spelt(latents).argmax(-1)
        return ["".join(CHARACTERS[c] for c in row if c < len(CHARACTERS)) for row in classes.tolist()]

    def shown(
        self, generator: VistGenerator, latents: Tensor, places: Tensor, counts: Sequence[int] | None = None
    ) -> Tensor:
        """Tokens that the positions of a memory ``[n, d]`` spell, in reading order: int64 ``[m, s]``, -1 for none.

        Args:
            generator: Whose tokens they are.
            latents: Of one memory, or of several one after another.
            places: Position of each latent, int64 ``[n]``, ascending.
            counts: Latents of each memory, where these are several: no word goes on from one to the next.
        """
        size = int(places[-1]) + 1
        if self.config.tokens:
            known = read_ids(latents[:, -self.config.spelling_width :])
            told = known >= 0
            at = places[:, None].expand_as(known)[told]
            return show(known[told], at, size)
        if self.speller is None:
            return torch.full((size, 1), -1, device=latents.device)
        spelt = self.spell(latents)
        ids: list[int] = []
        latent: list[int] = []
        begin = 0
        for count in counts or [len(spelt)]:
            ends = list(accumulate(map(len, spelt[begin : begin + count])))
            encoded = generator.encoding("".join(spelt[begin : begin + count]), offsets=True)
            ids += encoded.input_ids
            middles = ((start + end - 1) // 2 for start, end in encoded.offset_mapping)
            latent += [begin + bisect_right(ends, middle) for middle in middles]
            begin += count
        at = places.cpu()[torch.tensor(latent, dtype=torch.long)]
        return show(torch.tensor(ids, dtype=torch.long), at, size).to(latents.device)

    @contextmanager
    def condition(self, generator: VistGenerator, prompts: list[Prompt], *, skip: int = 0) -> Iterator[dict[str, Any]]:
        """Keyword arguments of ``generate`` for a batch of prompts: left-padded embeddings and their mask.

        Leaves no state anywhere, so there is nothing to clean up after an exception.

        Args:
            generator: That they are for.
            prompts: What is asked.
            skip: Parts at the beginning of each prompt that were read already: they are checked and left out.
        """
        read = self.embed_many(generator, prompts, skip=skip)
        rows, tokens = [embeds for embeds, _ in read], [shown for _, shown in read]
        # Left padding, so that every prompt ends where its answer begins.
        embeds = pad_sequence(rows, batch_first=True, padding_side="left")
        lengths = torch.tensor([len(row) for row in rows], device=embeds.device)
        places = torch.arange(embeds.shape[1], device=embeds.device)
        mask = (places >= embeds.shape[1] - lengths[:, None]).long()
        inputs = {"inputs_embeds": embeds, "attention_mask": mask}
        if "shown" in signature(generator.model.forward).parameters:  # a model that copies
            inputs["shown"] = side_by_side(tokens, batch=True)
        yield inputs

    def embed(self, generator: VistGenerator, prompt: Prompt) -> tuple[Tensor, Tensor]:
        """One prompt as embeddings, float ``[t, d_llm]``, and the tokens that each position shows, ``[t, s]``."""
        return self.embed_many(generator, [prompt])[0]

    def embed_many(
        self, generator: VistGenerator, prompts: Sequence[Prompt], *, skip: int = 0
    ) -> list[tuple[Tensor, Tensor]]:
        """As :meth:`embed` of each prompt but its first ``skip`` parts; all memories are read in one pass."""
        table = generator.model.get_input_embeddings()
        parts = [generator.parts(prompt) for prompt in prompts]
        for row in parts:
            for part in row:
                if isinstance(part, VisualMemory):
                    self.check(part)
        parts = [row[skip:] for row in parts]
        memories = [part for row in parts for part in row if isinstance(part, VisualMemory)]
        read = iter(self.read_many(generator, [(m.latents, m.places) for m in memories]) if memories else [])

        def embedded(part: Tensor | VisualMemory) -> tuple[Tensor, Tensor]:
            soft, shown = next(read) if isinstance(part, VisualMemory) else (table(part), part[:, None])
            return soft.to(table.weight.dtype), shown

        nothing = table.weight.new_zeros(0, table.weight.shape[1]), torch.full((0, 1), -1, device=table.weight.device)
        rows = [list(map(embedded, row)) or [nothing] for row in parts]
        return [(torch.cat([soft for soft, _ in row]), side_by_side([shown for _, shown in row])) for row in rows]

    def save_pretrained(self, directory: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors``."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text(json.dumps({"fusion": self.kind, **asdict(self.config)}, indent=2))
        state = {name: tensor.detach().to(torch.bfloat16).contiguous() for name, tensor in self.state_dict().items()}
        save_file(state, str(directory / "model.safetensors"), metadata={"format": "pt"})

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> Self:
        """Read what ``save_pretrained`` wrote.

        Raises:
            CheckpointError: If a file is missing, torn, or of another kind of fusion.
        """
        directory = Path(directory)
        try:
            fields = json.loads((directory / "config.json").read_text())
            kind = fields.pop("fusion")
            if kind != cls.kind:
                raise CheckpointError(f"fusion in {directory} must be {cls.kind!r}, got {kind!r}.")
            fusion = cls(FusionConfig(**fields))
            fusion.load_state_dict(load_file(str(directory / "model.safetensors")))
        except (OSError, SafetensorError, AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"fusion in {directory} cannot be read ({error}); restore its files.") from error
        return fusion
