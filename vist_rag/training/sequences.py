"""Plain text of any length -> sequences of so many tokens: documents one behind the other, cut where words begin."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from vist_rag.errors import InputError
from vist_rag.retrieval.documents import SUFFIXES, read_document
from vist_rag.training.corpus import ROW_SUFFIXES, find_sources
from vist_rag.training.corpus_files import Checked, Corpus, open_corpus
from vist_rag.training.data import TextSequence, numbered_lines, parse_row, passage_of

GAP = "\n\n"
"""Between two documents."""
_LONGEST_WORD = 40
"""Characters that a cut goes back to find where a word begins; scripts without blanks are cut where a token begins."""


class SequenceCorpus(Corpus[TextSequence]):
    """Sequences of plain text."""

    kind, fields = "sequences", ("shown", "told")

    def _item(self, row: dict[str, Any]) -> TextSequence:
        return TextSequence(**row)


class SequenceCutter:
    """Puts documents behind each other, and cuts what comes of it.

    Args:
        tokenizer: Whose tokens are counted.
        shown: Tokens of a sequence that are read as memory.
        told: Tokens that come next.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, shown: int, told: int) -> None:
        self._tokenizer, self._shown, self._told = tokenizer, shown, told
        self._held = ""
        self._starts: list[int] = []  # where each token of what is held begins

    def cut(self, document: str) -> Iterator[TextSequence]:
        """The sequences that are full with this document; what is left over waits for the next."""
        text = document.strip() + GAP
        encoded = self._tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
        )
        before = len(self._held)
        self._held += text
        self._starts += [before + start for start, _ in encoded.offset_mapping]
        begin, size = 0, self._shown + self._told
        while len(self._starts) > begin + size:
            first, middle, last = (self._word(self._starts[begin + n]) for n in (0, self._shown, size))
            sequence = TextSequence(self._held[first:middle].strip(), self._held[middle:last].strip())
            if sequence.shown and sequence.told:  # white space has tokens, too, and says nothing
                yield sequence
            begin += size
        if begin:
            cut = self._word(self._starts[begin])
            self._held = self._held[cut:]
            self._starts = [start - cut for start in self._starts[begin:]]

    def _word(self, at: int) -> int:
        """Where the word begins that a token is part of."""
        if self._held[at].isspace():
            return at
        for place in range(at, max(0, at - _LONGEST_WORD), -1):
            if self._held[place - 1].isspace():
                return place
        return at


def open_sequences(
    data: Path,
    sources: Sequence[str],
    cache: Path,
    tokenizer: PreTrainedTokenizerFast,
    *,
    shown: int,
    told: int,
    skip_bad: bool = False,
) -> SequenceCorpus:
    """Sequences of ``shown`` + ``told`` tokens, a few less where a cut goes back to the beginning of a word.

    Documents are put behind each other as they come, one file after another, so that short ones share a sequence. What
    is left at the very end is left out. The first call builds the corpus; later ones open it, while sources, sizes and
    tokenizer stay.

    Args:
        data: Folder that the sources are relative to.
        sources: Glob patterns: rows ``{"text", "title"?}`` (``.jsonl``, ``.jsonl.gz``), a document each; ``.txt``,
            ``.md``, ``.html``, ``.pdf``; folders of these.
        cache: Where the corpus gets a folder of its own.
        tokenizer: The generator's.
        shown: Tokens that are read as memory.
        told: Tokens that come next.
        skip_bad: Leave malformed rows and unreadable texts out, list them, and warn.
    Raises:
        InputError: If a pattern matches nothing, a file is of another kind or torn, a row is bad, or the text is
            shorter than one sequence.
    """
    patterns = list(sources)
    files = find_sources(data, patterns, (*SUFFIXES, *ROW_SUFFIXES))
    cutter = SequenceCutter(tokenizer, shown, told)

    def read(file: Path) -> Iterator[Checked[TextSequence]]:
        for line, text in _documents(file):
            if isinstance(text, ValueError):
                yield line, text
            else:
                yield from ((None, sequence) for sequence in cutter.cut(text))

    words = hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()
    return open_corpus(
        SequenceCorpus, data, patterns, files, cache, read, skip_bad=skip_bad, tokens=[shown, told], vocabulary=words
    )


def _documents(file: Path) -> Iterator[tuple[int | None, str | ValueError]]:
    """The documents of a file, or what is wrong with them, each with its line where there are lines."""
    if not file.name.lower().endswith(ROW_SUFFIXES):
        try:
            yield None, read_document(file).text
        except InputError as error:
            yield None, ValueError(str(error).removeprefix(f"{file} ").removesuffix("."))
        return
    for number, line in numbered_lines(file):
        try:
            yield number, passage_of(parse_row(line)).content
        except ValueError as error:
            yield number, error
