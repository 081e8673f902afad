"""Files -> passages: nothing is lost, sentences stay whole, bad files are named."""

from __future__ import annotations

import json
import random
import re
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vist_rag.errors import ConfigError, InputError, MissingDependencyError
from vist_rag.retrieval.chunking import count_words, find_documents, read_passages, split_sentences, split_text

SENTENCE = "The lighthouse keeper counted the ships that passed before the storm."  # 11 words


def written(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def chunks(text: str, words: int = 100) -> list[str]:
    return [text[start:end] for start, end in split_text(text, words=words)]


# ---------------------------------------------------------------------------------------------------------- splitting


def test_passages_hold_whole_sentences_up_to_the_limit() -> None:
    got = chunks(" ".join([SENTENCE] * 30), words=50)
    assert [count_words(c) for c in got] == [44] * 7 + [22]
    assert all(c.startswith("The lighthouse") and c.endswith("storm.") for c in got)


def test_a_short_rest_joins_the_passage_before_it() -> None:
    assert [count_words(c) for c in chunks(" ".join([SENTENCE] * 10), words=99)] == [110]
    assert [count_words(c) for c in chunks(" ".join([SENTENCE] * 12), words=99)] == [99, 33]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Dr. Smith met J. Doe. They spoke.", ["Dr. Smith met J. Doe.", "They spoke."]),
        ("It cost 3.50 euros. Nobody paid.", ["It cost 3.50 euros.", "Nobody paid."]),
        ("He left in 1999. Then it rained.", ["He left in 1999.", "Then it rained."]),
        ("See e.g. Paris. Or not.", ["See e.g. Paris.", "Or not."]),
        ('"Stop!" he said. "Why?" She left.', ['"Stop!" he said.', '"Why?"', "She left."]),
        ("Wait... what? Yes.", ["Wait... what?", "Yes."]),
        ("A heading\n\nA text without end\n\nMore", ["A heading", "A text without end", "More"]),
        ("To do:\n- buy milk\n- sell it\n3. The third", ["To do:", "- buy milk", "- sell it", "3. The third"]),
        ("今天下雨。我们在家！好吗？", ["今天下雨。", "我们在家！", "好吗？"]),
        ("यह एक है। यह दो है।", ["यह एक है।", "यह दो है।"]),
    ],
)
def test_sentence_borders(text: str, expected: list[str]) -> None:
    assert [text[start:end] for start, end in split_sentences(text)] == expected


def test_only_a_sentence_over_the_limit_is_cut_and_best_at_a_line_end_then_a_comma() -> None:
    clause = "and the river rose again"
    assert chunks(", ".join([clause] * 8), words=12) == [f"{clause}, {clause},"] * 3 + [f"{clause}, {clause}"]
    lines = "\n".join(["one two three, four five six"] * 4)
    assert chunks(lines, words=8) == ["one two three, four five six"] * 4
    assert [count_words(c) for c in chunks("word " * 25, words=10)] == [10, 10, 5]


def test_a_word_of_a_megabyte_is_cut_all_the_same() -> None:
    got = chunks("x" * 100_000, words=100)
    assert "".join(got) == "x" * 100_000
    assert max(map(len, got)) <= 100 * 40


@settings(max_examples=300, deadline=None)
@given(
    text=st.text(st.sampled_from('ab A. ?!…,;"”)\n\t-*1 。、漢字ｶ\u00a0\ud800\x0c'), max_size=300)
    | st.text(max_size=300),
    words=st.integers(8, 40),
)
def test_every_visible_character_survives_in_order_and_limits_hold(text: str, words: int) -> None:
    spans = split_text(text, words=words)
    assert "".join("".join(text[a:b].split()) for a, b in spans) == "".join(text.split())
    assert all(a < b for a, b in spans)
    assert all(b <= c for (_, b), (c, _) in pairwise(spans))
    assert all(text[a:b] == text[a:b].strip() for a, b in spans)
    assert all(count_words(text[a:b]) <= words + max(0, (words - 1) // 4) for a, b in spans)


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=40),
    words=st.integers(20, 60),
)
def test_no_sentence_within_the_limit_is_cut(lengths: list[int], words: int) -> None:
    sentences = [" ".join(["Word", *["more"] * (n - 1)]) + "." for n in lengths]
    got = chunks(" ".join(sentences), words=words)
    assert re.findall(r"[^.]+\.", " ".join(got)) == re.findall(r"[^.]+\.", " ".join(sentences))
    assert all(chunk.startswith("Word") and chunk.endswith(".") for chunk in got)


@pytest.mark.parametrize("text", [". " * 60_000, "." * 500_000, "\n " * 200_000, "a.)" * 100_000, "A. b" * 50_000])
def test_time_is_linear_on_hostile_text(text: str) -> None:
    start = time.process_time()
    split_text(text)
    assert time.process_time() - start < 20  # quadratic would take many minutes


@pytest.mark.parametrize("words", [0, 7, 10_001])
def test_words_out_of_range(words: int, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"words must be in 8\.\.10000, got {words}"):
        read_passages(tmp_path, words=words)


# -------------------------------------------------------------------------------------------------------------- files


def test_text_file(tmp_path: Path) -> None:
    path = written(tmp_path / "notes.txt", b"\xef\xbb\xbf  Gr\xc3\xbc\xc3\x9fe.\r\nZweite Zeile.")
    (passage,) = read_passages(path)
    assert (passage.text, passage.title, passage.source) == ("Grüße.\nZweite Zeile.", "notes", path.as_posix())
    assert passage.metadata == {"start": 2}


def test_utf16_text_file(tmp_path: Path) -> None:
    (passage,) = read_passages(written(tmp_path / "a.txt", "Ünïcode from Windows.".encode("utf-16")))
    assert passage.text == "Ünïcode from Windows."


def test_start_points_into_the_file(tmp_path: Path) -> None:
    text = " ".join(f"Sentence number {i} says a little more than the last." for i in range(40))
    path = written(tmp_path / "a.txt", text)
    passages = list(read_passages(path, words=30))
    assert len(passages) > 10
    assert all(text[p.metadata["start"] :].startswith(p.text) for p in passages)


def test_markdown_title_is_the_first_heading_and_headings_begin_passages(tmp_path: Path) -> None:
    text = f"```\n# no heading\n```\n\n# The Sea #\n{SENTENCE} {SENTENCE}\n## Storms\n{SENTENCE}\n"
    passages = list(read_passages(written(tmp_path / "a.md", text), words=50))
    assert [p.title for p in passages] == ["The Sea", "The Sea"]
    assert passages[1].text == f"## Storms\n{SENTENCE}"


def test_links_of_markdown_are_read_as_their_text(tmp_path: Path) -> None:
    text = (
        'Read [the npm folders](/configuring-npm/folders "Folders") and [a wiki](<a b>), or ![a map](map.png) of it '
        "([here](x_(y).md)).\n`[kept](as/code)` [not a link] (so)\n```\n[kept](too)\n```\n[gone](again)"
    )
    (passage,) = read_passages(written(tmp_path / "a.md", text))
    assert passage.text == (
        "Read the npm folders and a wiki, or a map of it (here).\n`[kept](as/code)` [not a link] (so)\n```\n"
        "[kept](too)\n```\ngone"
    )


def test_html_is_read_as_a_browser_shows_it(tmp_path: Path) -> None:
    html = (
        "<!doctype html><html><head><title>Sea &amp;\n Storm</title><style>p{}</style></head><body><nav>Home</nav>"
        "<h1>Head</h1><p>One<i> </i><b>bo</b>ld<b>\n  word</b>.</p><script>x<y</script><ul><li>item</li></ul>"
        "<table><tr><td>a</td><td>b</td></tr><tr><td>c</td></tr></table>&icirc;le<br>end"
        "<pre>x\n  y</pre></body></html>"
    )
    (passage,) = read_passages(written(tmp_path / "a.html", html))
    assert passage.title == "Sea & Storm"
    assert passage.text == "Head\n\nOne bold word.\n\nitem\n\na b\nc\n\nîle\nend\n\nx\n  y"


def test_html_title_falls_back_to_heading_then_stem_and_charset_is_obeyed(tmp_path: Path) -> None:
    latin = '<meta charset="iso-8859-1"><h2>\xcele \x93one\x94</h2><p>text</p>'.encode("latin-1")
    (passage,) = read_passages(written(tmp_path / "a.htm", latin))
    assert passage.title == "Île “one”"
    (passage,) = read_passages(written(tmp_path / "stem.HTML", "<p>text"))
    assert passage.title == "stem"


def pdf_bytes(*pages: str, title: str = "") -> bytes:
    """A PDF with one line of text a page, written by hand."""
    kids = " ".join(f"{4 + 2 * i} 0 R" for i in range(len(pages)))
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    for i, text in enumerate(pages):
        stream = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET"
        objects.append(
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents {5 + 2 * i} 0 R "
            "/Resources << /Font << /F1 3 0 R >> >> >>"
        )
        objects.append(f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream")
    objects.append(f"<< /Title ({title}) >>")
    out, offsets = "%PDF-1.4\n", []
    for number, body in enumerate(objects, start=1):
        offsets.append(len(out))
        out += f"{number} 0 obj\n{body}\nendobj\n"
    xref = len(out)
    out += f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n" + "".join(f"{o:010} 00000 n \n" for o in offsets)
    out += f"trailer << /Size {len(objects) + 1} /Root 1 0 R /Info {len(objects)} 0 R >>\nstartxref\n{xref}\n%%EOF\n"
    return out.encode("latin-1")


def test_pdf(tmp_path: Path) -> None:
    pytest.importorskip("pypdf", reason="pypdf (extra pdf) is not installed")
    path = written(tmp_path / "a.pdf", pdf_bytes(SENTENCE, SENTENCE.replace("The", "No"), title="The Sea"))
    first, second = read_passages(path, words=12)
    assert (first.text, first.title, first.metadata["page"]) == (SENTENCE, "The Sea", 1)
    assert (second.text, second.metadata["page"]) == (SENTENCE.replace("The", "No"), 2)


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"%PDF-1.4 rubbish", "cannot be read as PDF"), (pdf_bytes(""), "holds no text in 1 pages")],
)
def test_bad_pdf(tmp_path: Path, data: bytes, message: str) -> None:
    pytest.importorskip("pypdf", reason="pypdf (extra pdf) is not installed")
    with pytest.raises(InputError, match=message):
        list(read_passages(written(tmp_path / "a.pdf", data)))


def test_pdf_without_pypdf_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pypdf", None)
    with pytest.raises(MissingDependencyError, match=re.escape("pip install 'vist-rag[pdf]'")):
        list(read_passages(written(tmp_path / "a.pdf", pdf_bytes("x"))))


# -------------------------------------------------------------------------------------------------------------- jsonl


def rows(tmp_path: Path, *lines: object) -> Path:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    return written(tmp_path / "rows.jsonl", text)


def test_jsonl_rows_keep_what_they_say(tmp_path: Path) -> None:
    path = rows(
        tmp_path,
        {"text": "  Spaces stay. ", "id": 7, "title": "T", "source": "https://x", "metadata": {"k": [1]}, "year": 1999},
        "",
        {"text": "Only \ud800 text."},
    )
    first, second = read_passages(path)
    assert (first.text, first.id, first.title, first.source) == ("  Spaces stay. ", "7", "T", "https://x")
    assert first.metadata == {"year": 1999, "k": [1]}
    assert (second.text, second.title, second.source) == ("Only \ud800 text.", "", f"{path.as_posix()}:3")


def test_a_row_of_one_and_a_half_limits_is_whole_and_a_longer_one_is_split(tmp_path: Path) -> None:
    whole, long = " ".join([SENTENCE] * 3), " ".join([SENTENCE] * 4)  # 33 and 44 words
    got = list(read_passages(rows(tmp_path, {"text": whole, "id": "a"}, {"text": long, "id": "b"}), words=22))
    assert [p.id for p in got] == ["a", "b#0", "b#1"]
    assert [p.text for p in got] == [whole, " ".join([SENTENCE] * 2), " ".join([SENTENCE] * 2)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[1]", "is a JSON list"),
        ({"title": "t"}, r'"text" must be a string with text, got None'),
        ({"text": "   "}, r'"text" must be a string with text'),
        ({"text": "x", "id": ["a"]}, r"'id' must be a string, got \['a'\]"),
        ({"text": "x", "metadata": "m"}, r'"metadata" must be an object'),
        ({"text": "another", "id": "first"}, "the id 'first' already stands for another text"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, line: object, message: str) -> None:
    path = rows(tmp_path, {"text": "good", "id": "first"}, line)
    reader = read_passages(path)
    assert next(reader).text == "good"
    with pytest.raises(InputError, match=re.escape(f"{path}:2") + ".*" + message):
        next(reader)


def test_undecodable_and_binary_rows_are_named(tmp_path: Path) -> None:
    for data, message in [(b'{"text": "\xeele"}', "is not utf-8"), (b"\0\1\2", "is binary")]:
        path = written(tmp_path / "rows.jsonl", b'{"text": "good"}\n' + data)
        with pytest.raises(InputError, match=re.escape(f"{path}:2") + f" {message}"):
            list(read_passages(path))


# ------------------------------------------------------------------------------------------------------------- corpus


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    root = tmp_path / "corpus"
    written(root / "b.txt", "Text b.")
    written(root / "a/z.md", "# Z\n\nText z.")
    written(root / "a/image.png", b"\x89PNG\0")
    written(root / ".hidden/c.txt", "Hidden.")
    written(root / ".d.txt", "Hidden.")
    written(root / "a/c.TXT", "Text c.")
    return root


def test_directories_are_read_in_order_without_hidden_and_unknown_files(corpus: Path) -> None:
    found = find_documents(corpus)
    assert [p.relative_to(corpus).as_posix() for p in found.files] == ["b.txt", "a/c.TXT", "a/z.md"]
    assert [p.name for p in found.skipped] == ["image.png"]
    assert [p.text for p in read_passages(str(corpus))] == ["Text b.", "Text c.", "# Z\n\nText z."]


def test_ids_are_unique_and_stay_when_files_move_or_grow(corpus: Path, tmp_path: Path) -> None:
    before = {p.text: p.id for p in read_passages([corpus, corpus / "b.txt"])}
    assert len(set(before.values())) == 3
    moved = corpus.rename(tmp_path / "moved")
    written(moved / "a/a.txt", "A new file.")
    after = {p.text: p.id for p in read_passages(moved)}
    assert before.items() < after.items()


def test_a_text_that_occurs_twice_is_one_passage(tmp_path: Path) -> None:
    written(tmp_path / "x/same.txt", SENTENCE)
    written(tmp_path / "y/same.txt", SENTENCE)
    (passage,) = read_passages(tmp_path)
    assert passage.source.endswith("x/same.txt")


@pytest.mark.parametrize("name", ["missing", "missing.txt"])
def test_a_missing_path_is_told_at_once(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=rf"{name} does not exist"):
        read_passages([tmp_path, tmp_path / name])


@pytest.mark.parametrize(
    ("charset", "message"),
    [
        (b"nope", "declares the unknown charset b'nope'; convert it"),
        (b"rot13", "declares the unknown charset b'rot13'; convert it"),  # Python knows it, and not as a text encoding
        (b"undefined", "is not undefined: .*; convert it"),
    ],
)
def test_html_in_a_charset_that_cannot_be_read(tmp_path: Path, charset: bytes, message: str) -> None:
    path = written(tmp_path / "odd.html", b"<meta charset=" + charset + b"><p>text</p>")
    with pytest.raises(InputError, match=re.escape(str(path)) + f" {message}"):
        list(read_passages(path))


def test_an_unknown_extension_that_was_named_is_told_at_once(corpus: Path) -> None:
    with pytest.raises(InputError, match=r"extension '\.png'; those that can be read are \.txt, \.md"):
        read_passages(corpus / "a/image.png")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"PK\x03\x04\0\0", "is a binary file .a NUL byte at 4."),
        (b"\xeele in latin-1", "is not utf-8: byte 0xee at 0; convert it"),
    ],
)
def test_files_that_are_no_text(tmp_path: Path, data: bytes, message: str) -> None:
    path = written(tmp_path / "bad.txt", data)
    with pytest.raises(InputError, match=re.escape(str(path)) + f" {message}"):
        list(read_passages(path))


def test_on_error_leaves_a_bad_file_out_and_goes_on(corpus: Path) -> None:
    written(corpus / "a/bad.txt", b"\xff")
    errors: list[InputError] = []
    assert [p.text for p in read_passages(corpus, on_error=errors.append)] == ["Text b.", "Text c.", "# Z\n\nText z."]
    assert len(errors) == 1
    assert "bad.txt is not utf-8" in str(errors[0])


def test_an_empty_corpus_is_told(tmp_path: Path) -> None:
    written(tmp_path / "blank.txt", " \n ")
    written(tmp_path / "image.png", b"")
    with pytest.raises(InputError, match=r"no text in 1 readable files \(1 with other extensions were skipped\)"):
        list(read_passages(tmp_path))


def test_a_directory_with_many_files_is_read_lazily(tmp_path: Path) -> None:
    written(tmp_path / "a.txt", "Good.")
    written(tmp_path / "b.txt", b"\xff")
    assert next(read_passages(tmp_path)).text == "Good."


def test_random_prose_keeps_every_word(tmp_path: Path) -> None:
    rng = random.Random(0)
    words = [
        rng.choice(["tide", "Moon", "Dr.", "3.5", "etc.", "end.", "why?", "漢字。", "\n\n", "U.S."])
        for _ in range(5000)
    ]
    path = written(tmp_path / "a.txt", " ".join(words))
    got = " ".join(p.text for p in read_passages(path, words=40))
    assert got.replace(" ", "").replace("\n", "") == "".join(words).replace("\n", "")
