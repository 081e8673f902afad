"""Where a passage says an answer, and how it writes it."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence


def as_written(answer: str, sources: Sequence[str]) -> str:
    """An answer of an uncased generator as the first source that has its words writes it; another one as it is."""
    if answer != answer.lower():
        return answer
    found = ((source, find_span(answer, source)) for source in sources)
    return next((source[span[0] : span[1]] for source, span in found if span), answer)


def find_span(answer: str, text: str) -> tuple[int, int] | None:
    """Where the words of an answer stand in a text, whatever case, accents and punctuation they are written with."""
    words = re.findall(r"\w+", _fold(answer)[0])
    if not words:
        return None
    folded, places = _fold(text)
    match = re.search(r"(?<!\w)" + r"[\W_]*".join(map(re.escape, words)) + r"(?!\w)", folded)
    if match is None:
        return None
    start, end = places[match.start()], places[match.end() - 1] + 1
    while end < len(text) and unicodedata.combining(text[end]):
        end += 1  # an accent that stands by itself belongs to the letter before it
    return start, end


def _fold(text: str) -> tuple[str, list[int]]:
    """Lower case without accents, and where in ``text`` each character came from."""
    folded, places = [], []
    for i, character in enumerate(text):
        for part in unicodedata.normalize("NFD", character.lower()):
            if not unicodedata.combining(part):
                folded.append(part)
                places.append(i)
    return "".join(folded), places
