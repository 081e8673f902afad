"""What every command of ``vist-rag`` does alike."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import vist_rag
from tests.support.cli import ROOT, failure, run, run_json, word_embedder
from tests.support.tiny import save_tiny_checkpoint
from vist_rag.cli import terminal
from vist_rag.errors import InputError

COMMANDS = ("ask", "demo", "index", "info", "render", "train")


@pytest.fixture(scope="module", autouse=True)
def _embedder() -> Iterator[None]:
    with word_embedder():
        yield


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


def test_the_command_line_loads_nothing_heavy_for_its_help() -> None:
    probe = (
        "import sys; from typer.testing import CliRunner; from vist_rag.cli import app; "
        "assert CliRunner().invoke(app, ['ask', '--help']).exit_code == 0; "
        "print(sorted({'torch', 'transformers', 'faiss', 'numpy', 'sentence_transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, stdout=subprocess.PIPE, timeout=60, check=True)
    assert done.stdout.strip() == b"[]"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_help_with_an_example(name: str) -> None:
    result = run(name, "--help")
    assert result.exit_code == 0
    assert f"Example: vist-rag {name}" in result.stdout


def test_without_arguments_the_commands_are_listed() -> None:
    result = run()
    assert all(f" {name} " in result.output for name in COMMANDS)


def test_version() -> None:
    assert run("--version").stdout == f"vist-rag {vist_rag.__version__}\n"


@pytest.mark.parametrize("arguments", [["nonsense"], ["ask"], ["ask", "q", "--index", "x", "--k-raw", "two"], ["--no"]])
def test_a_command_line_that_makes_no_sense_exits_with_2(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""


def _invoke(function: object) -> object:
    app = typer.Typer()
    app.command()(terminal.command(function))  # type: ignore[arg-type]
    return CliRunner().invoke(app, [])


def test_an_error_is_one_line() -> None:
    def fail() -> None:
        raise InputError("the file\nis\n  wrong \x1b[31m; mend it.")

    result = _invoke(fail)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "error: the file is wrong  [31m; mend it.\n"


def test_an_error_of_the_system_names_the_file() -> None:
    result = _invoke(lambda: Path("/nowhere/at all").read_text())
    assert (result.exit_code, result.stderr) == (2, "error: /nowhere/at all: No such file or directory\n")


def test_a_bug_is_not_taken_for_bad_input() -> None:
    def fail() -> None:
        raise RuntimeError("a bug")

    assert isinstance(_invoke(fail).exception, RuntimeError)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (KeyboardInterrupt(), "interrupted: nothing was changed."),
        (terminal.Interrupted("3 passages are kept."), "interrupted: 3 passages are kept."),
    ],
)
def test_ctrl_c_exits_with_130_and_says_what_is_kept(error: BaseException, line: str) -> None:
    def fail() -> None:
        raise error

    result = _invoke(fail)
    assert (result.exit_code, result.stderr) == (130, line + "\n")


def test_warnings_of_other_libraries_are_not_shown() -> None:
    def chatter() -> None:
        warnings.warn("of no interest", UserWarning, stacklevel=1)
        warnings.warn("of no interest", FutureWarning, stacklevel=1)

    assert _invoke(chatter).output == ""


def test_a_lost_cache_is_one_line_and_no_loss(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("The old bridge was built in 1867.")
    index = tmp_path / "index"
    run_json("index", tmp_path / "a.txt", "--index", index, "--no-memory")
    (index / "passages.faiss").unlink()
    result = run("ask", "bridge", "--index", index, "--model", tiny)
    assert result.exit_code == 0
    assert result.stderr.startswith("warning: ")
    assert "nothing is lost" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_text_cannot_steer_the_terminal() -> None:
    shown = terminal.printable("a\x1b[2J\r\nb\ud800c")
    assert shown == "a [2J  b c"


def test_json_is_ascii() -> None:
    result = _invoke(lambda: terminal.emit_json({"text": "Zoë \ud800"}))
    assert result.stdout.isascii()
    assert json.loads(result.stdout) == {"text": "Zoë \ud800"}


# ------------------------------------------------------------------------------------------------- a broken checkpoint


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip(path: Path) -> None:
    path.write_bytes(b"\xff" * 64 + path.read_bytes()[64:])


BREAKS = {
    "no settings": lambda d: (d / "vist.json").unlink(),
    "settings no object": lambda d: (d / "vist.json").write_text("[]"),
    "settings of another version": lambda d: (d / "vist.json").write_text('{"budget": {"k_other": 1}}'),
    "compressor cut": lambda d: _cut(d / "compressor" / "model.safetensors"),
    "compressor header": lambda d: _flip(d / "compressor" / "model.safetensors"),
    "compressor config": lambda d: (d / "compressor" / "config.json").write_text("{"),
    "no compressor": lambda d: shutil.rmtree(d / "compressor"),
    "generator cut": lambda d: _cut(d / "generator" / "model.safetensors"),
    "generator header": lambda d: _flip(d / "generator" / "model.safetensors"),
    "no tokenizer": lambda d: [path.unlink() for path in (d / "generator").glob("tokenizer*")],
    "tokenizer cut": lambda d: _cut(d / "generator" / "tokenizer.json"),
    "fusion cut": lambda d: _cut(d / "fusion" / "model.safetensors"),
    "no fusion": lambda d: shutil.rmtree(d / "fusion"),
}


@pytest.mark.parametrize("what", BREAKS)
def test_a_broken_checkpoint_is_told(tiny: Path, tmp_path: Path, what: str) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny, broken)
    BREAKS[what](broken)
    (tmp_path / "a.txt").write_text("The old bridge was built in 1867.")
    run_json("index", tmp_path / "a.txt", "--index", tmp_path / "index", "--no-memory")
    assert "broken" in failure("ask", "When?", "--index", tmp_path / "index", "--model", broken)


def test_a_checkpoint_that_is_nowhere_is_told(tmp_path: Path) -> None:
    assert "nobody/nothing" in failure("info", "--model", "nobody/nothing")
