"""What a compressor misreads, as it was measured, and which passages are therefore better read as text.

Looks at text alone: nothing is encoded. ``vist_rag.training.probe`` measures, ``fidelity.json`` beside the compressor
keeps, :class:`Guard` warns.
"""

from __future__ import annotations

import json
import re
import unicodedata
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal, Self

from vist_rag.errors import CheckpointError, ConfigError

FIDELITY_FILE = "fidelity.json"
GuardMode = Literal["off", "on", "strict"]
GUARD_MODES: tuple[GuardMode, ...] = ("off", "on", "strict")

LENGTHS = (1, 3, 5, 9, 13, 17)
"""Characters with which each bucket of lengths begins."""
ENOUGH = 30
"""Words of a class that its own rate needs; with fewer, the rate is that of all lengths of its kind."""

_FORMAT = 1
_PASSAGES, _WORDS = 4096, 65536  # that are remembered

_UNIT = re.compile(r"\S+")
_PARTS = re.compile("[^’‘ʼ–—…“”«»]+")
"""Typographic marks between letters: where they are lost, the words on both sides are still read."""
_EDGES = ".,;:!?()[]{}<>\"'`|*_/\\-–—…“”‘’„«»‹›¿¡·•"
_PROSE = re.compile(r"[A-Z]?[a-z]+|[A-Z]")
_CAMEL = re.compile(r"[a-z]*(?:[A-Z][a-z]+)+")
_ABBREVIATION = re.compile(r"(?:[A-Za-z]\.)+[A-Za-z]")
_IDENTIFIER = re.compile(r"[A-Za-z0-9._-]*")
_LETTER = re.compile(r" (?:LETTER|SYLLABLE|[A-Z]+ IDEOGRAPH)\b")
_FIGURES = {
    "digits": re.compile(r"\d+"),
    "ordinal": re.compile(r"\d+(?:st|nd|rd|th|s)"),  # codespell:ignore nd
    "grouped": re.compile(r"\d{1,3}(?:,\d{3})+"),
    "amount": re.compile(r"[\d.,:;/%$#()+^=-]*\d[\d.,:;/%$#()+^=-]*"),
}
_JOINTS = re.compile(r"[-'/&]")
_PIECE = r"(?:[A-Z]?[a-z]{2,}|[\d,]+(?:st|nd|rd|th|s)?)"  # codespell:ignore nd
_COMPOUND = re.compile(rf"(?=.*\d)(?=.*[a-z]){_PIECE}(?:[-/]{_PIECE})+")
"""18th-century, 2,000-year-old: words and numbers, which are read one by one."""
_PIECES = re.compile(r"[^-/]+")


def words(text: str) -> Iterator[tuple[int, int]]:
    """Where each word stands: what is between white space, without the punctuation around it, as ``(start, end)``."""
    for unit in _UNIT.finditer(text):
        whole = unit.group()
        # Signs within a number are part of it: 1914–1918 must not come back as 19141918.
        split = not whole.isascii() and not any(c.isdigit() for c in whole)
        for part in _PARTS.finditer(whole) if split else (unit,):
            found = part.group()
            core = found.strip(_EDGES).removesuffix("'s")
            if core.isascii() and not any(map(str.isalnum, core)):
                continue
            start = part.start() + found.index(core) + (unit.start() if split else 0)
            if _COMPOUND.fullmatch(core):
                yield from ((start + piece.start(), start + piece.end()) for piece in _PIECES.finditer(core))
            else:
                yield start, start + len(core)


@lru_cache(_WORDS)
def word_class(word: str) -> str:
    """Kind of characters and bucket of length, such as ``identifier 9-12``."""
    return f"{_kind(word)} {bucket_of(len(word))}"


def _kind(word: str) -> str:
    if not word.isascii():
        return _script(unicodedata.normalize("NFC", word))
    for kind, form in _FIGURES.items():
        if form.fullmatch(word):
            return kind
    pieces = _JOINTS.split(word)
    if all(map(str.isalpha, pieces)):
        if all(map(_PROSE.fullmatch, pieces)):
            return "word"
        if word.isupper():
            return "capitals"
        return "camel case" if all(map(_CAMEL.fullmatch, pieces)) else "mixed case"
    if _ABBREVIATION.fullmatch(word):
        return "capitals"
    return "identifier" if _IDENTIFIER.fullmatch(word) and any(map(str.isdigit, word)) else "code"


def _script(word: str) -> str:
    """The first script that is not Latin, ``accented`` for Latin with marks, ``symbol`` without a letter."""
    names = (unicodedata.name(c, "") for c in word if not c.isascii() and unicodedata.category(c) != "Lm")
    scripts = [name.split()[0].lower() for name in names if _LETTER.search(name)]
    foreign = next((script for script in scripts if script != "latin"), None)
    return foreign or ("accented" if scripts else "symbol")


def bucket_of(length: int) -> str:
    """Bucket of a word's length in characters, such as ``9-12``."""
    at = bisect_right(LENGTHS, length) - 1
    return f"{LENGTHS[at]}+" if at == len(LENGTHS) - 1 else f"{LENGTHS[at]}-{LENGTHS[at + 1] - 1}"


@dataclass(frozen=True, slots=True)
class Rate:
    """How many words of a class were measured, and how many came back wrong."""

    n: int
    wrong: int

    @property
    def share(self) -> float:
        """Of wrong ones; 1.0 where nothing was measured."""
        return self.wrong / self.n if self.n else 1.0


@dataclass(frozen=True)
class Fidelity:
    """What a compressor misreads, measured by ``vist_rag.training.probe``.

    Attributes:
        fingerprint: Of the compressor.
        recipe: What it takes to measure the same again: seed, texts, steps.
        glyphs: Code points that it has a glyph for, as ascending ``(first, last)``; None: it reads no glyphs.
        probe: Of each class of words, what a small reader of the latents gets wrong.
        speller: What the checkpoint's own fusion gets wrong, where it spells; None: it does not.
    """

    fingerprint: str
    recipe: Mapping[str, Any]
    glyphs: tuple[tuple[int, int], ...] | None
    probe: Mapping[str, Rate]
    speller: Mapping[str, Rate] | None = None

    @property
    def rates(self) -> Mapping[str, Rate]:
        """What the generator is given: the speller's where there is one, else the probe's."""
        return self.probe if self.speller is None else self.speller

    @cached_property
    def _kinds(self) -> dict[str, Rate]:
        """Of each kind, all lengths together."""
        kinds: dict[str, Rate] = {}
        for name, rate in self.rates.items():
            kind = name.rpartition(" ")[0]
            before = kinds.get(kind, Rate(0, 0))
            kinds[kind] = Rate(before.n + rate.n, before.wrong + rate.wrong)
        return kinds

    @cached_property
    def _first_glyphs(self) -> list[int]:
        return [first for first, _ in self.glyphs or ()]

    def has_glyph(self, character: str) -> bool:
        """Whether a character can be seen at all; what shows nothing anyway can."""
        if self.glyphs is None:
            return True
        at = bisect_right(self._first_glyphs, ord(character)) - 1
        return (at >= 0 and ord(character) <= self.glyphs[at][1]) or _shows_nothing(character)

    def lacking(self, text: str) -> int:
        """Characters of a text that have no glyph."""
        if text.isascii():
            return 0  # control characters show nothing
        return sum(not c.isascii() and not self.has_glyph(c) for c in unicodedata.normalize("NFC", text))

    def misread(self, word: str) -> float:
        """How often such a word comes back wrong: 1.0 where a glyph is missing, or no such word was ever measured."""
        if self.lacking(word):
            return 1.0
        name = word_class(word)
        rate = self.rates.get(name)
        if rate is None or rate.n < ENOUGH:
            rate = self._kinds.get(name.rpartition(" ")[0], Rate(0, 0))
        return rate.share

    def save(self, directory: str | Path) -> Path:
        """Write ``fidelity.json`` into the directory of the compressor."""
        path = Path(directory) / FIDELITY_FILE
        path.write_text(json.dumps({"format": _FORMAT, **asdict(self)}, indent=1, sort_keys=True) + "\n", "utf-8")
        return path

    @classmethod
    def load(cls, directory: str | Path, fingerprint: str) -> Self | None:
        """Read ``fidelity.json`` of a compressor; None where it was never measured.

        Another compressor's file is refused, not passed over: whoever reads a checkpoint with it believes that its
        passages are guarded, and they would be by figures of another model.

        Args:
            directory: Of the compressor.
            fingerprint: Of the compressor.
        Raises:
            CheckpointError: If the file cannot be read, or is another compressor's.
        """
        path = Path(directory) / FIDELITY_FILE
        if not path.is_file():
            return None
        try:
            fields = json.loads(path.read_text("utf-8"))
            if (version := fields.pop("format")) != _FORMAT:
                raise ValueError(f"its format is {version}, not {_FORMAT}")
            for name in ("probe", "speller"):
                if fields[name] is not None:
                    fields[name] = {key: Rate(**rate) for key, rate in fields[name].items()}
            if fields["glyphs"] is not None:
                fields["glyphs"] = tuple((int(first), int(last)) for first, last in fields["glyphs"])
            fidelity = cls(**fields)
        except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}); measure anew: vist-rag probe.") from error
        fidelity.check(fingerprint, str(path))
        return fidelity

    def check(self, fingerprint: str, name: str = "fidelity") -> None:
        """Refuse to speak for another compressor.

        Raises:
            CheckpointError: If this was not measured on the compressor with this fingerprint.
        """
        if self.fingerprint != fingerprint:
            raise CheckpointError(
                f"{name} must be of compressor {fingerprint[:12]}, got {str(self.fingerprint)[:12] or 'none'}; measure "
                "anew (vist-rag probe), or read with guard='off'."
            )


def _shows_nothing(character: str) -> bool:
    return character.isspace() or unicodedata.category(character) in ("Cc", "Cf") or 0xFE00 <= ord(character) < 0xFE10


def glyph_ranges(codepoints: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """Ascending code points as ``(first, last)``."""
    ranges: list[tuple[int, int]] = []
    for codepoint in codepoints:
        if ranges and codepoint == ranges[-1][1] + 1:
            ranges[-1] = ranges[-1][0], codepoint
        else:
            ranges.append((codepoint, codepoint))
    return tuple(ranges)


# -------------------------------------------------------------------------------------------------------------- guard

LENIENT = ("word", "accented")
"""Kinds whose words are still known with a wrong letter, or without an accent; one wrong digit is another number."""
WORD = 0.35
"""A passage with a word of another kind that is misread as often as this is read as text: the largest share that cost a
point of exact match or less on the hard development questions of ``benchmarks/guard.py``."""
SHARE = 0.25
"""So is one of whose words this share is expected to be misread."""
LACKING = 0.02
"""And one of whose characters this share has no glyph: what ``vist-rag index`` warns of."""


@dataclass(frozen=True, slots=True)
class Risk:
    """What reading a passage as memory may lose.

    Attributes:
        words: In the passage.
        expected: Of these, how many are misread on average.
        at_risk: How many of those that have to be exact are misread as often as the guard allows none to be.
        worst: The word that is misread most often, of those that have to be exact; the longest of several.
        rate: How often it is.
        lacking: Share of the characters that have no glyph.
    """

    words: int
    expected: float
    at_risk: int
    worst: str
    rate: float
    lacking: float


@dataclass(frozen=True)
class Guard:
    """Says which passages are not to be read as memory, and why.

    Attributes:
        fidelity: Of the compressor that would read them.
        word: How often no word of a passage may be misread.
        share: Of words that may be expected to be misread.
        lacking: Of characters that may have no glyph.
    Raises:
        ConfigError: If a share is not in 0..1.
    """

    fidelity: Fidelity
    word: float = WORD
    share: float = SHARE
    lacking: float = LACKING
    _known: dict[str, str | None] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("word", "share", "lacking"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"{name} must be above 0 and at most 1, got {getattr(self, name)}.")

    def __call__(self, text: str) -> str | None:
        """Why a passage is better read as text, in words; None where memory does."""
        known: str | Literal[False] | None = self._known.get(text, False)
        if known is False:
            if len(self._known) >= _PASSAGES:
                self._known.clear()
            known = self._known[text] = self._reason(self.risk(text))
        return known

    def risk(self, text: str) -> Risk:
        """What memory of this text may lose."""
        found = [text[start:end] for start, end in words(text)]
        rates = [self._misread(word) for word in found]
        # What a missing glyph loses is lost, whatever kind it is.
        exact = [(rate, len(word), word) for rate, word in zip(rates, found, strict=True) if not self._forgives(word)]
        rate, _, worst = max(exact, default=(0.0, 0, ""))
        return Risk(
            words=len(found),
            expected=sum(rates),
            at_risk=sum(one >= self.word for one, _, _ in exact),
            worst=worst,
            rate=rate,
            lacking=self.fidelity.lacking(text) / max(1, len(text)),
        )

    def _forgives(self, word: str) -> bool:
        return word_class(word).startswith(LENIENT) and not self.fidelity.lacking(word)

    @cached_property
    def _misread(self) -> Any:
        return lru_cache(_WORDS)(self.fidelity.misread)

    def _reason(self, risk: Risk) -> str | None:
        if risk.lacking >= self.lacking:
            return f"{_percent(risk.lacking)} of characters have no glyph"
        if risk.rate >= self.word:
            worst = f"`{risk.worst}` is misread in {_percent(risk.rate)} of cases"
            return f"{_kind(risk.worst)}: {worst}; {risk.at_risk} of {risk.words} words at risk"
        if risk.words and risk.expected / risk.words >= self.share:
            return f"{_percent(risk.expected / risk.words)} of {risk.words} words are expected to be misread"
        return None


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
