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
from vist_rag.generation.fusion.soft_prompt import itself, show
from vist_rag.generation.prefix_bert import SLOTS, PrefixBertForCausalLM, ranks
from vist_rag.rendering import Pages
from vist_rag.training.data import Question, titled
from vist_rag.training.lexical import hold, level, pieces_of_pages
from vist_rag.types import Passage

Task = Literal["reconstruct", "continue", "answer"]
RECONSTRUCT = "What does the document say?"
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
                if (tokens := self._tokens(example.target, shown)) is not None:
                    pointers[-1].append((len(row) - 1, tokens))
            row.append(generator.tokenize(template.question.replace("{question}", example.question)))
            row.append(generator.ids(after))
            segments.append(row)
        end = generator.ids([generator.tokenizer.eos_token_id])
        targets = [torch.cat((generator.tokenize(" " + example.target), end)) for example in examples]
        pages = self.compressor.renderer.render(contents)
        rates = rng.choices(list(self.rates), list(self.rates.values()), k=len(contents))
        return {
            "pixel_values": pages.pixel_values,
            "patch_mask": pages.patch_mask,
            "text_ids": pages.text_ids,
            "rates": rates,
            "segments": segments,
            "targets": targets,
            "windows": self._windows(contents, pages),
            "ideal": rng.random() < self.ideal,
            "pointers": pointers,
        }

    def _tokens(self, target: str, shown: str) -> Tensor | None:
        """Where the tokens of the target stand among those of what is shown, a row for each of up to four occurrences.

        int64 ``[o, t]``; None where the target does not occur in the same tokens.
        """
        tokenizer = self._generator[0].tokenizer
        wanted = tokenizer(" " + target, add_special_tokens=False).input_ids
        encoded = tokenizer(shown, add_special_tokens=False, return_offsets_mapping=True)
        begins = {start: i for i, (start, _) in enumerate(encoded.offset_mapping)}
        found = []
        for match in re.finditer(re.escape(target.lower().strip()), shown.lower()):
            i = begins.get(match.start())
            if wanted and i is not None and encoded.input_ids[i : i + len(wanted)] == wanted:
                found.append(range(i, i + len(wanted)))
        return torch.tensor([list(row) for row in found[:4]]) if found else None

    def _windows(self, contents: Sequence[str], pages: Pages) -> list[tuple[Tensor, Tensor, int]]:
        """Of each text, its word pieces, the latent that shows each (int64 ``[m]`` twice), and how many latents."""
        window = self.compressor.resampler.window
        encodings = self._generator[0].tokenizer.backend_tokenizer.encode_batch(
            list(contents), add_special_tokens=False
        )
        pieces: list[list[Tensor]] = [[] for _ in contents]
        latents: list[list[Tensor]] = [[] for _ in contents]
        counts = [0] * len(contents)
        used = pages.patch_mask.sum(1).tolist()
        shown = pieces_of_pages(pages, encodings, window)
        for text, patches, (ids, places) in zip(pages.text_ids.tolist(), used, shown, strict=True):
            pieces[text].append(torch.from_numpy(ids))
            latents[text].append(torch.from_numpy(places) + counts[text])
            counts[text] += max(1, -(-int(patches) // window))
        return [(torch.cat(p), torch.cat(at), n) for p, at, n in zip(pieces, latents, counts, strict=True)]

    def forward(
        self,
        pixel_values: Tensor,
        patch_mask: Tensor,
        text_ids: Tensor,
        rates: list[float],
        segments: list[list[Tensor | int]],
        targets: list[Tensor],
        windows: Sequence[tuple[Tensor, Tensor, int]] = (),
        pointers: Sequence[Sequence[tuple[int, Tensor]]] = (),
        *,
        ideal: bool = False,
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
            windows: Of each text, its word pieces, the latent that shows each, and how many latents there are.
            pointers: Of each prompt, the parts that show the target, and which of their tokens it is.
            ideal: Whether memory is what it should be, and not what the compressor makes.
        """
        if ideal:
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
            shown = [
                torch.cat(
                    [
                        self._shown(windows[part], len(memories[part]) - 2)
                        if isinstance(part, int)
                        else itself(part.cpu())
                        for part in row
                    ]
                    + [torch.full((len(target), SLOTS), -1)]
                )
                for row, target in zip(segments, targets, strict=True)
            ]
            extra["shown"] = pad_sequence(shown, batch_first=True, padding_value=-1, padding_side="left").to(device)
        labels = pad_sequence(targets, batch_first=True, padding_side="left", padding_value=-100).to(embeds.device)
        # Rows end together, so the targets are the last columns: no logits are computed for the prompt.
        keep = labels.shape[1] + 1
        output = self.lm(inputs_embeds=embeds, attention_mask=mask, use_cache=False, logits_to_keep=keep, **extra)
        logits = output.logits[:, :-1]
        told = labels != -100
        loss = F.cross_entropy(logits[told].float(), labels[told])
        figures = {"token_accuracy": (logits[told].argmax(-1) == labels[told]).float().mean().detach()}
        if isinstance(self.lm, PrefixBertForCausalLM):
            gold = self._gold(prompts, segments, targets, pointers, windows, (labels.shape[1], embeds.shape[1]))
            gold[..., :-1] &= (extra["shown"].flatten(1) >= 0)[:, None]  # what is not spelt cannot be copied
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
        windows: Sequence[tuple[Tensor, Tensor, int]],
        size: tuple[int, int],
    ) -> Tensor:
        """Places that show each token to be written, and its end, as ``CopyAttention`` counts them.

        bool ``[b, longest target, length * SLOTS + 1]``; ``size`` is longest target and length.
        """
        longest_target, length = size
        gold = torch.zeros(len(prompts), longest_target, length * SLOTS + 1, dtype=torch.bool)
        for i, (prompt, target) in enumerate(zip(prompts, targets, strict=True)):
            begin = length - len(target) - sum(map(len, prompt))  # left padding
            column = longest_target - len(target)
            gold[i, -1, -1] = bool(pointers[i])
            for part, tokens in pointers[i]:
                first, text = begin + sum(map(len, prompt[:part])), segments[i][part]
                if isinstance(text, int):
                    _, latents, n = windows[text]
                    merged = latents * (len(prompt[part]) - 2) // n  # as merge_neighbours groups them
                    slots = ranks(latents)
                    at = ((first + 1 + merged) * SLOTS + slots)[tokens]
                    copyable = (slots < SLOTS)[tokens]
                else:
                    at = (first + tokens) * SLOTS
                    copyable = torch.ones_like(at, dtype=torch.bool)
                columns = torch.arange(at.shape[1]).expand_as(at) + column
                gold[i, columns[copyable], at[copyable]] = True
        return gold.to(targets[0].device)

    @staticmethod
    def _shown(window: tuple[Tensor, Tensor, int], size: int) -> Tensor:
        """Word pieces that a memory spells, int64 ``[size + 2, SLOTS]``: merged latents spell nothing."""
        pieces, latents, n = window
        groups = torch.arange(n) * size // n
        alone = (torch.bincount(groups, minlength=size) == 1)[groups[latents]]
        return F.pad(show(pieces[alone], groups[latents[alone]], size), (0, 0, 1, 1), value=-1)

    def _ideal_memory(self, pieces: Tensor, latents: Tensor, n: int, rate: float) -> Tensor:
        """A soft prompt ``[m + 2, d_llm]`` that holds the pieces of each window, between the fusion's boundaries."""
        begin, end = self.fusion.boundaries[:1], self.fusion.boundaries[1:]
        with torch.no_grad():
            words = cast(Tensor, self.lm.get_input_embeddings().weight)
            held = hold(level(words)[pieces.to(begin.device)], latents.to(begin.device), n, words.mean(0))
            size = max(1, round(rate * n))
            memory = merge_neighbours(held, size) if size < n else held
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
