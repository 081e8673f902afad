"""How much of a text a compressor keeps: a small reader learns to write the characters of each window from its latent.

No generator is needed, so compressors of any kind are measured alike. The reader is trained on plain text, as a fusion
would be; then words are counted that do not come back letter by letter, by class (``vist_rag.fidelity.word_class``), in
plain texts that it has not seen and in made-up ones that are hard (``hard_text``). Where the checkpoint's own fusion
spells, what that reads is counted beside: it is what the generator is given.
"""

from __future__ import annotations

import random
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import AutoTokenizer

from vist_rag.checkpoint import find_checkpoint, load_compressor
from vist_rag.compression import PassageCompressor, VistCompressor
from vist_rag.errors import InputError
from vist_rag.fidelity import Fidelity, Rate, glyph_ranges, word_class, words
from vist_rag.generation import SoftPromptFusion
from vist_rag.generation.fusion.soft_prompt import CHARACTERS
from vist_rag.training.hard_text import SORTS, hard_texts

TEXTS, STEPS = 2000, 1200
"""What takes a few minutes on two cores."""

_HELD_OUT, _HARD = 0.2, 1.0  # of the texts: for measuring, and made up beside
_SELDOM = 10  # a character that is seen less often is "another"
_MOST_SLOTS = 12  # characters of a patch, at most
_HIDDEN, _BATCH, _RATE = 512, 256, 3e-3
_BLANK_WEIGHT = 0.3  # slots without a character are most and easy
_LONGEST = 700  # characters of a text; longer ones are cut


def probe_checkpoint(
    checkpoint: str | Path | None,
    texts: Sequence[str],
    *,
    count: int = TEXTS,
    steps: int = STEPS,
    seed: int = 0,
    tell: Callable[[str], None] = lambda _: None,
) -> Fidelity:
    """Measure the compressor of a checkpoint, and its fusion where that spells; errors as :func:`measure`.

    Raises:
        CheckpointError: If either cannot be loaded.
    """
    directory = find_checkpoint(checkpoint)
    compressor = load_compressor(directory)
    fusion = SoftPromptFusion.from_pretrained(directory / "fusion").float().eval()
    tokenizer = AutoTokenizer.from_pretrained(directory / "generator")
    cased = tokenizer.tokenize("Word") != tokenizer.tokenize("wORD")
    return measure(compressor, texts, fusion=fusion, cased=cased, count=count, steps=steps, seed=seed, tell=tell)


def measure(
    compressor: PassageCompressor,
    texts: Sequence[str],
    *,
    fusion: SoftPromptFusion | None = None,
    cased: bool = True,
    count: int = TEXTS,
    steps: int = STEPS,
    seed: int = 0,
    tell: Callable[[str], None] = lambda _: None,
) -> Fidelity:
    """Measure what a compressor misreads.

    Args:
        compressor: Any.
        texts: Plain texts, at least two.
        fusion: What the checkpoint reads its memories with.
        cased: Whether its generator tells capitals from small letters; else the fusion need not.
        count: Texts that are drawn of these; a fifth are for measuring, and as many hard
            ones are made up.
        steps: Of training the reader.
        seed: Of what is drawn, made up and trained.
        tell: Called with what is being done.
    Raises:
        InputError: If there are fewer than two texts.
    """
    rng = random.Random(f"probe-{seed}")
    drawn = [shown(texts[i])[:_LONGEST] for i in rng.sample(range(len(texts)), min(count, len(texts)))]
    drawn = [text for text in drawn if text]
    if len(drawn) < 2:
        raise InputError(f"texts must be 2 or more, to train a reader and to test it, got {len(drawn)}; give more.")
    held_out = drawn[: max(1, round(_HELD_OUT * len(drawn)))]
    tell(f"encoding {len(drawn):,} texts")
    practised = Encoded.of(compressor, drawn[len(held_out) :])
    tell(f"training the reader for {steps:,} steps")
    reader = Reader.trained(practised, steps, seed)
    tested = Encoded.of(compressor, held_out + hard_texts(max(len(SORTS), round(_HARD * count)), seed))
    speller = None
    if fusion is not None and fusion.speller is not None:
        speller = count_words(tested, Reader.of_fusion(fusion, compressor.window, cased=cased))
    return Fidelity(
        fingerprint=compressor.fingerprint,
        recipe={"seed": seed, "texts": len(drawn), "steps": steps},
        glyphs=glyph_ranges(compressor.renderer.atlas.codepoints.tolist())  # type: ignore[attr-defined]
        if isinstance(compressor, VistCompressor)
        else None,
        probe=count_words(tested, reader),
        speller=speller,
    )


def shown(text: str) -> str:
    """A text as pages show it: composed, one space for any white space, nothing that shows nothing."""
    composed = unicodedata.normalize("NFC", text)
    return " ".join("".join(c for c in composed if unicodedata.category(c) != "Cf").split())


@dataclass(frozen=True)
class Encoded:
    """Texts, their latents, and where each character stands.

    Attributes:
        texts: As they are shown.
        latents: Of all texts, float ``[n, d]``.
        patches: For each text, the patch that shows each of its characters, int64 ``[c]``, counted over all texts, so
            that patch ``p`` is of latent ``p // window``.
        window: Patches of a latent.
    """

    texts: list[str]
    latents: Tensor
    patches: list[np.ndarray]
    window: int

    @classmethod
    def of(cls, compressor: PassageCompressor, texts: list[str]) -> Encoded:
        """Encode texts, and find where each character went."""
        memories = compressor.encode(texts)
        window, patches, begin = compressor.window, [], 0
        for text, memory in zip(texts, memories, strict=True):
            pages = compressor.renderer.render([text])
            owners = np.full(len(text), -1, np.int64)
            latent = begin
            for spans, mask in zip(pages.char_spans.numpy(), pages.patch_mask.cpu().numpy(), strict=True):
                sizes = spans[:, 1] - spans[:, 0]
                characters = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes - spans[:, 0], sizes)
                # A glyph between two patches is the second one's, as where a speller is trained.
                np.maximum.at(owners, characters, np.repeat(np.arange(len(spans)), sizes) + latent * window)
                latent += max(1, -(-int(mask.sum()) // window))
            patches.append(owners)
            begin += len(memory)
        return cls(texts, torch.cat([memory.latents for memory in memories]), patches, window)


@dataclass(frozen=True)
class Reader:
    """Reads characters from latents.

    Attributes:
        characters: What it can tell; ``len(characters)`` is no character, the class behind that is another one.
        places: Slots of a patch.
        score: Latents ``[n, d]`` -> scores ``[n, window * places, classes]``.
        alike: What counts as the same as each class, int64 ``[classes]``; None: itself alone.
    """

    characters: str
    places: int
    score: Callable[[Tensor], Tensor]
    alike: np.ndarray | None = None

    @classmethod
    def of_fusion(cls, fusion: SoftPromptFusion, window: int, *, cased: bool = True) -> Reader:
        """What a fusion spells."""
        alike = [CHARACTERS.index(c.lower()) for c in CHARACTERS] + [len(CHARACTERS), len(CHARACTERS) + 1]
        places = fusion.config.spelling // window
        return cls(CHARACTERS, places, fusion.spelt, None if cased else np.array(alike))

    @classmethod
    def trained(cls, encoded: Encoded, steps: int, seed: int) -> Reader:
        """A layer of hidden units, trained on encoded texts."""
        counts = Counter(c for text in encoded.texts for c in text)
        characters = "".join(sorted(c for c, n in counts.items() if n >= _SELDOM))
        fullest = max((int(_orders(patches).max(initial=0)) for patches in encoded.patches), default=0)
        places = min(fullest + 1, _MOST_SLOTS)
        classes = len(characters) + 2
        latents = encoded.latents
        targets = torch.from_numpy(_grid(encoded, characters, places)).flatten(1)  # [n, window * places]
        centre, spread = latents.mean(0), latents.std(0) + 1e-6
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = nn.Sequential(
                nn.Linear(latents.shape[1], _HIDDEN), nn.GELU(), nn.Linear(_HIDDEN, targets.shape[1] * classes)
            )
        weights = torch.ones(classes)
        weights[len(characters)] = _BLANK_WEIGHT
        optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=_RATE, total_steps=max(2, steps))
        chance, chances = np.random.RandomState(seed), _chances(targets, classes)
        for _ in range(steps):
            some = torch.from_numpy(np.searchsorted(chances, chance.random_sample(_BATCH)).clip(max=len(targets) - 1))
            scores = model((latents[some] - centre) / spread).unflatten(-1, (-1, classes))
            loss = F.cross_entropy(scores.flatten(0, 1), targets[some].flatten(), weight=weights)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        return cls(characters, places, lambda some: model((some - centre) / spread).unflatten(-1, (-1, classes)))

    @torch.no_grad()
    def read(self, latents: Tensor, window: int) -> np.ndarray:
        """Classes of the slots of each patch, int64 ``[patches, places]``."""
        parts = [self.score(part).argmax(-1) for part in latents.split(1024)]
        slots = torch.cat(parts)[:, : window * self.places]  # what does not divide by the window spells nothing
        return slots.reshape(len(latents) * window, self.places).numpy()


def _chances(targets: Tensor, classes: int) -> np.ndarray:
    """How likely each window is to be drawn, summed up, float64 ``[n]``: those with rare characters more often."""
    counts = torch.bincount(targets.flatten(), minlength=classes).double().clamp(min=_SELDOM)
    rarity = counts.rsqrt()
    rarity[classes - 2] = 0  # no character
    summed = (rarity[targets].sum(1) + 1e-9).cumsum(0)
    chances: np.ndarray = (summed / summed[-1]).numpy()
    return chances


def _orders(patches: np.ndarray) -> np.ndarray:
    """Place of each character among those of its patch, int64 ``[c]``."""
    order = np.argsort(patches, kind="stable")
    first = np.searchsorted(patches[order], patches)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    places: np.ndarray = rank - first
    return places


def _grid(encoded: Encoded, characters: str, places: int) -> np.ndarray:
    """Class of every slot, int64 ``[n, window, places]``."""
    known = {character: i for i, character in enumerate(characters)}
    none, other = len(characters), len(characters) + 1
    grid = np.full((len(encoded.latents) * encoded.window, places), none, np.int64)
    for text, patches in zip(encoded.texts, encoded.patches, strict=True):
        orders = _orders(patches)
        there = (patches >= 0) & (orders < places)
        grid[patches[there], orders[there]] = np.array([known.get(c, other) for c in text], np.int64)[there]
    return grid.reshape(len(encoded.latents), encoded.window, places)


def count_words(encoded: Encoded, reader: Reader, *, kind: Callable[[str], str] = word_class) -> dict[str, Rate]:
    """Words that were read, and that did not come back letter by letter, by class.

    A word is wrong where one of its characters is another, is missing or has no slot, or where one is read that is not
    there, after one of its own or after the space before it.

    Args:
        encoded: What is read.
        reader: Who reads.
        kind: The class of a word.
    """
    places, none = reader.places, len(reader.characters)
    truth = _grid(encoded, reader.characters, places).reshape(-1, places)
    read = reader.read(encoded.latents, encoded.window)
    if reader.alike is not None:
        truth, read = reader.alike[truth], reader.alike[read]
    right = (read == truth) & (truth <= none)
    added = ((read != none) & (truth == none)).any(1)  # [patches]
    counts: dict[str, Rate] = {}
    for text, patches in zip(encoded.texts, encoded.patches, strict=True):
        orders = _orders(patches)
        fine = (patches >= 0) & (orders < places)
        fine[fine] = right[patches[fine], orders[fine]]
        fine &= ~_followed(patches, added)
        for start, end in words(text):
            ok = bool(fine[start:end].all()) and (start == 0 or not text[start - 1].isspace() or bool(fine[start - 1]))
            name = kind(text[start:end])
            before = counts.get(name, Rate(0, 0))
            counts[name] = Rate(before.n + 1, before.wrong + (not ok))
    return dict(sorted(counts.items()))


def _followed(patches: np.ndarray, added: np.ndarray) -> np.ndarray:
    """After which characters something is read that is not there, bool ``[c]``: in its patch or in bare ones."""
    some = np.flatnonzero(patches >= 0)
    result = np.zeros(len(patches), bool)
    if not len(some):
        return result
    order = some[np.argsort(patches[some], kind="stable")]
    last = np.append(patches[order][1:] != patches[order][:-1], True)  # of its patch
    ends = np.append(patches[order][1:], patches[order][-1] + 1)
    sums = np.concatenate(([0], np.cumsum(added)))
    result[order] = last & (sums[ends] > sums[patches[order]])
    return result
