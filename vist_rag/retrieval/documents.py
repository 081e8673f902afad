"""Files -> documents: plain text with a title, and where its headings and pages are.

What is read is the text that a reader of the file sees, in order: nothing is summarised, nothing is cleaned. Line
ends become line feeds; HTML white space collapses as in a browser.
"""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

from vist_rag.errors import InputError, MissingDependencyError

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Document:
    """The text of one file.

    Attributes:
        text: What the file says.
        title: Its own title, or the stem of its name.
        headings: Where headings are, ``(start, end)`` in characters of ``text``, in order.
        pages: Where each page starts, in characters of ``text``; empty where the format has no pages.
    """

    text: str
    title: str
    headings: tuple[Span, ...] = ()
    pages: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Found:
    """What lies under the paths that were asked for.

    Attributes:
        files: Files that can be read, in a stable order.
        skipped: Files inside directories whose extension says that they cannot.
    """

    files: tuple[Path, ...]
    skipped: tuple[Path, ...]


def find_documents(paths: str | Path | Iterable[str | Path]) -> Found:
    """List the readable files under ``paths``: files as they are given, directories recursively in name order.

    Hidden files and directories, and links to directories, are left out of a directory's listing.

    Raises:
        InputError: If a path does not exist, or a file that was named has an extension that cannot be read.
    """
    files: dict[Path, None] = {}
    skipped: dict[Path, None] = {}
    for path in [Path(paths)] if isinstance(paths, str | Path) else map(Path, paths):
        if path.is_dir():
            for file in _walk(path):
                (files if file.suffix.lower() in SUFFIXES else skipped)[file] = None
        elif not path.exists():
            raise InputError(f"{path} does not exist; check the path.")
        elif path.suffix.lower() not in SUFFIXES:
            raise InputError(
                f"{path} has the extension {path.suffix!r}; those that can be read are {', '.join(SUFFIXES)}; "
                "convert or rename the file."
            )
        else:
            files[path] = None
    return Found(tuple(files), tuple(skipped))


def _walk(directory: Path) -> Iterable[Path]:
    for folder, folders, names in os.walk(directory):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(folder, name) for name in sorted(names) if not name.startswith("."))


def read_document(path: Path) -> Document:
    """Read one ``.txt``, ``.md``, ``.html`` or ``.pdf`` file.

    Raises:
        InputError: If the file cannot be opened, is binary, is not in its encoding, or is a PDF without text.
        MissingDependencyError: If it is a PDF and pypdf is not installed.
    """
    return _READERS[path.suffix.lower()](path)


def read_bytes(path: Path) -> bytes:
    """The bytes of a text file.

    Raises:
        InputError: If the file cannot be opened, or holds NUL bytes as only binary files (and UTF-16 ones) do.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}; check the file and its permissions.") from error
    if b"\0" in data and not data.startswith(_UTF16_MARKS):
        raise InputError(f"{path} is a binary file (a NUL byte at {data.index(0)}); give a text file or leave it out.")
    return data


def read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """The lines of a UTF-8 file that are not blank, one at a time, each after its place, ``file:line``.

    Raises:
        InputError: If the file cannot be opened, or a line is binary or not UTF-8.
    """
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                where = f"{path}:{number}"
                if b"\0" in line:
                    raise InputError(f"{where} is binary (a NUL byte); write UTF-8 text, one JSON object a line.")
                if line.strip():
                    yield where, decode(line, where)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}; check the file and its permissions.") from error


def decode(data: bytes, where: str, encoding: str = "utf-8-sig") -> str:
    """Decode ``data``, by its byte-order mark where there is one, with line ends as line feeds.

    Raises:
        InputError: If ``data`` is not in the encoding; ``where`` says what is wrong where.
    """
    if data.startswith(_UTF16_MARKS):
        encoding = "utf-16"
    try:
        text = data.decode(encoding)
    except UnicodeError as error:  # a few codecs do not say where
        what = f"{encoding}: {error}"
        if isinstance(error, UnicodeDecodeError):
            what = f"{error.encoding}: byte {data[error.start]:#04x} at {error.start}"
        raise InputError(f"{where} is not {what}; convert it to UTF-8 (iconv -f ENCODING -t utf-8).") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def _read_text(path: Path) -> Document:
    return Document(decode(read_bytes(path), str(path)), path.stem)


_MARKDOWN_LINE = re.compile(r"^ {0,3}(?:(?P<fence>```|~~~)|#{1,6}[ \t]+(?P<heading>[^\n]*?)[ \t#]*$)", re.MULTILINE)


_LINK = re.compile(  # or code, in which brackets are no link
    r"""`[^`\n]*`|!?\[(?P<label>[^\[\]\n]*)\]\((?:<[^<>\n]*>|[^\s()]*(?:\([^\s()]*\)[^\s()]*)*)(?:\s+"[^"\n]*")?\)"""
)


def _links_as_their_text(text: str) -> str:
    """Markdown without the addresses of its links, which nobody reads aloud; code is left as it is."""

    def shown(found: re.Match[str]) -> str:
        return found[0] if found["label"] is None else found["label"]

    pieces, begin, fence = [], 0, ""
    for line in _MARKDOWN_LINE.finditer(text):
        mark = line["fence"]
        if mark and fence in ("", mark):
            piece = text[begin : line.start()]
            pieces.append(piece if fence else _LINK.sub(shown, piece))
            begin, fence = line.start(), "" if fence else mark
    pieces.append(text[begin:] if fence else _LINK.sub(shown, text[begin:]))
    return "".join(pieces)


def _read_markdown(path: Path) -> Document:
    text = _links_as_their_text(decode(read_bytes(path), str(path)))
    headings: list[Span] = []
    title, fence = "", ""
    for line in _MARKDOWN_LINE.finditer(text):
        if mark := line["fence"]:
            fence = mark if not fence else "" if mark == fence else fence
        elif not fence:  # inside a fence, # begins a comment
            headings.append(line.span())
            title = title or line["heading"]
    return Document(text, title or path.stem, tuple(headings))


_CHARSET = re.compile(rb"""<meta[^>]+charset\s*=\s*["']?\s*([\w.:-]+)""", re.IGNORECASE)


def _read_html(path: Path) -> Document:
    data = read_bytes(path)
    encoding, declared = "utf-8-sig", _CHARSET.search(data[:2048])
    try:
        if declared:
            # By the HTML standard, a page that says latin-1 means windows-1252.
            name = codecs.lookup(declared[1].decode("ascii")).name
            encoding = {"utf-8": encoding, "iso8859-1": "cp1252", "ascii": "cp1252"}.get(name, name)
        text = decode(data, str(path), encoding)
    except LookupError as error:  # also of a codec of Python's that makes no text, such as rot13
        charset = declared[1] if declared else b""
        raise InputError(f"{path} declares the unknown charset {charset!r}; convert it to UTF-8.") from error
    page = _HtmlText()
    page.feed(text)
    page.close()
    title = " ".join(page.title.split()) or page.first_heading or path.stem
    return Document("".join(page.parts), title, tuple(page.headings))


_HIDDEN = re.compile("script|style|template|noscript|svg|nav")
_HEADING = re.compile("h[1-6]")
_BLOCK = re.compile(
    "address|article|aside|blockquote|body|d[dlt]|details|dialog|div|fieldset|figcaption|figure|footer|form|h[1-6]|"
    "header|hr|li|main|ol|p|pre|section|summary|table|tbody|tfoot|thead|ul"
)
_GAPS = ("", " ", "\n", "\n\n")


class _HtmlText(HTMLParser):
    """Visible text with the white space of a browser: a blank line between blocks, a line end for <br> and <tr>."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.headings: list[Span] = []
        self.title = ""
        self.first_heading = ""
        self._length = 0
        self._gap = 0  # index into _GAPS: what stands between the text so far and the text to come
        self._hidden = 0
        self._preformatted = 0
        self._in_title = False
        self._heading_start: int | None = None
        self._in_heading = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._in_title = tag == "title" and not self._hidden and not self.title
        self._hidden += _HIDDEN.fullmatch(tag) is not None
        self._preformatted += tag == "pre"
        self._separate(tag)
        if _HEADING.fullmatch(tag):
            self._in_heading, self._heading_start = True, None

    def handle_endtag(self, tag: str) -> None:
        self._in_title = False
        self._hidden = max(0, self._hidden - (_HIDDEN.fullmatch(tag) is not None))
        self._preformatted = max(0, self._preformatted - (tag == "pre"))
        self._separate(tag)
        if _HEADING.fullmatch(tag) and self._in_heading:
            self._in_heading = False
            if self._heading_start is not None:
                self.headings.append((self._heading_start, self._length))
                self.first_heading = self.first_heading or "".join(self.parts)[slice(*self.headings[-1])]

    def handle_data(self, data: str) -> None:
        if self._in_title:
            self.title += data
        elif not self._hidden and not data.isspace():
            gap = max(self._gap, int(data[0].isspace()))
            self._write(data if self._preformatted else " ".join(data.split()), gap)
            self._gap = int(data[-1].isspace())
        elif not self._hidden:
            self._gap = max(self._gap, 1)

    def _write(self, text: str, gap: int) -> None:
        separator = _GAPS[gap] if self.parts else ""
        if self._in_heading and self._heading_start is None:
            self._heading_start = self._length + len(separator)
        self.parts += (separator, text)
        self._length += len(separator) + len(text)

    def _separate(self, tag: str) -> None:
        gap = 3 if _BLOCK.fullmatch(tag) else 2 if tag in ("br", "tr") else 1 if tag in ("td", "th") else 0
        self._gap = max(self._gap, gap)


def _read_pdf(path: Path) -> Document:
    try:
        from pypdf import PdfReader
    except ImportError as error:
        raise MissingDependencyError(f"Reading {path}", "pypdf", "pdf") from error
    try:
        reader = PdfReader(path)
        pages = [page.extract_text() for page in reader.pages]
        title = ((reader.metadata and reader.metadata.title) or "").strip()
    except Exception as error:  # pypdf raises a dozen built-in types on damaged and on encrypted files
        raise InputError(f"{path} cannot be read as PDF: {error}; repair, decrypt or leave out the file.") from error
    if not any(page.strip() for page in pages):
        raise InputError(f"{path} holds no text in {len(pages)} pages (scanned?); run OCR over it first.")
    starts = [0]
    for page in pages:
        starts.append(starts[-1] + len(page) + 1)  # + 1: the line end between pages
    return Document("\n".join(pages), title or path.stem, pages=tuple(starts[:-1]))


_READERS: dict[str, Callable[[Path], Document]] = {
    ".txt": _read_text,
    ".md": _read_markdown,
    ".html": _read_html,
    ".htm": _read_html,
    ".pdf": _read_pdf,
}
SUFFIXES = (*_READERS, ".jsonl")
"""File name extensions that can be read, in lower case."""
