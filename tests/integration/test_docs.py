"""The documentation does what it says: code runs, commands exist, links lead somewhere, pictures have words."""

from __future__ import annotations

import json
import re
import shutil
import tomllib
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from tests.support.cli import ROOT, run
from tests.support.pages import SHELL, Block, anchors, blocks_of, check_command, of_vist_rag, pages, without_code
from vist_rag import Passage, PassageIndex
from vist_rag.budget import POLICIES, Budget
from vist_rag.checkpoint import embedded_checkpoint
from vist_rag.evaluation.harness import load_recipe as load_evaluation
from vist_rag.retrieval.embedder import SentenceTransformerEmbedder
from vist_rag.training.recipe import load_recipe as load_training

DOCS = ROOT / "docs"
PAGES = {page.relative_to(ROOT).as_posix(): page for page in pages()}
ALL_BLOCKS = [block for page in PAGES.values() for block in blocks_of(page)]
RUN_ELSEWHERE = {
    "docs/how-to/langchain.md": "tests/integration/test_langchain.py",
    "docs/how-to/llama-index.md": "tests/integration/test_llama_index.py",
    "docs/how-to/vector-databases.md": "tests/integration/test_vector_databases.py",
}
"""Pages whose Python a file of their own runs, beside the tests of what it shows."""
RUN = [
    *(p for p in PAGES if p == "README.md" or p.startswith("docs/how-to/")),
    "docs/explanation/faq.md",
    "docs/reference/file-formats.md",
]
NOTES = {
    "bridge": "The stone bridge at Saltharrow was finished in 1867, after nine years of work.",
    "lighthouse": "The lighthouse on Cape Orrin was designed by Edda Marsh, and is seen from thirty miles away.",
    "ferry": "The ferry between Dunmere and the island of Dorrel crosses four times a day.",
    "market": "Every spring the people of Pellow hold a market for seeds, and for young trees.",
    "observatory": "The observatory of Velm stands on the hill above the town. It has been closed for years.",
    "bell": "The bell of the lightship is rung whenever the fog comes in from the strait.",
}
QUESTIONS = [
    {"question": "When was the stone bridge at Saltharrow finished?", "answers": ["1867"]},
    {"question": "Who designed the lighthouse on Cape Orrin?", "answers": ["Edda Marsh"]},
]


@pytest.fixture
def models_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedded models are loaded once for all pages; what is loaded from elsewhere, whenever it is asked for."""
    from tests.support.doors import embedded_reader
    from vist_rag import checkpoint, reader
    from vist_rag.generation import VistGenerator

    one, load, from_pretrained = embedded_reader(), checkpoint.load_compressor, VistGenerator.from_pretrained
    embedder = SentenceTransformerEmbedder()

    def compressor(directory: Path, **how: Any) -> Any:
        return one.compressor if Path(directory) == embedded_checkpoint() else load(directory, **how)

    def generator(model: Any, **how: Any) -> Any:
        ours = Path(model) == embedded_checkpoint() / "generator" and how.get("quantize") is None
        return one.generator if ours else from_pretrained(model, **how)

    monkeypatch.setattr(checkpoint, "load_compressor", compressor)
    monkeypatch.setattr(reader, "load_compressor", compressor)
    monkeypatch.setattr(VistGenerator, "from_pretrained", generator)
    monkeypatch.setattr("vist_rag.retrieval.index.SentenceTransformerEmbedder", lambda *_: embedder)


@pytest.fixture
def at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of notes, a report and questions, as the pages take them for granted."""
    from tests.unit.retrieval.test_chunking import pdf_bytes

    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes").mkdir()
    for name, text in NOTES.items():
        (tmp_path / "notes" / f"{name}.md").write_text(f"# {name.title()}\n\n{text}\n", encoding="utf-8")
    (tmp_path / "report.pdf").write_bytes(pdf_bytes("The tide at Dunmere turns at six in the morning."))
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS), encoding="utf-8")
    return tmp_path


def _index_of_notes() -> None:
    with PassageIndex.open("my-index") as index:
        index.add([Passage(text, title=name.title()) for name, text in NOTES.items()])


def _results_of_nq() -> None:
    Path("results").mkdir()
    shutil.copy(ROOT / "benchmarks" / "results" / "eval" / "nq-test-gold.json", "results")


def _language_model() -> None:
    from tests.support.causal import causal_generator

    llm = causal_generator("qwen3")
    llm.model.save_pretrained("my-llm")
    llm.tokenizer.save_pretrained("my-llm")


BEFORE: dict[str, Callable[[], None]] = {
    "docs/how-to/evaluate.md": _index_of_notes,
    "docs/how-to/many-gpus.md": _index_of_notes,
    "docs/how-to/own-llm.md": _language_model,
    "docs/how-to/reading-the-figures.md": _results_of_nq,
}
"""What a page says that its reader has."""


def _readme(printed: list[str]) -> None:
    first, budget, langchain, llama_index = printed
    assert first.split()[0] == "1867"
    assert first.split()[-1] == "Bridge"
    assert 15 <= int(budget.split()[0]) <= 20 < int(budget.split()[1])
    (before, positions_before), (after, positions_after) = (line.rsplit(maxsplit=1) for line in langchain.splitlines())
    assert before == after == "Edda Marsh"
    assert int(positions_after) < int(positions_before)
    assert llama_index.splitlines() == ["Edda Marsh", "Edda Marsh"]


def _budget(printed: list[str]) -> None:
    tokens, rate, by_rank, raw = ([int(n) for n in line.split()] for line in printed[0].splitlines())
    assert tokens[:2] == by_rank[:2] == [24, 24]
    assert rate[0] == rate[1] == rate[2] // 4
    assert raw[0] == 80 > raw[1] > 24
    assert Budget().policy == "fixed"


def _figures(printed: list[str]) -> None:
    assert "memory             2.7x  0.346 [0.316, 0.375]" in printed[0]


def _many_gpus(printed: list[str]) -> None:
    assert printed == ["1867\n"]


AFTER: dict[str, Callable[[list[str]], None]] = {
    "README.md": _readme,
    "docs/how-to/budget.md": _budget,
    "docs/how-to/many-gpus.md": _many_gpus,
    "docs/how-to/reading-the-figures.md": _figures,
}
"""What its Python has to print."""


@pytest.mark.slow
@pytest.mark.parametrize("name", RUN)
def test_the_code_of_a_page_runs(
    name: str, at_home: Path, models_once: None, settings_of_llama_index: None, capsys: pytest.CaptureFixture[str]
) -> None:
    if name in RUN_ELSEWHERE:
        assert Path(name).name in (ROOT / RUN_ELSEWHERE[name]).read_text("utf-8")
    if name in BEFORE:
        BEFORE[name]()
    space: dict[str, Any] = {"__name__": name}
    printed: list[str] = []
    for block in blocks_of(PAGES[name]):
        if block.file is not None:
            Path(block.file).write_text(block.body, encoding="utf-8")
        elif block.reason is not None:
            continue
        elif block.language == "python" and name not in RUN_ELSEWHERE:
            capsys.readouterr()
            exec(compile(block.body, name, "exec"), space)
            printed.append(capsys.readouterr().out)
        elif block.language in SHELL:
            for words in block.commands():
                _run_here(words)
    if name in AFTER:
        AFTER[name](printed)


def _run_here(words: list[str]) -> None:
    """A command of ours, in this process; others are checked, and so is a server, which does not come back."""
    check_command(words)
    arguments = of_vist_rag(words)
    if arguments is None or arguments[0] == "serve":
        return
    result = run(*(arguments[: arguments.index(">")] if ">" in arguments else arguments))
    assert result.exit_code == 0, (words, result.output)
    if ">" in arguments:
        Path(arguments[-1]).write_text(result.stdout, encoding="utf-8")


@pytest.fixture
def settings_of_llama_index() -> Iterator[None]:
    from llama_index.core import Settings

    before = Settings._llm, Settings._prompt_helper, Settings._embed_model
    yield
    Settings._llm, Settings._prompt_helper, Settings._embed_model = before


@pytest.mark.parametrize("name", PAGES)
def test_the_blocks_of_a_page_are_well_formed(name: str, record_property: Callable[[str, object], None]) -> None:
    blocks = blocks_of(PAGES[name])
    for block in blocks:
        _check_block(block)
    left_out = [block for block in blocks if block.reason is not None]
    record_property("not run", len(left_out))
    for block in left_out:
        assert len(block.reason or "") >= 10, f"a reason says what is missing: {block}"
        for path in re.findall(r"tests/\S+?\.py", block.reason or ""):
            assert (ROOT / path).is_file(), f"{name}: {path} is not there"


def _check_block(block: Block) -> None:
    if block.language == "python":
        compile(block.body, block.page, "exec")
    elif block.language == "json":
        json.loads(block.body.replace('"..."', '""'))
    elif block.language in SHELL:
        for words in block.commands():
            check_command(words)
    elif block.language == "toml":
        tomllib.loads(block.body)


def test_recipes_that_are_printed_whole_are_recipes(tmp_path: Path) -> None:
    kinds = []
    for block in ALL_BLOCKS:
        if block.language == "toml":
            (tmp_path / "printed.toml").write_text(block.body, encoding="utf-8")
            if "[[stages]]" in block.body:
                kinds.append("stages")
                load_training(tmp_path / "printed.toml")
            elif "[[blocks]]" in block.body:
                kinds.append("blocks")
                load_evaluation(tmp_path / "printed.toml")
    assert sorted(kinds) == ["blocks", "stages", "stages"]


def test_few_blocks_are_not_run(record_property: Callable[[str, object], None]) -> None:
    in_what_runs = [b for b in ALL_BLOCKS if b.page in RUN and b.language in ("python", *SHELL)]
    left_out = [f"{b.page}: {b.reason}" for b in in_what_runs if b.reason is not None]
    record_property("not run", f"{len(left_out)} of {len(in_what_runs)}")
    assert len(left_out) < len(in_what_runs) / 2, left_out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["vist-rag", "ask", "When?", "--folder", "x"], "folder"),
        (["vist-rag", "asks", "When?"], "no command asks"),
        (["vist-rag", "ask", "When?"], "is missing"),
        (["pip", "install", "vist-rag[everything]"], "no such extra"),
        (["make", "tea"], "no such target"),
        (["python", "benchmarks/render.py", "--fast"], "no option --fast"),
        (["wget", "x"], "unknown program"),
    ],
)
def test_a_command_that_is_not_there_is_found(words: list[str], message: str) -> None:
    with pytest.raises(Exception, match=message):
        check_command(words)


SOURCES = [
    *PAGES.values(),
    *(ROOT / n for n in ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")),
    embedded_checkpoint() / "README.md",
]


@pytest.mark.parametrize("page", SOURCES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere_and_pictures_have_an_alternative_in_words(page: Path) -> None:
    text = without_code(page.read_text("utf-8"))
    for bang, words, target in re.findall(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", text):
        if bang:
            assert len(words.split()) >= 3, f"{target} has no words for those who do not see it"
        if re.match(r"[a-z]+:", target):
            assert target.startswith("https://"), target
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target} is not there"
        if anchor:
            assert anchor in anchors(file), f"{page.name}: {target}: no such heading among {sorted(anchors(file))}"


def test_every_page_is_in_the_index() -> None:
    named = re.findall(r"^([\w*/-]+)$", (DOCS / "index.md").read_text("utf-8"), re.MULTILINE)
    there = {page.relative_to(DOCS).with_suffix("").as_posix() for page in PAGES.values() if page.is_relative_to(DOCS)}
    for name in named:
        assert name in there or "*" in name, f"docs/index.md names {name}, which is not there"
    patterns = [name for name in named if "*" in name]
    lost = {page for page in there - {"index"} - set(named) if f"{page.rpartition('/')[0]}/*" not in patterns}
    assert not lost


@pytest.mark.parametrize(
    ("module", "page", "elsewhere"),
    [
        ("vist_rag", "api", {"RendererConfig"}),  # which stands under configuration
        ("langchain_vist", "api-langchain", set()),
        ("llama_index_vist", "api-llama-index", set()),
    ],
)
def test_every_public_name_is_in_the_reference(module: str, page: str, elsewhere: set[str]) -> None:
    text = (DOCS / "reference" / f"{page}.md").read_text("utf-8")
    named = set(re.findall(rf"\b{module}\.(\w+)", text))
    assert named >= set(import_module(module).__all__) - elsewhere
    assert named - set(import_module(module).__all__) == set()


def test_the_figures_of_the_how_to_on_budgets_are_those_of_the_file() -> None:
    page = (DOCS / "how-to" / "budget.md").read_text("utf-8")
    result = json.loads((ROOT / "benchmarks" / "results" / "budget-exact.json").read_text("utf-8"))
    assert result["violations"] == 0
    assert (result["planned"]["cases"], result["answered"]["answers"]) == (10_000, 200)
    for tokens in (64, 128):
        cells = (result["quality"][f"tokens_{tokens}"][policy] for policy in POLICIES)
        row = " | ".join(f"{cell['em']:.3f} [{cell['em_95'][0]:.3f}, {cell['em_95'][1]:.3f}]" for cell in cells)
        assert f"| {tokens} | {row} |" in page
