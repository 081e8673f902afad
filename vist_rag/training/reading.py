"""Teach a resampler, a projector and a generator to read memory: write the text back, look something up, answer."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils.rnn import pad_sequence

from vist_rag.compression import VistCompressor
from vist_rag.compression.memory import merge_neighbours
from vist_rag.generation import PromptTemplate, VistGenerator
from vist_rag.generation.prefix_bert import PrefixBertForCausalLM
from vist_rag.training.data import Question, titled
from vist_rag.training.lexical import level, weighted_means
from vist_rag.types import Passage

Task = Literal["reconstruct", "continue", "answer"]
RECONSTRUCT = "What does the document say?"
WINDOW_CHARACTERS = 10.7
"""Characters of English that four patches of the embedded atlas show."""
CONTINUE = "What comes after: {cue}?"


@dataclass(frozen=True)
class Example:
    """One thing to learn: what is shown (as memory or raw), what is asked, what is to be written."""

    passages: tuple[Passage, ...]
    question: str
    target: str
    raw: bool


def reconstruct_example(passage: Passage, rng: random.Random, *, words: tuple[int, int], raw: bool = False) -> Example:
    """Show a stretch of the passage; the whole of it is to be written back."""
    text = window(titled(passage.title, passage.text), rng.randint(*words), rng)
    return Example((Passage(text),), RECONSTRUCT, text, raw)


def continue_example(passage: Passage, rng: random.Random, *, words: tuple[int, int], raw: bool = False) -> Example:
    """Show a passage and a few words of it; the words after them are to be written."""
    text = window(passage.text, rng.randint(*words), rng)
    spelt = text.split()
    cue, length = rng.randint(2, 5), rng.randint(2, 10)
    at = rng.randint(0, max(0, len(spelt) - cue - length))
    question = CONTINUE.format(cue=" ".join(spelt[at : at + cue]))
    target = " ".join(spelt[at + cue : at + cue + length]) or spelt[-1]
    return Example((Passage(text, title=passage.title),), question, target, raw)


def answer_example(
    row: Question, rng: random.Random, *, words: tuple[int, int], others: Sequence[Passage] = (), raw: bool = False
) -> Example:
    """Show the passage of a question, among others where given; the answer is to be written."""
    lowered = row.context.lower()
    answer = next((a for a in row.answers if a.lower() in lowered), row.answers[0])
    text = window(row.context, rng.randint(*words), rng, keep=answer)
    shown = [Passage(text, title=row.title), *others]
    rng.shuffle(shown)
    return Example(tuple(shown), row.question, answer, raw)


def window(text: str, words: int, rng: random.Random, *, keep: str = "") -> str:
    """About ``words`` consecutive words of the text, from the start of a sentence where it fits, that hold ``keep``."""
    spans = [m.span() for m in re.finditer(r"\S+", text)]
    found = re.search(re.escape(keep.strip()), text, re.IGNORECASE) if keep.strip() else None
    if found:
        first = max(i for i, (start, _) in enumerate(spans) if start <= found.start())
        last = max(i for i, (start, _) in enumerate(spans) if start < found.end())
        words = max(words, last + 1 - first)
    if len(spans) <= words:
        return text
    if found:
        low, high = max(0, last + 1 - words), min(first, len(spans) - words)
    else:
        low, high = 0, len(spans) - words
    starts = [i for i in range(low, max(low, high) + 1) if i == 0 or text[spans[i - 1][1] - 1] in ".!?"]
    begin = rng.choice(starts) if starts else rng.randint(low, max(low, high))
    return text[spans[begin][0] : spans[min(len(spans), begin + words) - 1][1]]


class MemoryReading(nn.Module):
    """Compressor, fusion and generator under one loss: the next token of the target.

    Args:
        compressor: Its tower stays frozen; its resampler learns.
        generator: Its fusion and its model learn.
        rates: Shares of a memory's latents to train with, each with its weight, so that every size is practised.
        ideal: Share of batches that show the generator what a perfect compressor would: the mean embedding of the word
            pieces in each latent's window. It learns to read memory sooner from that, because what it is to copy is
            there.
    """

    def __init__(
        self,
        compressor: VistCompressor,
        generator: VistGenerator,
        *,
        rates: dict[float, float] | None = None,
        ideal: float = 0.0,
    ) -> None:
        super().__init__()
        self.ideal = ideal
        self.compressor = compressor
        self.fusion = generator.fusion
        self.lm = generator.model
        self._generator = [generator]  # in a list: not a module, so not saved twice
        self.rates = rates or {1.0: 1.0}
        self.template = PromptTemplate()

    def batch(self, examples: Sequence[Example], rng: random.Random) -> dict[str, Any]:
        """Render and tokenize examples; what ``forward`` takes."""
        generator, template = self._generator[0], self.template
        contents: list[str] = []
        segments: list[list[Tensor | int]] = []
        pointers: list[list[tuple[int, Tensor]]] = []
        before, after = generator.frame
        for example in examples:
            row: list[Tensor | int] = [generator.ids(before)]
            pointers.append([])
            for passage in example.passages:
                if example.raw:
                    row.append(generator.tokenize(template.raw_text(passage)))
                    shown = template.raw_text(passage)
                else:
                    row += [generator.tokenize(template.memory), len(contents)]
                    contents.append(passage.content)
                    shown = passage.content
                if (places := self._places(example.target, shown, raw=example.raw)) is not None:
                    pointers[-1].append((len(row) - 1, places))
            row.append(generator.tokenize(template.question.replace("{question}", example.question)))
            row.append(generator.ids(after))
            segments.append(row)
        end = generator.ids([generator.tokenizer.eos_token_id])
        targets = [torch.cat((generator.tokenize(" " + example.target), end)) for example in examples]
        ideal = rng.random() < self.ideal
        pages = self.compressor.renderer.render([] if ideal else contents)
        rates = rng.choices(list(self.rates), list(self.rates.values()), k=len(contents))
        return {
            "pixel_values": pages.pixel_values,
            "patch_mask": pages.patch_mask,
            "text_ids": pages.text_ids,
            "rates": rates,
            "segments": segments,
            "targets": targets,
            "windows": [self._windows(content) for content in contents] if ideal else [],
            "pointers": pointers,
        }

    def _places(self, target: str, shown: str, *, raw: bool) -> Tensor | None:
        """Where each token of the target stands in what is shown, a row for each of up to four occurrences, ``[o, t]``.

        Raw text counts tokens; memory counts shares of the text, in 0..1. None where the target does not occur.
        """
        tokenizer = self._generator[0].tokenizer
        found = [m.start() for m in re.finditer(re.escape(target.lower()), shown.lower())][:4]
        if not found or not target:
            return None
        offsets = tokenizer(" " + target, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
        middles = torch.tensor([(start + end - 1) / 2 - 1 for start, end in offsets])
        places = torch.tensor(found)[:, None] + middles
        if not raw:
            return places / len(shown)
        spans = tokenizer(shown, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
        starts = torch.tensor([start for start, _ in spans], dtype=torch.float)
        return (torch.searchsorted(starts, places, right=True) - 1).clamp(min=0)

    def _windows(self, content: str) -> tuple[Tensor, Tensor]:
        """Word pieces of a text, and the latent whose window would show each: int64 ``[t]`` twice."""
        encoded = self._generator[0].tokenizer(content, add_special_tokens=False, return_offsets_mapping=True)
        middles = [(start + end - 1) // 2 for start, end in encoded.offset_mapping]
        return torch.tensor(encoded.input_ids), torch.tensor([int(m / WINDOW_CHARACTERS) for m in middles])

    def forward(
        self,
        pixel_values: Tensor,
        patch_mask: Tensor,
        text_ids: Tensor,
        rates: list[float],
        segments: list[list[Tensor | int]],
        targets: list[Tensor],
        windows: Sequence[tuple[Tensor, Tensor]] = (),
        pointers: Sequence[Sequence[tuple[int, Tensor]]] = (),
    ) -> dict[str, Tensor]:
        """Loss of the targets, and the share of their tokens that come first in the distribution.

        A generator with a ``CopyAttention`` also learns to point at the tokens or latents that show what it writes.

        Args:
            pixel_values: float ``[p, c, size, size]``.
            patch_mask: bool ``[p, s]``.
            text_ids: Text of each page, int64 ``[p]``.
            rates: Share of the latents that each text keeps.
            segments: Each prompt as token ids and, for a memory, the number of its text.
            targets: Token ids to be written, a row each.
            windows: Of each text, its word pieces and the latents that show them, where memory is ideal.
            pointers: Of each prompt, the parts that show the target, and where (``_places``).
        """
        if windows:
            memories = [self._ideal_memory(*window, rate) for window, rate in zip(windows, rates, strict=True)]
        else:
            memories = self._memories(pixel_values, patch_mask, text_ids, rates)
        device = self.fusion.boundaries.device
        # One look-up for all: the gradient of each would be as large as the whole table.
        texts = [part.to(device) for row in segments for part in row if not isinstance(part, int)]
        targets = [target.to(device) for target in targets]
        looked_up = self.lm.get_input_embeddings()(torch.cat((*texts, *targets)))
        pieces = iter(looked_up.split([len(part) for part in (*texts, *targets)]))
        prompts = [[memories[part] if isinstance(part, int) else next(pieces) for part in row] for row in segments]
        rows = [torch.cat((*prompt, next(pieces))) for prompt in prompts]
        prefixes = [
            torch.arange(len(row), device=device) < len(row) - len(target)
            for row, target in zip(rows, targets, strict=True)
        ]
        embeds = pad_sequence(rows, batch_first=True, padding_side="left")
        ones = [torch.ones(len(row), dtype=torch.long, device=embeds.device) for row in rows]
        mask = pad_sequence(ones, batch_first=True, padding_side="left")
        extra = {}
        if isinstance(self.lm, PrefixBertForCausalLM):
            extra["prefix_mask"] = pad_sequence(prefixes, batch_first=True, padding_side="left")
        labels = pad_sequence(targets, batch_first=True, padding_side="left", padding_value=-100).to(embeds.device)
        # Rows end together, so the targets are the last columns: no logits are computed for the prompt.
        keep = labels.shape[1] + 1
        output = self.lm(inputs_embeds=embeds, attention_mask=mask, use_cache=False, logits_to_keep=keep, **extra)
        logits = output.logits[:, :-1]
        told = labels != -100
        loss = F.cross_entropy(logits[told].float(), labels[told])
        figures = {"token_accuracy": (logits[told].argmax(-1) == labels[told]).float().mean().detach()}
        if isinstance(self.lm, PrefixBertForCausalLM):
            gold = self._gold(prompts, segments, targets, pointers, labels.shape[1], embeds.shape[1])
            pointed = (output.attentions[0][:, :-1] * gold).sum(-1)[gold.any(-1)]
            if len(pointed):
                loss = loss - pointed.clamp(min=1e-6).log().mean()
                figures["pointed"] = pointed.mean().detach()
        return {"loss": loss, **figures}

    @staticmethod
    def _gold(
        prompts: Sequence[Sequence[Tensor]],
        segments: Sequence[Sequence[Tensor | int]],
        targets: Sequence[Tensor],
        pointers: Sequence[Sequence[tuple[int, Tensor]]],
        longest_target: int,
        length: int,
    ) -> Tensor:
        """Positions that show each token to be written, and its end: bool ``[b, longest_target, length + 1]``."""
        gold = torch.zeros(len(prompts), longest_target, length + 1, dtype=torch.bool, device=targets[0].device)
        for i, (prompt, target) in enumerate(zip(prompts, targets, strict=True)):
            begin = length - len(target) - sum(map(len, prompt))  # left padding
            column = longest_target - len(target)
            gold[i, -1, -1] = bool(pointers[i])
            for part, places in pointers[i]:
                first, size = begin + sum(map(len, prompt[:part])), len(prompt[part])
                if isinstance(segments[i][part], int):
                    # Between its boundaries, a memory shows the text in equal shares.
                    at = first + 1 + (places * (size - 2)).long().clamp(0, size - 3)
                else:
                    at = first + places.long().clamp(max=size - 1)
                tokens = torch.arange(at.shape[1]).expand_as(at) + column
                gold[i, tokens.flatten(), at.flatten()] = True
        return gold

    def _ideal_memory(self, pieces: Tensor, latents: Tensor, rate: float) -> Tensor:
        """A soft prompt ``[n + 2, d_llm]`` made of ``weighted_means``, between the fusion's boundaries."""
        begin, end = self.fusion.boundaries[:1], self.fusion.boundaries[1:]
        with torch.no_grad():
            embeddings = level(cast(Tensor, self.lm.get_input_embeddings().weight))[pieces.to(begin.device)]
            n = int(latents.max()) + 1
            means = weighted_means(embeddings, latents.to(begin.device), n)
            size = max(1, round(rate * n))
            memory = merge_neighbours(means, size) if size < n else means
        return torch.cat((begin, memory, end))

    def _memories(self, pixel_values: Tensor, patch_mask: Tensor, text_ids: Tensor, rates: list[float]) -> list[Tensor]:
        """Each text's soft prompt, ``[n + 2, d_llm]``."""
        if not len(pixel_values):
            return []
        latents, standing = self.compressor(pixel_values, patch_mask)
        merged = []
        for text_id, rate in enumerate(rates):
            pages = (text_ids == text_id).nonzero().flatten().tolist()
            memory = torch.cat([latents[p][standing[p]] for p in pages])
            size = max(1, round(rate * len(memory)))
            merged.append(merge_neighbours(memory, size) if size < len(memory) else memory)
        return [self.fusion.project(memory) for memory in merged]
