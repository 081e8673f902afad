"""Teach a resampler, a projector and a generator to read memory: write the text back, look something up, answer."""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils.rnn import pad_sequence

from vist_rag.compression import PassageCompressor
from vist_rag.compression.memory import keep
from vist_rag.generation import PromptTemplate, VistGenerator
from vist_rag.generation.fusion.soft_prompt import itself, show
from vist_rag.generation.prefix_bert import SLOTS, PrefixBertForCausalLM
from vist_rag.rendering import Pages
from vist_rag.training.examples import Example, misspell
from vist_rag.training.lexical import pack, pieces_of_pages, window_salience

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
        distil: Weight of a second loss: at every layer, the generator that reads memory must be in the state that it
            was in when training began, reading the same text raw. It tells far more about reading than answers do.
        salience: How much each word piece matters, for a compressor that tells it: so smaller memories are chosen.
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
        salience: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.ideal, self.slips, self.distil = ideal, slips, distil
        self.compressor = compressor
        self.fusion = generator.fusion
        self.lm = generator.model
        self._generator = [generator]  # in a list: not a module, so not saved twice
        self._teacher: list[nn.Module] = []
        self.rates = rates or {1.0: 1.0}
        self.salience = salience
        self.template = PromptTemplate()

    def teach_itself(self) -> None:
        """Take the generator as it is now as the teacher; needed once where ``distil`` is above 0."""
        self._teacher = [copy.deepcopy(self.lm).requires_grad_(False).eval()]

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
        windows = self._windows(contents, pages)
        rates = rng.choices(list(self.rates), list(self.rates.values()), k=len(contents))
        ideal = rng.random() < self.ideal
        return {
            "pixel_values": pages.pixel_values,
            "patch_mask": pages.patch_mask,
            "text_ids": pages.text_ids,
            "kept": [self._kept(window, rate) for window, rate in zip(windows, rates, strict=True)],
            "segments": segments,
            "targets": targets,
            "windows": windows,
            "spelt": self._windows([misspell(text, self.slips, rng) for text in contents], pages) if ideal else None,
            "pointers": pointers,
        }

    def _kept(self, window: Window, rate: float) -> Tensor:
        """The latents of a smaller memory, int64, ascending."""
        pieces, latents, n = window
        salience = None if self.salience is None else window_salience(pieces, latents, n, self.salience)
        return keep(n, max(1, round(rate * n)), salience)

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
        kept: Sequence[Tensor],
        segments: list[list[Tensor | int]],
        targets: list[Tensor],
        windows: Sequence[Window] = (),
        spelt: Sequence[Window] | None = None,
        pointers: Sequence[Sequence[tuple[int, Tensor]]] = (),
    ) -> dict[str, Tensor]:
        """Loss of the targets, and the share of their tokens that come first in the distribution.

        A generator with a ``CopyAttention`` also learns to point at the tokens or latents that show what it writes.

        Args:
            pixel_values: float ``[p, c, size, size]``.
            patch_mask: bool ``[p, s]``.
            text_ids: Text of each page, int64 ``[p]``.
            kept: Of each text, the latents that are kept, int64.
            segments: Each prompt as token ids and, for a memory, the number of its text.
            targets: Token ids to be written, a row each.
            windows: Of each text.
            spelt: What an ideal memory of each text says; None: memory is what the compressor makes.
            pointers: Of each prompt, the parts that show the target, and which of their tokens it is.
        """
        if spelt is None:
            memories = self._memories(pixel_values, patch_mask, text_ids, kept)
        else:
            memories = [self._ideal_memory(window, some) for window, some in zip(spelt, kept, strict=True)]
        device = self.fusion.boundaries.device
        segments = [[part if isinstance(part, int) else part.to(device) for part in row] for row in segments]
        targets = [target.to(device) for target in targets]
        # One look-up for all: the gradient of each would be as large as the whole table.
        texts = [part for row in segments for part in row if not isinstance(part, int)]
        looked_up = self.lm.get_input_embeddings()(torch.cat((*texts, *targets)))
        pieces = iter(looked_up.split([len(part) for part in (*texts, *targets)]))
        prompts = [[memories[part][0] if isinstance(part, int) else next(pieces) for part in row] for row in segments]
        rows = [torch.cat((*prompt, next(pieces))) for prompt in prompts]
        embeds = pad_sequence(rows, batch_first=True, padding_side="left")
        lengths = torch.tensor([len(row) for row in rows], device=device)
        extra = self._frame(lengths, targets)
        shown = [
            torch.cat([memories[part][1] if isinstance(part, int) else itself(part) for part in row])
            for row in segments
        ]
        if isinstance(self.lm, PrefixBertForCausalLM):
            extra["shown"] = self._all_shown(shown, targets)
        labels = pad_sequence(targets, batch_first=True, padding_side="left", padding_value=-100)
        # Rows end together, so the targets are the last columns: no logits are computed for the prompt.
        last = labels.shape[1] + 1
        distil = self.distil > 0 and bool(memories)
        output = self.lm(
            inputs_embeds=embeds, use_cache=False, logits_to_keep=last, output_hidden_states=distil, **extra
        )
        logits = output.logits[:, :-1]
        told = labels != -100
        loss = F.cross_entropy(logits[told].float(), labels[told])
        figures = {"token_accuracy": (logits[told].argmax(-1) == labels[told]).float().mean().detach()}
        if isinstance(self.lm, PrefixBertForCausalLM):
            gold = self._gold(prompts, segments, targets, pointers, windows, kept, extra["shown"])
            pointed = (output.attentions[0][:, :-1] * gold).sum(-1)[gold.any(-1)]
            if len(pointed):
                loss = loss - pointed.clamp(min=1e-6).log().mean()
                figures["pointed"] = pointed.mean().detach()
        if distil:
            states, taught = self._taught(prompts, segments, targets, windows, kept, last, len(embeds[0]))
            believed = F.kl_div(
                logits[told].log_softmax(-1), taught[told].log_softmax(-1), reduction="batchmean", log_target=True
            )
            apart = torch.stack(
                [
                    ((own - goal)[there]).square().mean() / goal[there].var()
                    for own, (goal, there) in zip(output.hidden_states[1:], states, strict=True)
                ]
            ).mean()
            figures |= {"believed": believed.detach(), "apart": apart.detach()}
            loss = loss + self.distil * (believed + apart)
        return {"loss": loss, **figures}

    def _frame(self, lengths: Tensor, targets: Sequence[Tensor]) -> dict[str, Tensor]:
        """Masks of left-padded rows that end with their targets."""
        places = torch.arange(int(lengths.max()), device=lengths.device)
        begins = len(places) - lengths[:, None]
        ends = torch.tensor([len(places) - len(target) for target in targets], device=lengths.device)[:, None]
        frame = {"attention_mask": (places >= begins).long()}
        if isinstance(self.lm, PrefixBertForCausalLM):
            frame["prefix_mask"] = (places >= begins) & (places < ends)
        return frame

    @staticmethod
    def _all_shown(shown: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
        """Tokens that each position of the batch shows, int64 ``[b, t, SLOTS]``: targets show nothing."""
        rows = [F.pad(row, (0, 0, 0, len(target)), value=-1) for row, target in zip(shown, targets, strict=True)]
        return pad_sequence(rows, batch_first=True, padding_value=-1, padding_side="left")

    @torch.no_grad()
    def _taught(
        self,
        prompts: Sequence[Sequence[Tensor]],
        segments: Sequence[Sequence[Tensor | int]],
        targets: Sequence[Tensor],
        windows: Sequence[Window],
        kept: Sequence[Tensor],
        last: int,
        length: int,
    ) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """What the generator of the beginning makes of the same prompts with raw text in the place of memory.

        Returns:
            Of each layer, the state that each position should have, float ``[b, length, d]``, and which have one; a
            latent should have the mean of its pieces' states. Then the logits of the targets.
        """
        device = targets[0].device
        rows, goes_to = [], []
        for i, (prompt, row, target) in enumerate(zip(prompts, segments, targets, strict=True)):
            begin = i * length + length - len(target) - sum(map(len, prompt))
            ids: list[Tensor] = []
            places: list[Tensor] = []
            for embedded, part in zip(prompt, row, strict=True):
                if isinstance(part, int):
                    pieces, latents, n = windows[part]
                    order = order_among(kept[part], n)[latents].to(device)
                    ids.append(pieces.to(device))
                    places.append(torch.where(order >= 0, begin + 1 + order, -1))
                else:
                    ids.append(part)
                    places.append(begin + torch.arange(len(part), device=device))
                begin += len(embedded)
            rows.append(torch.cat((*ids, target)))
            goes_to.append(torch.cat((*places, begin + torch.arange(len(target), device=device))))
        lengths = torch.tensor([len(row) for row in rows], device=device)
        frame = self._frame(lengths, targets)
        if isinstance(self.lm, PrefixBertForCausalLM):
            shown = [itself(row[: len(row) - len(target)]) for row, target in zip(rows, targets, strict=True)]
            frame["shown"] = self._all_shown(shown, targets)
        output = self._teacher[0].to(device)(
            inputs_embeds=self.lm.get_input_embeddings()(pad_sequence(rows, batch_first=True, padding_side="left")),
            use_cache=False,
            logits_to_keep=last,
            output_hidden_states=True,
            **frame,
        )
        goals = torch.cat(goes_to)
        there = goals >= 0
        goals = goals[there]
        counts = torch.bincount(goals, minlength=len(prompts) * length)
        states = []
        for layer in output.hidden_states[1:]:
            found = layer[frame["attention_mask"].bool()][there]
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
        kept: Sequence[Tensor],
        shown: Tensor,
    ) -> Tensor:
        """Places that show each token to be written, and its end, as ``CopyAttention`` counts them.

        A latent shows a token where it spells it; what is spelt wrong cannot be copied. ``shown`` is int64
        ``[b, length, SLOTS]``. Returns bool ``[b, longest target, length * SLOTS + 1]``.
        """
        longest_target, length = max(map(len, targets)), shown.shape[1]
        gold = torch.zeros(len(prompts), longest_target, length * SLOTS + 1, dtype=torch.bool, device=shown.device)
        for i, (prompt, target) in enumerate(zip(prompts, targets, strict=True)):
            begin = length - len(target) - sum(map(len, prompt))  # left padding
            column = longest_target - len(target)
            gold[i, -1, -1] = bool(pointers[i])
            for part, tokens in pointers[i]:
                first, text = begin + sum(map(len, prompt[:part])), segments[i][part]
                if isinstance(text, int):
                    _, latents, n = windows[text]
                    at, first = order_among(kept[text], n)[latents[tokens]], first + 1  # the boundary comes first
                else:
                    at = tokens
                for occurrence in at.tolist():
                    for order, place in enumerate(occurrence):
                        if place >= 0:
                            slots = slice((first + place) * SLOTS, (first + place + 1) * SLOTS)
                            gold[i, column + order, slots] |= shown[i, first + place] == target[order]
        return gold

    def _ideal_memory(self, window: Window, kept: Tensor) -> tuple[Tensor, Tensor]:
        """What ``SoftPromptFusion.read`` would give of a memory that means and spells these pieces."""
        device = self.fusion.boundaries.device
        pieces, latents, n = window
        shown = show(pieces, latents, n)[kept].to(device)
        words = cast(Tensor, self.lm.get_input_embeddings().weight).detach()
        meaning = pack(words[pieces.to(device)], latents.to(device), n, words.mean(0))[kept.to(device)]
        return self.fusion.join(meaning, shown, words), self.fusion.between(shown)

    def _memories(
        self, pixel_values: Tensor, patch_mask: Tensor, text_ids: Tensor, kept: Sequence[Tensor]
    ) -> list[tuple[Tensor, Tensor]]:
        """What the fusion reads of each text's memory."""
        if not len(pixel_values):
            return []
        latents, standing = self.compressor(pixel_values, patch_mask)
        memories = []
        for text_id, some in enumerate(kept):
            pages = (text_ids == text_id).nonzero().flatten().tolist()
            memory = torch.cat([latents[p][standing[p]] for p in pages])
            memories.append(self.fusion.read(self._generator[0], memory[some.to(memory.device)]))
        return memories


def order_among(kept: Tensor, n: int) -> Tensor:
    """Which of the kept latents each of ``n`` is: int64 ``[n]``, -1 for those that are left out."""
    return torch.full((n,), -1).scatter(0, kept, torch.arange(len(kept)))
