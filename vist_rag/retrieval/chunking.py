"""Files -> passages of about a hundred words, cut on sentence borders, with title and source.

Rules: a passage holds whole sentences, as many as stay within ``words``; a heading begins a new passage unless that
would leave less than half a passage before it; a last passage of under a quarter joins the one before it. Only a
sentence that is itself too long is cut: at a line end, else a comma, else white space. Every word of the file is in
exactly one passage, in order.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from reprlib import repr as brief

from vist_rag.errors import ConfigError, InputError
from vist_rag.retrieval.documents import Found, Span, find_documents, read_document, read_lines
from vist_rag.types import Passage

__all__ = ["Found", "count_words", "find_documents", "read_passages", "split_sentences", "split_text"]

MIN_WORDS, MAX_WORDS = 8, 10_000

# Scripts without spaces count a word a character; a run of other characters counts one for every 40, so that a
# megabyte of base64 is not "one word".
_CJK = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_CJK}]|[^\s{_CJK}]{{1,40}}")
_VISIBLE = re.compile(r"\S")
_BORDER = re.compile(
    r"\n[^\S\n]*\n"  # a blank line
    r"|\n(?=[^\S\n]*(?:[-*+•]|\d{1,3}[.)])[^\S\n])"  # before a list item
    r"|[。！？｡]+[」』”’）]*"  # CJK, no white space needed
    r"|(?P<stop>(?<![.!?…؟۔।])[.!?…؟۔।]+[\"'”’»)\]]*(?=\s))"
)
_LAST_WORD = re.compile(r"[\w.]+$")
_ABBREVIATION = re.compile(
    "mrs?|ms|dr|prof|st|sr|jr|vs|etc|nos?|vols?|figs?|eq|ch|pp|eds?|cf|al|inc|ltd|co|corp|dept|approx|est|gen|col|maj|"
    "capt|lt|sgt|rev|hon|gov|sen|rep|pres|mt|ft|ave|jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec"
)


def read_passages(
    paths: str | Path | Iterable[str | Path],
    *,
    words: int = 100,
    on_error: Callable[[InputError], None] | None = None,
) -> Iterator[Passage]:
    """Read files and directories into passages.

    Directories are read recursively in name order; hidden files and unknown extensions in them are skipped
    (:func:`find_documents` lists both). A ``.jsonl`` row is ``{"text", "id"?, "title"?, "source"?, "metadata"?}``;
    other keys join the metadata; a row of up to one and a half times ``words`` is one passage, as it stands.
    Where a row has no id of its own, the id is a hash of title and text: it stays when the file moves or grows, and
    a text that occurs twice is one passage.

    Args:
        paths: One path or several.
        words: Words a passage, 8 to 10,000.
        on_error: Called with the error of a file that cannot be read, which is then left out (what was read of it
            stays). None raises it.
    Returns:
        Passages, read as they are asked for, in the order of the files.
    Raises:
        ConfigError: If ``words`` is out of range; at once.
        InputError: If a path is missing or of an unknown kind, at once; while reading, if a file is binary, not in
            its encoding, or has a bad row (named as ``file:line``), or if no path holds any text.
        MissingDependencyError: If a PDF is read without pypdf.
    """
    if not MIN_WORDS <= words <= MAX_WORDS:
        raise ConfigError(f"words must be in {MIN_WORDS}..{MAX_WORDS}, got {words}; 100 suits most text.")
    found = find_documents(paths)
    return _read(found, words, on_error or _raise)


def _raise(error: InputError) -> None:
    raise error


def _read(found: Found, words: int, on_error: Callable[[InputError], None]) -> Iterator[Passage]:
    seen: dict[str, int] = {}  # id -> hash of title and text
    for file in found.files:
        rows = _read_rows if file.suffix.lower() == ".jsonl" else _read_file
        try:
            for where, passage in rows(file, words):
                content = hash((passage.title, passage.text))
                if passage.id not in seen:
                    seen[passage.id] = content
                    yield passage
                elif seen[passage.id] != content:
                    raise InputError(
                        f"{where}: the id {passage.id!r} already stands for another text; make the ids unique or leave "
                        "them out."
                    )
        except InputError as error:
            on_error(error)
    if not seen:
        raise InputError(
            f"The corpus is empty: no text in {len(found.files)} readable files ({len(found.skipped)} with other "
            "extensions were skipped); give files that hold text."
        )


def _read_file(file: Path, words: int) -> Iterator[tuple[str, Passage]]:
    document = read_document(file)
    for start, end in split_text(document.text, words=words, headings=document.headings):
        metadata = {"start": start}
        if document.pages:
            metadata["page"] = bisect_right(document.pages, start)
        yield str(file), Passage(document.text[start:end], "", document.title, file.as_posix(), metadata)


def _read_rows(file: Path, words: int) -> Iterator[tuple[str, Passage]]:
    for where, line in read_lines(file):
        whole = _passage_of_row(line, where)
        if count_words(whole.text) <= 1.5 * words:
            yield where, whole
            continue
        has_id = whole.id != Passage(whole.text, title=whole.title).id
        for part, (start, end) in enumerate(split_text(whole.text, words=words)):
            id_ = f"{whole.id}#{part}" if has_id else ""
            metadata = {**whole.metadata, "start": start}
            yield where, Passage(whole.text[start:end], id_, whole.title, whole.source, metadata)


def _passage_of_row(line: str, where: str) -> Passage:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON: {error}; write one JSON object a line.") from error
    if not isinstance(row, dict):
        raise InputError(f'{where} is a JSON {type(row).__name__}; write an object, {{"text": "...", "title": "..."}}.')
    text = row.pop("text", None)
    if not isinstance(text, str) or not text.strip():
        raise InputError(f'{where}: "text" must be a string with text, got {brief(text)}; fill or remove the row.')
    fields: dict[str, str] = {}
    for key in ("id", "title", "source"):
        value = row.pop(key, None)
        if isinstance(value, bool) or not isinstance(value, str | int | None):
            raise InputError(f"{where}: {key!r} must be a string, got {brief(value)}; write it in quotes.")
        fields[key] = "" if value is None else str(value)
    metadata = row.pop("metadata", None) or {}
    if not isinstance(metadata, dict):
        raise InputError(f'{where}: "metadata" must be an object, got {brief(metadata)}; write {{"key": value}}.')
    fields["source"] = fields["source"] or Path(where).as_posix()
    return Passage(text, metadata={**row, **metadata}, **fields)


def count_words(text: str) -> int:
    """Number of words: white-space separated, a character each in Chinese and Japanese."""
    return sum(1 for _ in _WORD.finditer(text))


def split_text(text: str, *, words: int = 100, headings: Iterable[Span] = ()) -> list[Span]:
    """Cut a text into passages of at most ``words`` words (a quarter more where a short rest joins the last).

    Args:
        text: Any text, of any length; the time is linear in it.
        words: Words a passage.
        headings: Where headings are, ``(start, end)`` in characters, in order.
    Returns:
        ``(start, end)`` of each passage in characters, without white space at its ends; none for a blank text.
    """
    headings = list(headings)
    sections = {start for start, _ in headings}
    spans: list[Span] = []
    first, last, count = 0, 0, 0  # the passage that is being filled
    for start, end, n in _units(text, words, headings):
        if count and (count + n > words or (start in sections and 2 * count >= words)):
            spans.append((first, last))
            count = 0
        if not count:
            first = start
        last, count = end, count + n
    if count and spans and 4 * count < words:
        spans[-1] = (spans[-1][0], last)
    elif count:
        spans.append((first, last))
    return spans


def _units(text: str, words: int, headings: list[Span]) -> Iterator[tuple[int, int, int]]:
    """Sentences, and the pieces of those that are too long, each as ``(start, end, number of words)``."""
    for start, end in split_sentences(text, headings):
        tokens = [token.span() for token in _WORD.finditer(text, start, end)]
        while len(tokens) > words:
            cut = _best_cut(text, tokens, words)
            yield tokens[0][0], tokens[cut - 1][1], cut
            del tokens[:cut]
        if tokens:
            yield tokens[0][0], tokens[-1][1], len(tokens)


def _best_cut(text: str, tokens: list[Span], words: int) -> int:
    """How many of ``tokens`` to keep, between half of ``words`` and ``words``: the last of the best places."""

    def quality(cut: int) -> tuple[int, int]:
        end, next_start = tokens[cut - 1][1], tokens[cut][0]
        gap = text[end:next_start]
        clause = text[end - 1] in "、，；：" or (gap and text[end - 1] in ",;:—–")
        return 3 if "\n" in gap else 2 if clause else 1 if gap else 0, cut

    return max(range(words // 2, words + 1), key=quality)


def split_sentences(text: str, headings: Iterable[Span] = ()) -> Iterator[Span]:
    """``(start, end)`` of each sentence, heading, list item or paragraph without a full stop, in characters.

    Borders: blank lines, headings, list items, and ``. ! ? …`` (and their like in other scripts) before white space
    that no small letter follows; not after initials and common abbreviations of English.
    """
    borders = {0, len(text)}.union(*headings)
    borders.update(match.end() for match in _BORDER.finditer(text) if not match["stop"] or _ends_sentence(text, match))
    for start, end in pairwise(sorted(borders)):
        sentence = text[start:end].lstrip()
        if sentence:
            first = end - len(sentence)
            yield first, first + len(sentence.rstrip())


def _ends_sentence(text: str, match: re.Match[str]) -> bool:
    """Whether a full stop ends a sentence. In doubt it does not: a longer sentence harms less than a cut one."""
    following = _VISIBLE.search(text, match.end())
    if following is None:
        return True
    if following[0].islower():
        return False
    if match["stop"] != ".":
        return True
    last_word = _LAST_WORD.search(text[max(0, match.start() - 12) : match.start()])
    word = last_word[0].lower() if last_word else ""
    start = match.start() - len(word)
    if word.isdigit():  # "3. The third point" is one item; "in 1999. Then" is two sentences
        return start > 0 and text[start - 1] != "\n"
    initial = len(word) == 1 and word.isalpha()
    dotted = "." in word and not word[0].isdigit()  # U.S, e.g, a.m
    return not (initial or dotted or _ABBREVIATION.fullmatch(word))
