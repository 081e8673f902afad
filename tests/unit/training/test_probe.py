"""The probe finds what a compressor loses, and nothing else."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.support.tiny import tiny_compressor, tiny_generator
from vist_rag.compression import PassageCompressor, VistCompressor, VisualMemory
from vist_rag.errors import InputError
from vist_rag.fidelity import Rate
from vist_rag.generation.fusion.soft_prompt import CHARACTERS
from vist_rag.training.hard_text import SORTS, hard_texts
from vist_rag.training.probe import Encoded, Reader, count_words, measure, shown

LETTERS, DIGITS = "abcdefgh", "0123"
ALPHABET, PLACES = f" {LETTERS}{DIGITS}", 6


class Copying:
    """A compressor whose latents say which character stands where in their window, but for what it is blind to."""

    window, fingerprint = 4, "copying"

    def __init__(self, blind: str = "", noise: float = 0.0) -> None:
        self.blind, self.noise = blind, noise
        self.renderer = tiny_compressor().renderer

    def encode(self, texts: Sequence[str]) -> list[VisualMemory]:
        return [VisualMemory(self._latents(text), self.fingerprint) for text in texts]

    def _latents(self, text: str) -> torch.Tensor:
        pages, rows = self.renderer.render([text]), []
        for spans, mask in zip(pages.char_spans.tolist(), pages.patch_mask.tolist(), strict=True):
            used = sum(mask)
            seen = torch.zeros(-(-used // self.window) * self.window, PLACES, len(ALPHABET) + 1)
            starts = [start for start, _ in spans[:used]] + [spans[used - 1][1]]
            for patch in range(used):
                for place, character in enumerate(text[starts[patch] : starts[patch + 1]]):
                    known = character in ALPHABET and character not in self.blind
                    seen[patch, place, ALPHABET.index(character) if known else -1] = 1
            rows.append(seen.reshape(-1, self.window * PLACES * (len(ALPHABET) + 1)))
        latents = torch.cat(rows)
        return latents + self.noise * torch.randn(latents.shape, generator=torch.Generator().manual_seed(len(text)))


def texts(count: int, letters: str = LETTERS) -> list[str]:
    """Words and numbers."""
    rng = random.Random(0)

    def word(alphabet: str) -> str:
        return "".join(rng.choices(alphabet, k=rng.randint(2, 8)))

    return [" ".join(word(DIGITS if i % 3 == 0 else letters) for i in range(24)) for _ in range(count)]


def rate(counts: Mapping[str, Rate], kind: str) -> float:
    """Of words of up to eight characters."""
    found = [counts[f"{kind} {length}"] for length in ("1-2", "3-4", "5-8")]
    assert sum(one.n for one in found) > 40
    return sum(one.wrong for one in found) / sum(one.n for one in found)


def probed(**compressor: Any) -> Mapping[str, Rate]:
    """What is misread of held-out texts."""
    some: Any = Copying(**compressor)
    made = texts(100)
    reader = Reader.trained(Encoded.of(some, made[20:]), 200, 0)
    return count_words(Encoded.of(some, made[:20]), reader)


@pytest.fixture(scope="module")
def whole() -> Mapping[str, Rate]:
    return probed()


def test_what_a_compressor_keeps_is_read(whole: Mapping[str, Rate]) -> None:
    assert rate(whole, "word") < 0.15
    assert rate(whole, "digits") < 0.15


def test_a_class_that_a_compressor_is_blind_to_is_found_and_no_other() -> None:
    blinded = probed(blind=DIGITS)
    assert rate(blinded, "digits") > 0.95
    assert rate(blinded, "word") < 0.15


def test_a_compressor_that_keeps_less_is_told_to_misread_more(whole: Mapping[str, Rate]) -> None:
    noisy = probed(noise=0.15)
    assert rate(whole, "word") + 0.1 < rate(noisy, "word")


def test_a_character_that_is_missing_added_or_another_makes_its_word_wrong() -> None:
    compressor: Any = Copying()
    encoded = Encoded.of(compressor, ["abc efg 12"])
    truth = compressor.encode(["abc efg 12"])[0].latents.reshape(-1, PLACES, len(ALPHABET) + 1)

    def wrong(change: Any) -> list[int]:
        scores = torch.cat((truth[..., :-1], torch.full((*truth.shape[:2], 1), 0.5), truth[..., -1:]), -1)
        change(scores)
        reader = Reader(ALPHABET, PLACES, lambda _: scores.reshape(len(encoded.latents), -1, scores.shape[-1]))
        counts = count_words(encoded, reader)
        return [counts["word 3-4"].wrong, counts["digits 1-2"].wrong]

    def patch_and_place(at: int) -> tuple[int, int]:
        patch = int(encoded.patches[0][at])
        return patch, int((encoded.patches[0][:at] == patch).sum())

    def set_to(at: int, character: str | None, *, behind: int = 0) -> Any:
        def change(scores: torch.Tensor) -> None:
            patch, place = patch_and_place(at)
            scores[patch, place + behind] = 0
            scores[patch, place + behind, len(ALPHABET) if character is None else ALPHABET.index(character)] = 1

        return change

    assert wrong(lambda scores: None) == [0, 0]
    assert wrong(set_to(1, "f")) == [1, 0]  # another
    assert wrong(set_to(1, None)) == [1, 0]  # missing
    assert wrong(set_to(9, "3")) == [0, 1]
    assert wrong(set_to(9, "3", behind=1)) == [0, 1]  # added
    assert wrong(set_to(7, "a")) == [0, 1]  # the space before it is gone


def test_words_are_counted_by_whatever_kind_is_asked_for() -> None:
    compressor: Any = Copying(blind="2")
    encoded = Encoded.of(compressor, ["abc efg 12"])
    truth = compressor.encode(["abc efg 12"])[0].latents.reshape(-1, PLACES, len(ALPHABET) + 1)
    scores = torch.cat((truth[..., :-1], torch.full((*truth.shape[:2], 1), 0.5), truth[..., -1:]), -1)
    reader = Reader(ALPHABET, PLACES, lambda _: scores.reshape(len(encoded.latents), -1, scores.shape[-1]))
    assert count_words(encoded, reader, kind=str.upper) == {"12": Rate(1, 1), "ABC": Rate(1, 0), "EFG": Rate(1, 0)}


def test_a_capital_is_a_small_letter_to_a_generator_without_capitals() -> None:
    fusion = tiny_generator().fusion.eval()
    reader = Reader.of_fusion(fusion, 4, cased=False)
    assert reader.alike is not None
    folded = "".join(CHARACTERS[i] for i in reader.alike[: len(CHARACTERS)])
    assert folded == CHARACTERS.lower()
    encoded = Encoded.of(Copying(), ["aB ab"])  # type: ignore[arg-type]

    def small(latents: torch.Tensor) -> torch.Tensor:
        """Reads every letter as a small one."""
        scores = torch.zeros(len(latents) * 4, reader.places, len(CHARACTERS) + 2)
        scores[..., len(CHARACTERS)] = 0.5
        for patches, text in zip(encoded.patches, encoded.texts, strict=True):
            for at, patch in enumerate(patches.tolist()):
                scores[patch, int((patches[:at] == patch).sum()), CHARACTERS.index(text[at].lower())] = 1
        return scores.reshape(len(latents), -1, scores.shape[-1])

    misread = [
        sum(one.wrong for one in count_words(encoded, replace(reader, score=small, alike=alike)).values())
        for alike in (None, reader.alike)
    ]
    assert misread == [1, 0]


def test_what_has_no_glyph_or_was_never_read_is_lost() -> None:
    compressor: Any = Copying()
    counts = measure(compressor, texts(40), count=60, steps=20).probe
    for kind in ("cjk", "arabic", "cyrillic"):
        found = [one for name, one in counts.items() if name.startswith(kind)]
        assert found
        assert all(one.wrong == one.n > 0 for one in found)


def test_the_same_seed_measures_the_same_and_leaves_the_callers_chance_alone() -> None:
    compressor: VistCompressor = tiny_compressor()
    state = torch.random.get_rng_state()
    first = measure(compressor, texts(20), count=20, steps=5, seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert measure(compressor, texts(20), count=20, steps=5, seed=3) == first
    assert measure(compressor, texts(20), count=20, steps=5, seed=4) != first
    assert first.fingerprint == compressor.fingerprint
    assert first.recipe == {"seed": 3, "texts": 20, "steps": 5}
    assert first.glyphs is not None
    assert first.glyphs[0] == (0x20, 0x7E)
    assert first.speller is None


def test_what_the_fusion_spells_is_counted_beside() -> None:
    compressor: PassageCompressor = tiny_compressor()
    fusion = tiny_generator().fusion.eval()
    measured = measure(compressor, texts(20), fusion=fusion, count=20, steps=5)
    assert measured.speller is not None
    assert {name: one.n for name, one in measured.speller.items()} == {n: one.n for n, one in measured.probe.items()}
    assert rate(measured.speller, "word") > 0.9  # it was never trained
    assert measured.rates is measured.speller


def test_the_speller_of_the_embedded_model_reads_prose_as_its_card_says() -> None:
    from vist_rag.checkpoint import embedded_checkpoint
    from vist_rag.training.probe import probe_checkpoint

    prose = ["The river runs from a lake to the sea, and the old bridge over it was built by the town."] * 10
    measured = probe_checkpoint(embedded_checkpoint(), prose, count=10, steps=2)
    assert measured.speller is not None
    words = [one for name, one in measured.speller.items() if name in ("word 3-4", "word 5-8")]
    numbers = [one for name, one in measured.speller.items() if name in ("digits 9-12", "digits 13-16", "amount 9-12")]
    assert sum(one.wrong for one in words) / sum(one.n for one in words) < 0.2
    assert sum(one.wrong for one in numbers) / sum(one.n for one in numbers) > 0.3


def test_too_few_texts_are_told() -> None:
    with pytest.raises(InputError, match=r"texts must be 2 or more, .* got 1; give more"):
        measure(tiny_compressor(), ["one", "\u200b"], count=5, steps=2)


def test_a_text_is_read_as_pages_show_it() -> None:
    assert shown(" cafe\u0301\n\tof\u200b  old ") == "café of old"


def test_hard_texts_are_the_same_for_a_seed_and_hold_every_sort() -> None:
    made = hard_texts(2 * len(SORTS), 5)
    assert made == hard_texts(2 * len(SORTS), 5)
    assert set(made).isdisjoint(hard_texts(2 * len(SORTS), 6))
    assert len(set(made)) == 2 * len(SORTS)
