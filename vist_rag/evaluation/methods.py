"""The ways to hand passages to a generator, all behind one protocol: passages, question, budget -> prompt.

A budget is what the passages may take together, in positions of the generator's context; every method stays below it,
so that methods are compared at equal cost. What no method can go below is one latent, or one word, of one passage.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from vist_rag.checkpoint import find_checkpoint, load_compressor, read_settings
from vist_rag.compression import PassageCompressor, VisualMemory
from vist_rag.compression.memory import PASSAGE_GAP
from vist_rag.errors import ConfigError, MissingDependencyError
from vist_rag.evaluation.provenance import directory_hash
from vist_rag.generation import Prompt, PromptTemplate, VistGenerator
from vist_rag.types import Passage


@dataclass(frozen=True)
class Asked:
    """A question, and the passages that are read for it, best first."""

    id: str
    question: str
    passages: tuple[Passage, ...]


@dataclass(frozen=True)
class EvalModel:
    """A checkpoint, and how it wants to be asked."""

    compressor: PassageCompressor
    generator: VistGenerator
    template: PromptTemplate
    max_new_tokens: int
    stop: tuple[str, ...]
    sha256: str
    memories: dict[str, VisualMemory] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def load(cls, checkpoint: str | Path | None, *, device: str | None = None) -> EvalModel:
        """Read a checkpoint: a directory, a hub id, or None for the embedded one."""
        directory = find_checkpoint(checkpoint)
        settings = read_settings(directory)
        return cls(
            load_compressor(directory, device=device),
            VistGenerator.from_pretrained(directory / "generator", fusion=directory / "fusion", device=device),
            PromptTemplate(**settings.get("template", {})),
            int(settings.get("max_new_tokens", 32)),
            tuple(settings.get("stop", ())),
            directory_hash(directory),
        )

    def remember(self, passages: Sequence[Passage]) -> None:
        """Compress what is not compressed yet, once for all methods, and keep it as an index does: in float16."""
        # By content: blocks of one run may call different passages by one id.
        lacking = list(dict.fromkeys(p.content for p in passages if p.content not in self.memories))
        for content, memory in zip(lacking, self.compressor.encode(lacking), strict=True):
            self.memories[content] = self.compressor.memory(memory.latents.half())

    def raw_tokens(self, passage: Passage) -> int:
        """Positions that a passage takes as text."""
        return self.generator.count_tokens(self.template.raw_text(passage))

    def passage_tokens(self, prompt: Prompt, question: str) -> int:
        """Positions of a prompt that the passages take, with all that frames them."""
        return self.generator.prompt_length(prompt) - self.generator.prompt_length(self.closed(question))

    def closed(self, question: str) -> Prompt:
        """The prompt without passages."""
        return self.template.build(question, [], [])

    @cached_property
    def memory_frame(self) -> int:
        """Positions that a memory takes beside its latents."""
        return self.generator.count_tokens(self.template.memory) + self.generator.fusion.boundary_tokens


class Method(Protocol):
    """A way to hand over passages.

    Attributes:
        model: Whose generator reads the prompt.
    """

    model: EvalModel

    def prepare(self, asked: Sequence[Asked]) -> None:
        """See all that will be asked; once, before any prompt."""

    def prompt(self, passages: Sequence[Passage], question: str, budget: int) -> Prompt:
        """The prompt, with the passages (best first) in at most ``budget`` positions."""


class ClosedBook:
    """No passage: what the generator knows by itself."""

    def __init__(self, model: EvalModel) -> None:
        self.model = model

    def prepare(self, asked: Sequence[Asked]) -> None:
        """Nothing to do."""

    def prompt(self, passages: Sequence[Passage], question: str, budget: int) -> Prompt:
        """The question alone."""
        return self.model.closed(question)


class Raw(ClosedBook):
    """Text, as many of the best passages as fit whole."""

    def prompt(self, passages: Sequence[Passage], question: str, budget: int) -> Prompt:
        """Whole passages; the best one is cut where it does not fit by itself."""
        whole = self._fitting(passages, budget)
        shown = passages[:whole] if whole else [cut(self.model, passages[0], budget)]
        return self.model.template.build(question, shown, [])

    def _fitting(self, passages: Sequence[Passage], budget: int) -> int:
        total = 0
        for count, passage in enumerate(passages):
            total += self.model.raw_tokens(passage)
            if total > budget:
                return count
        return len(passages)


class Truncated(Raw):
    """Text, the best passages first, cut off where the budget ends."""

    def prompt(self, passages: Sequence[Passage], question: str, budget: int) -> Prompt:
        """Whole passages and the beginning of the next."""
        whole = self._fitting(passages, budget)
        shown = list(passages[:whole])
        if whole < len(passages):
            left = budget - sum(self.model.raw_tokens(p) for p in shown)
            part = cut(self.model, passages[whole], left)
            if self.model.raw_tokens(part) <= left or not shown:
                shown.append(part)
        return self.model.template.build(question, shown, [])


class FrequencyDeletion(ClosedBook):
    """Text without its most frequent words: a floor for methods that delete tokens (LLMLingua).

    How frequent a token is, is counted over all passages that will be read. A word weighs as much as its rarest token.
    """

    def prepare(self, asked: Sequence[Asked]) -> None:
        """Count tokens."""
        counts: Counter[int] = Counter()
        for passage in dict.fromkeys(p for row in asked for p in row.passages):
            counts.update(self.model.generator.tokenize(passage.text).tolist())
        self._counts = counts

    def prompt(self, passages: Sequence[Passage], question: str, budget: int) -> Prompt:
        """The rarest words of the passages, in reading order."""
        model, read = self.model, list(passages)
        empty = [model.raw_tokens(replace(p, text="")) for p in read]
        while len(read) > 1 and sum(empty[: len(read)]) >= budget:
            read.pop()
        words = [(i, word) for i, passage in enumerate(read) for word in passage.text.split()]
        tokens = [model.generator.tokenize(" " + word).tolist() for _, word in words]
        weight = [-min((self._counts[t] for t in some), default=0) for some in tokens]
        left, kept = budget - sum(empty[: len(read)]), []
        # Of equals, the earlier one.
        for i in sorted(range(len(words)), key=lambda i: (-weight[i], i)):
            if len(tokens[i]) <= left:
                left -= len(tokens[i])
                kept.append(i)
        kept = kept or [0]
        while True:
            texts = [" ".join(words[i][1] for i in sorted(kept) if words[i][0] == p) for p in range(len(read))]
            shown = [replace(passage, text=text) for passage, text in zip(read, texts, strict=True)]
            # Words may take more tokens side by side than one by one: the least of them goes.
            if len(kept) == 1 or sum(model.raw_tokens(p) for p in shown) <= budget:
                return model.template.build(question, [p for p in shown if p.text], [])
            kept.pop()


class LLMLingua2(ClosedBook):
    """LLMLingua-2 (arXiv:2403.12968), by its own package: extra ``llmlingua``, and its model from the hub.

    Args:
        model: Whose generator reads the prompt.
        name: Hub id or directory of LLMLingua-2's token classifier.
    """

    def __init__(
        self, model: EvalModel, name: str = "microsoft/llmlingua-2-bert-base-multilingual-cased-meetingbank"
    ) -> None:
        super().__init__(model)
        try:
            from llmlingua import PromptCompressor
        except ImportError as error:
            raise MissingDependencyError("the method llmlingua2", "llmlingua", "llmlingua") from error
        self._compressor = PromptCompressor(name, use_llmlingua2=True, device_map=str(model.generator.device))

    def prompt(self, passages: Sequence[Passage], question: str, budget: int) -> Prompt:
        """The passages as LLMLingua-2 shortens them; what it leaves over the budget is cut off."""
        raw = [self.model.raw_tokens(p) for p in passages]
        read: list[Passage] = []
        left = budget
        for passage, tokens in zip(passages, raw, strict=True):
            share = max(1, budget * tokens // sum(raw))
            kept = self._compressor.compress_prompt_llmlingua2([passage.text], rate=min(1.0, share / tokens))
            short = replace(passage, text=str(kept["compressed_prompt"]))
            if self.model.raw_tokens(short) > left:
                short = cut(self.model, short, left)
            if self.model.raw_tokens(short) <= left or not read:
                read.append(short)
                left -= self.model.raw_tokens(short)
        return self.model.template.build(question, read, [])


class Memory:
    """Memory: every passage in its share of the positions that the budget allows."""

    def __init__(self, model: EvalModel) -> None:
        self.model = model

    def prepare(self, asked: Sequence[Asked]) -> None:
        """Compress the passages."""
        self.model.remember([p for row in asked for p in row.passages])

    def prompt(self, passages: Sequence[Passage], question: str, budget: int) -> Prompt:
        """Memories of as many of the best passages as have room for a position."""
        return self.model.template.build(question, [], self.read(passages, budget))

    def read(self, passages: Sequence[Passage], budget: int) -> list[VisualMemory]:
        """The memories, best first, in at most ``budget`` positions."""
        memories = [self.model.memories[p.content] for p in passages]
        sizes = share(
            [self.model.raw_tokens(p) for p in passages], list(map(len, memories)), budget, self.model.memory_frame
        )
        return [memory.coarsen(size) for memory, size in zip(memories, sizes, strict=False)]


class SlowFast(Memory):
    """The best passages as text where they fit, the others as memory.

    Args:
        model: Whose generator reads the prompt.
        raw: How many are read as text, at most; fewer where the budget holds no more beside a latent of the next.
    """

    def __init__(self, model: EvalModel, raw: int = 1) -> None:
        if raw < 1:
            raise ConfigError(f"raw of slow_fast must be 1 or more, got {raw}; without text the method is memory.")
        super().__init__(model)
        self._raw = raw

    def prompt(self, passages: Sequence[Passage], question: str, budget: int) -> Prompt:
        """Raw and memory; memory alone where the budget holds no whole passage beside a latent of the next."""
        for count in range(min(self._raw, len(passages)), 0, -1):
            left = budget - sum(self.model.raw_tokens(passage) for passage in passages[:count])
            others = passages[count:]
            if left >= (self.model.memory_frame + 1 if others else 0):
                return self.model.template.build(question, passages[:count], self.read(others, left) if others else [])
        return super().prompt(passages, question, budget)


class JoinedMemory(Memory):
    """One memory of all passages, rendered one behind the other as the paper does: made anew for every question."""

    def prepare(self, asked: Sequence[Asked]) -> None:
        """Compress each question's passages together."""
        self.model.remember([self._joined(row.passages) for row in asked])

    def read(self, passages: Sequence[Passage], budget: int) -> list[VisualMemory]:
        """The one memory, in at most ``budget`` positions."""
        memory = self.model.memories[self._joined(passages).content]
        return [memory.coarsen(max(1, min(len(memory), budget - self.model.memory_frame)))]

    @staticmethod
    def _joined(passages: Sequence[Passage]) -> Passage:
        # The best last, next to the question, as in every prompt.
        return Passage(PASSAGE_GAP.join(p.content for p in reversed(passages)))


class ShuffledMemory(Memory):
    """A control: the memory of another question's passages, none of them the right one."""

    def prepare(self, asked: Sequence[Asked]) -> None:
        """Find a stranger for each question, far away in the list."""
        super().prepare(asked)
        found = strangers([row.passages for row in asked])
        self._others = {row.passages: asked[i].passages for row, i in zip(asked, found, strict=True)}

    def read(self, passages: Sequence[Passage], budget: int) -> list[VisualMemory]:
        """Another question's memories."""
        return super().read(self._others[tuple(passages)], budget)


class BlankMemory(Memory):
    """A control: as many latents of an empty page."""

    def prepare(self, asked: Sequence[Asked]) -> None:
        """Compress nothing."""
        super().prepare(asked)
        self._blank = self.model.compressor.encode([""])[0]

    def read(self, passages: Sequence[Passage], budget: int) -> list[VisualMemory]:
        """Memories of the same sizes that say nothing."""
        blank = self._blank.latents[:1]
        return [
            replace(memory, latents=blank.expand(len(memory.latents), -1)) for memory in super().read(passages, budget)
        ]


METHODS: dict[str, Callable[[EvalModel], Method]] = {
    "closed_book": ClosedBook,
    "raw": Raw,
    "truncated": Truncated,
    "frequency": FrequencyDeletion,
    "llmlingua2": LLMLingua2,
    "memory": Memory,
    "joined_memory": JoinedMemory,
    "slow_fast": SlowFast,
    "shuffled_memory": ShuffledMemory,
    "blank_memory": BlankMemory,
}
TRAINED = ("memory_matched", "mean_pool", "text_encoder", "text_encoder_flat")
"""Memory of other compressors, each by a checkpoint of its own: ``vist-rag train baselines``."""
WITHOUT_BUDGET = ("closed_book",)
"""Methods that no budget changes: one figure."""


def strangers(read: Sequence[Sequence[Passage]]) -> list[int]:
    """For each question, by the passages that are read for it, another one far away that shares none of them.

    Raises:
        ConfigError: If a question has no such other.
    """
    ids = [{p.id for p in passages} for passages in read]
    n, shift = len(read), max(1, len(read) // 2 - 1)
    found = [next((j % n for j in range(i + shift, i + shift + n) if not ids[i] & ids[j % n]), None) for i in range(n)]
    if None in found:
        raise ConfigError("shuffled_memory must have questions about different passages, got one passage for all.")
    return [j for j in found if j is not None]


def share(raw: Sequence[int], full: Sequence[int], budget: int, frame: int) -> list[int]:
    """Latents of each passage, so that all of them take at most ``budget`` positions.

    In proportion to the passages' length; the worst passages are left out where there is no room for a latent each.

    Args:
        raw: Tokens of each passage as text, best first.
        full: Latents that each memory has.
        budget: Positions for all.
        frame: Positions that each memory takes beside its latents.
    Returns:
        Sizes, of as many of the best passages as are read; at least one latent of the best one.
    """
    for count in range(len(raw), 0, -1):
        total = sum(raw[:count])
        sizes = [min(n, math.floor(budget * r / total) - frame) for r, n in zip(raw[:count], full, strict=False)]
        if min(sizes) >= 1:
            break
    else:
        return [max(1, min(full[0], budget - frame))] if full else []
    left = budget - sum(sizes) - frame * count
    for i in range(count):  # what rounding left over, and what short memories did not need
        more = min(left, full[i] - sizes[i])
        sizes[i] += more
        left -= more
    return sizes


def cut(model: EvalModel, passage: Passage, budget: int) -> Passage:
    """The beginning of a passage that fits ``budget`` positions as text; at least its first token.

    A title that takes the whole budget by itself is left out.
    """
    if model.raw_tokens(replace(passage, text="")) >= budget:
        passage = replace(passage, title="")
    allowed = max(1, budget - model.raw_tokens(replace(passage, text="")))
    encoded = model.generator.tokenizer(
        passage.text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
    )
    ends = [end for _, end in encoded.offset_mapping][:allowed]
    while ends:
        short = replace(passage, text=passage.text[: ends[-1]])
        if len(ends) == 1 or model.raw_tokens(short) <= budget:
            return short
        ends.pop()
    return passage


def check_method(name: str, trained: Mapping[str, EvalModel]) -> None:
    """Refuse a method that cannot be made.

    Raises:
        ConfigError: If there is no such method, or a trained one has no checkpoint.
    """
    if name in TRAINED and name not in trained:
        raise ConfigError(
            f"{name} must have a checkpoint, got none; train one (vist-rag train baselines) and give it as "
            f"--checkpoint {name}=DIR."
        )
    if name not in METHODS and name not in trained:
        raise ConfigError(f"method must be one of {', '.join((*METHODS, *TRAINED))}, got {name!r}.")


def make_method(
    name: str, model: EvalModel, trained: Mapping[str, EvalModel], settings: Mapping[str, Any] | None = None
) -> Method:
    """A method by its name.

    Args:
        name: One of ``METHODS``, or a key of ``trained``.
        model: The checkpoint that is evaluated.
        trained: Checkpoints of the trained baselines, by method.
        settings: Further arguments of the method.
    Raises:
        ConfigError: As ``check_method``.
    """
    check_method(name, trained)
    return Memory(trained[name]) if name in trained else METHODS[name](model, **(settings or {}))


def budget_of(rate: float | None, tokens: int | None, raw: int, room: int) -> int:
    """Positions that the passages may take: the raw ones over the rate, or a fixed number, and never more than fit."""
    asked = tokens if tokens is not None else raw if rate is None else math.floor(raw / rate)
    return max(1, min(asked, room))
