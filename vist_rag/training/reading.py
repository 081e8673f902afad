"""Teach a resampler, a projector and a generator to read memory: write the text back, look something up, answer."""

from __future__ import annotations

import copy
import random
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils.rnn import pad_sequence

from vist_rag.compression import PassageCompressor
from vist_rag.compression.memory import places
from vist_rag.errors import ConfigError
from vist_rag.generation import CrossAttentionFusion, PromptTemplate, VistGenerator
from vist_rag.generation.fusion.soft_prompt import merged, show, side_by_side
from vist_rag.generation.prefix_bert import PrefixBertForCausalLM, shown_behind
from vist_rag.generation.words import embedding_scale
from vist_rag.rendering import Pages
from vist_rag.training.examples import RECONSTRUCT, Example, misspell
from vist_rag.training.lexical import pack, pieces_of_pages
from vist_rag.training.objectives import (
    Pve,
    distillation_loss,
    next_token_loss,
    pooled_words,
    reconstruction_loss,
    sample_rate,
    states_loss,
)

_FRAME_TOKENS = 24  # of a prompt beside its passages, question and answer

Window = tuple[Tensor, Tensor, int]
"""Word pieces of a text, the latent that shows each (int64 ``[m]`` twice), and how many latents there are."""


class MemoryReading(nn.Module):
    """Compressor, fusion and generator under one loss: the next token of the target.

    Args:
        compressor: Its tower stays frozen; its resampler learns.
        generator: Its fusion and its model learn.
        rates: Shares of a memory's latents to train with, each with its weight, so that every size is practised.
        ideal: Share of batches that show the generator what a perfect compressor would: the word pieces in each
            latent's window. It learns to read memory sooner from that, because what it is to copy is there.
        slips: Share of the characters that ideal memory spells wrong, as a real one does.
        distil: Weight of self-distillation: reading memory, the generator must expect each token of the target as its
            teacher does (``teach_itself``), which reads the same text raw.
        states: Weight of the same at every layer: a position must be in the state that the teacher is in where it reads
            the same words. It tells a small generator far more about reading than answers do.
        pve: How memory is drawn towards the words of its text.
    """

    def __init__(
        self,
        compressor: PassageCompressor,
        generator: VistGenerator,
        *,
        rates: dict[float, float] | None = None,
        ideal: float = 0.0,
        slips: float = 0.0,
        distil: float = 0.0,
        states: float = 0.0,
        pve: Pve | None = None,
    ) -> None:
        super().__init__()
        self.ideal, self.slips, self.distil, self.states, self.pve = ideal, slips, distil, states, pve
        self.compressor = compressor
        self.fusion = generator.fusion
        self.lm = generator.model
        self._generator = [generator]  # in a list: not a module, so not saved twice
        base = (
            self.lm.get_base_model() if hasattr(self.lm, "get_base_model") else self.lm
        )  # adapters around it take all
        self._takes = signature(base.forward).parameters
        self._teacher: list[nn.Module] = []
        self.rates = rates or {1.0: 1.0}
        self.template = PromptTemplate()

    def teach_itself(self, *, frozen: bool = True) -> None:
        """Needed once where ``distil`` or ``states`` is above 0.

        Args:
            frozen: Whether the teacher is the generator as it is now; else it is the generator as it is at each step.
                A generator that does not learn is its own teacher and is not copied; one that learns by adapters alone
                is its own without them.
        """
        learns = any(w.requires_grad and "lora_" not in name for name, w in self.lm.named_parameters())
        self._teacher = [copy.deepcopy(self.lm).requires_grad_(False).eval() if frozen and learns else self.lm]

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """Compute the generator's layers again in the backward pass, in the place of keeping what they gave."""
        lm: Any = self.lm
        enable = getattr(lm, "activation_checkpointing_enable", None) or lm.gradient_checkpointing_enable
        enable(activation_checkpointing_kwargs or {"use_reentrant": False}, **options)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """The same, under its name in earlier versions of transformers."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **options)

    def batch(self, examples: Sequence[Example], rng: random.Random) -> dict[str, Any]:
        """Render and tokenize examples; what ``forward`` takes.

        What does not fit the generator's context is left out. Memories are coarsened until they fit; where their texts
        would not, there is no teacher.

        Raises:
            ConfigError: If nothing is left.
        """
        generator, template = self._generator[0], self.template
        found = len(examples)
        examples = [e for e in examples if (self._fits(e) if e.raw else self._room(e) >= len(e.passages))]
        if not examples:
            raise ConfigError(
                f"examples must fit {generator.context_tokens} positions (the generator's context), got "
                f"{found} that do not; lower words, prompt_words or memory_words."
            )
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
            if example.question:
                row.append(generator.tokenize(template.question.replace("{question}", example.question)))
            row.append(generator.ids(after))
            segments.append(row)
        end = generator.ids([generator.tokenizer.eos_token_id])
        targets = [
            torch.cat((generator.tokenize(" " + example.target), end[: int(example.ends)])) for example in examples
        ]
        pages = self.compressor.renderer.render(contents)
        windows = self._windows(contents, pages)
        rates = self._rates(examples, [n for *_, n in windows], rng)
        ideal = rng.random() < self.ideal
        return {
            "pixel_values": pages.pixel_values,
            "patch_mask": pages.patch_mask,
            "text_ids": pages.text_ids,
            "places": [places(n, max(1, round(rate * n))) for (*_, n), rate in zip(windows, rates, strict=True)],
            "segments": segments,
            "targets": targets,
            "windows": windows,
            "spelt": self._windows([misspell(text, self.slips, rng) for text in contents], pages) if ideal else None,
            "pointers": pointers,
            "taught": all(example.raw or self._fits(example) for example in examples),
            "whole": all(example.question == RECONSTRUCT for example in examples),
            # A text that its tokenizer makes nothing of has no words to be drawn to.
            "kept_words": [self.pve.kept(window[0], rng) for window in windows]
            if self.pve and not ideal and all(len(window[0]) for window in windows)
            else None,
        }

    def _fits(self, example: Example) -> bool:
        """Whether a teacher can read the example, all of it as text."""
        texts = [self.template.raw_text(passage) for passage in example.passages]
        generator = self._generator[0]
        tokens = generator.tokenizer("\n".join((*texts, example.question, example.target)), verbose=False).input_ids
        longest = generator.context_tokens
        return longest is None or len(tokens) + _FRAME_TOKENS <= longest

    def _room(self, example: Example) -> int:
        """Positions that all memories of an example may take together, boundaries aside; -1: its text is too long."""
        generator, passages = self._generator[0], len(example.passages)
        limit = generator.context_tokens
        if limit is None:
            return sys.maxsize
        said = generator.count_tokens(f"{example.question}\n{example.target}")
        if not generator.fusion.in_context:
            return sys.maxsize if said + _FRAME_TOKENS <= limit else -1
        between = generator.count_tokens(self.template.memory) + generator.fusion.boundary_tokens
        return limit - _FRAME_TOKENS - said - passages * between

    def _rates(self, examples: Sequence[Example], latents: Sequence[int], rng: random.Random) -> list[float]:
        """Share of its latents that each memory takes positions for: drawn, and less where memories do not fit."""
        rates = [sample_rate(self.rates, rng) for _ in latents]
        begin = 0
        for example in examples:
            if example.raw:
                continue
            some = slice(begin, begin := begin + len(example.passages))
            wanted = sum(rate * n for rate, n in zip(rates[some], latents[some], strict=True))
            # Half a position of each memory may be rounded up, and none has less than one.
            less = min(1.0, max(0.0, self._room(example) - len(example.passages)) / wanted)
            rates[some] = [rate * less for rate in rates[some]]
        return rates

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

    def _windows(self, contents: Sequence[str], pages: Pages) -> list[Window]:
        """The windows of each text."""
        window = self.compressor.window
        encodings = self._generator[0].tokenizer.backend_tokenizer.encode_batch(
            list(contents), add_special_tokens=False
        )
        pieces: list[list[Tensor]] = [[] for _ in contents]
        latents: list[list[Tensor]] = [[] for _ in contents]
        counts = [0] * len(contents)
        used = pages.patch_mask.sum(1).tolist()
        shown = pieces_of_pages(pages, encodings, window)
        for text, patches, (ids, at) in zip(pages.text_ids.tolist(), used, shown, strict=True):
            pieces[text].append(torch.from_numpy(ids))
            latents[text].append(torch.from_numpy(at) + counts[text])
            counts[text] += max(1, -(-int(patches) // window))
        return [(torch.cat(p), torch.cat(where), n) for p, where, n in zip(pieces, latents, counts, strict=True)]

    def forward(
        self,
        pixel_values: Tensor,
        patch_mask: Tensor,
        text_ids: Tensor,
        places: Sequence[Tensor],
        segments: list[list[Tensor | int]],
        targets: list[Tensor],
        windows: Sequence[Window] = (),
        spelt: Sequence[Window] | None = None,
        pointers: Sequence[Sequence[tuple[int, Tensor]]] = (),
        whole: bool = False,
        taught: bool = True,
        kept_words: Sequence[Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Loss of the targets, and the share of their tokens that come first in the distribution.

        A generator with a ``CopyAttention`` also learns to point at the tokens or latents that show what it writes.

        Args:
            pixel_values: float ``[p, c, size, size]``.
            patch_mask: bool ``[p, s]``.
            text_ids: Text of each page, int64 ``[p]``.
            places: Of each text, the position of each latent, int64 ``[n]`` (``VisualMemory.places``).
            segments: Each prompt as token ids and, for a memory, the number of its text.
            targets: Token ids to be written, a row each.
            windows: Of each text.
            spelt: What an ideal memory of each text says; None: memory is what the compressor makes.
            pointers: Of each prompt, the parts that show the target, and which of their tokens it is.
            whole: Whether targets are the texts themselves: each counts the same, however long it is.
            taught: Whether there is a teacher, where one is wanted: it needs all texts within the context.
            kept_words: Of each text, the words that are not masked, bool; None without ``pve``.
        """
        latents: list[Tensor] = []
        if spelt is None:
            latents = self._latents(pixel_values, patch_mask, text_ids, len(places))
            memories = [
                self.fusion.looked_at(self._generator[0], one, at) for one, at in zip(latents, places, strict=True)
            ]
        else:
            memories = [self._ideal_memory(window, at) for window, at in zip(spelt, places, strict=True)]
        beside: dict[str, Any] = {}
        sizes = [len(seen) for seen, _ in memories]
        if isinstance(self.fusion, CrossAttentionFusion):
            held = [[memories[part] for part in row if isinstance(part, int)] for row in segments]
            beside = self.fusion.memory_arguments(held)
            # Such memory takes no position, and shows nothing there that could be pointed at.
            empty = self.fusion.boundaries, torch.full((0, 1), -1, device=self.fusion.boundaries.device)
            memories = [empty] * len(memories)
        device = self.fusion.boundaries.device
        segments = [[part if isinstance(part, int) else part.to(device) for part in row] for row in segments]
        targets = [target.to(device) for target in targets]
        # One look-up for all: the gradient of each would be as large as the whole table.
        texts = [part for row in segments for part in row if not isinstance(part, int)]
        looked_up = self.lm.get_input_embeddings()(torch.cat((*texts, *targets)))
        pieces = iter(looked_up.split([len(part) for part in (*texts, *targets)]))
        prompts = [
            [memories[part][0].to(looked_up.dtype) if isinstance(part, int) else next(pieces) for part in row]
            for row in segments
        ]
        rows = [torch.cat((*prompt, next(pieces))) for prompt in prompts]
        embeds = pad_sequence(rows, batch_first=True, padding_side="left")
        lengths = torch.tensor([len(row) for row in rows], device=device)
        extra = self._frame(lengths, targets)
        shown = [
            side_by_side([memories[part][1] if isinstance(part, int) else part[:, None] for part in row])
            for row in segments
        ]
        if isinstance(self.lm, PrefixBertForCausalLM):
            extra["shown"] = self._all_shown(shown, targets)
        labels = pad_sequence(targets, batch_first=True, padding_side="left", padding_value=-100)
        # Rows end together, so the targets are the last columns: no logits are computed for the prompt.
        last = labels.shape[1] + 1
        taught = taught and (self.distil > 0 or self.states > 0) and bool(memories)
        output = self.lm(
            inputs_embeds=embeds,
            use_cache=False,
            logits_to_keep=last,
            output_hidden_states=taught and self.states > 0,
            **extra,
            **beside,
        )
        logits = output.logits[:, :-1]
        told = labels != -100
        loss = (reconstruction_loss if whole else next_token_loss)(logits, labels)
        figures = {"token_accuracy": (logits[told].argmax(-1) == labels[told]).float().mean().detach()}
        if isinstance(self.lm, PrefixBertForCausalLM):
            shows = extra["shown"]
            if "memory_shown" in beside:
                shows = shown_behind(beside["memory_shown"], shows)
            elif not self.fusion.in_context:  # only what was read as text can be pointed at
                pointers = [
                    [(part, tokens) for part, tokens in found if not isinstance(row[part], int)]
                    for row, found in zip(segments, pointers, strict=True)
                ]
            gold = self._gold(prompts, segments, targets, pointers, windows, places, shows, sizes)
            pointed = (output.attentions[0][:, :-1] * gold).sum(-1)[gold.any(-1)]
            if len(pointed):
                loss = loss - pointed.clamp(min=1e-6).log().mean()
                figures["pointed"] = pointed.mean().detach()
        if taught:
            states, believed = self._taught(prompts, segments, targets, windows, places, last, len(embeds[0]))
            apart = distillation_loss(logits, believed, told)
            figures["believed"] = apart.detach()
            loss = loss + self.distil * apart
            if self.states:
                apart = states_loss(output.hidden_states[1:], states)
                figures["apart"] = apart.detach()
                loss = loss + self.states * apart
        if self.pve and kept_words and len(latents) > 1:
            embeddings = cast(Tensor, self.lm.get_input_embeddings().weight).detach()
            words = [
                pooled_words(embeddings, window[0].to(device), kept.to(device))
                for window, kept in zip(windows, kept_words, strict=True)
            ]
            drawn = self.pve.loss([self.fusion.meaning(one) for one in latents], words)
            figures["pve"] = drawn.detach()
            loss = loss + drawn
        return {"loss": loss, **figures}

    def _frame(self, lengths: Tensor, targets: Sequence[Tensor]) -> dict[str, Tensor]:
        """Masks of left-padded rows that end with their targets."""
        places = torch.arange(int(lengths.max()), device=lengths.device)
        begins = len(places) - lengths[:, None]
        ends = torch.tensor([len(places) - len(target) for target in targets], device=lengths.device)[:, None]
        frame = {"attention_mask": (places >= begins).long()}
        if isinstance(self.lm, PrefixBertForCausalLM):
            frame["prefix_mask"] = (places >= begins) & (places < ends)
        elif "position_ids" in self._takes:
            frame["position_ids"] = (frame["attention_mask"].cumsum(1) - 1).clamp(min=0)  # left padding shifts nothing
        return frame

    @staticmethod
    def _all_shown(shown: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
        """Tokens that each position of the batch shows, int64 ``[b, t, s]``: targets show nothing."""
        rows = [F.pad(row, (0, 0, 0, len(target)), value=-1) for row, target in zip(shown, targets, strict=True)]
        return side_by_side(rows, batch=True)

    @torch.no_grad()
    def _taught(
        self,
        prompts: Sequence[Sequence[Tensor]],
        segments: Sequence[Sequence[Tensor | int]],
        targets: Sequence[Tensor],
        windows: Sequence[Window],
        places: Sequence[Tensor],
        last: int,
        length: int,
    ) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """What the teacher makes of the same prompts with raw text in the place of memory.

        Returns:
            Of each layer, the state that each position should have, float ``[b, length, d]``, and which have one; a
            position of memory should have the mean of its pieces' states. Then the logits of the targets.
        """
        device = targets[0].device
        rows, goes_to = [], []
        for i, (prompt, row, target) in enumerate(zip(prompts, segments, targets, strict=True)):
            begin = i * length + length - len(target) - sum(map(len, prompt))
            ids: list[Tensor] = []
            going: list[Tensor] = []
            for embedded, part in zip(prompt, row, strict=True):
                if isinstance(part, int):
                    pieces, latents, _ = windows[part]
                    ids.append(pieces.to(device))
                    going.append(begin + 1 + places[part][latents].to(device))
                else:
                    ids.append(part)
                    going.append(begin + torch.arange(len(part), device=device))
                begin += len(embedded)
            rows.append(torch.cat((*ids, target)))
            goes_to.append(torch.cat((*going, begin + torch.arange(len(target), device=device))))
        lengths = torch.tensor([len(row) for row in rows], device=device)
        frame = self._frame(lengths, targets)
        if isinstance(self.lm, PrefixBertForCausalLM):
            shown = [row[: len(row) - len(target), None] for row, target in zip(rows, targets, strict=True)]
            frame["shown"] = self._all_shown(shown, targets)
        teacher = cast(Any, self._teacher[0].to(device))
        learning = teacher.training
        teacher.eval()  # what is taught is not to depend on dropout
        with without_adapter(teacher):
            output = teacher(
                inputs_embeds=teacher.get_input_embeddings()(pad_sequence(rows, batch_first=True, padding_side="left")),
                use_cache=False,
                logits_to_keep=last,
                output_hidden_states=self.states > 0,
                **frame,
            )
        teacher.train(learning)
        if not self.states:
            return [], output.logits[:, :-1]
        goals = torch.cat(goes_to)
        counts = torch.bincount(goals, minlength=len(prompts) * length)
        states = []
        for layer in output.hidden_states[1:]:
            found = layer[frame["attention_mask"].bool()]
            sums = layer.new_zeros(len(counts), layer.shape[-1]).index_add(0, goals, found)
            goal = (sums / counts.clamp(min=1)[:, None]).view(len(prompts), length, -1)
            states.append((goal, (counts > 0).view(len(prompts), length)))
        return states, output.logits[:, :-1]

    @staticmethod
    def _gold(
        prompts: Sequence[Sequence[Tensor]],
        segments: Sequence[Sequence[Tensor | int]],
        targets: Sequence[Tensor],
        pointers: Sequence[Sequence[tuple[int, Tensor]]],
        windows: Sequence[Window],
        places: Sequence[Tensor],
        shown: Tensor,
        sizes: Sequence[int] = (),
    ) -> Tensor:
        """Places that show each token to be written, and its end, as ``CopyAttention`` counts them.

        A position shows a token where it spells it; what is spelt wrong cannot be copied. ``shown`` is int64
        ``[b, length, s]``: memory that is looked up, of so many positions each (``sizes``), and then the prompt.
        Returns bool ``[b, longest target, length * s + 1]``.
        """
        longest_target, (_, length, slots) = max(map(len, targets)), shown.shape
        gold = torch.zeros(len(prompts), longest_target, length * slots + 1, dtype=torch.bool, device=shown.device)
        for i, (prompt, target) in enumerate(zip(prompts, targets, strict=True)):
            begin = length - len(target) - sum(map(len, prompt))  # left padding
            column = longest_target - len(target)
            gold[i, -1, -1] = bool(pointers[i])
            for part, tokens in pointers[i]:
                first, text = begin + sum(map(len, prompt[:part])), segments[i][part]
                if not isinstance(text, int):
                    at = tokens
                else:
                    at = places[text][windows[text][1][tokens]]
                    first += 1  # the boundary comes first
                    if not len(prompt[part]):  # it takes no position: it is looked up
                        first = sum(sizes[other] for other in segments[i][:part] if isinstance(other, int))
                for occurrence in at.tolist():
                    for order, place in enumerate(occurrence):
                        there = slice((first + place) * slots, (first + place + 1) * slots)
                        gold[i, column + order, there] |= shown[i, first + place] == target[order]
        return gold

    def _ideal_memory(self, window: Window, places: Tensor) -> tuple[Tensor, Tensor]:
        """What ``SoftPromptFusion.read`` would give of a memory that means and spells these pieces."""
        device = self.fusion.boundaries.device
        pieces, latents, n = window
        shown = show(pieces, places[latents], int(places[-1]) + 1).to(device)
        words, scale = cast(Tensor, self.lm.get_input_embeddings().weight).detach(), embedding_scale(self.lm)
        meaning = pack(words[pieces.to(device)], latents.to(device), n, words.mean(0)) * scale
        return self.fusion.join(merged(meaning, places.to(device)), shown, words, scale), self.fusion.between(shown)

    def _latents(self, pixel_values: Tensor, patch_mask: Tensor, text_ids: Tensor, texts: int) -> list[Tensor]:
        """The latents of each text, float ``[n, d]``."""
        if not texts:
            return []
        latents, standing = self.compressor(pixel_values, patch_mask)
        pages = [(text_ids == text).nonzero().flatten().tolist() for text in range(texts)]
        return [torch.cat([latents[p][standing[p]] for p in some]) for some in pages]


@contextmanager
def without_adapter(model: nn.Module) -> Iterator[None]:
    """The model as it was before its adapters; one that has none stays as it is."""
    if not hasattr(model, "disable_adapter"):
        yield
        return
    adapters = [(weight, weight.requires_grad) for name, weight in model.named_parameters() if "lora_" in name]
    with cast(Any, model).disable_adapter():
        yield
    for weight, learns in adapters:  # peft leaves all of them to be trained
        weight.requires_grad_(learns)
