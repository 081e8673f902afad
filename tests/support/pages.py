"""The code blocks of a page of the documentation, its links and its pictures, and whether its commands are real ones.

A block is run, unless ``<!-- not run: REASON -->`` stands right before it; ``<!-- file: NAME -->`` makes a file of it.
"""

from __future__ import annotations

import re
import shlex
import textwrap
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import typer

from tests.support.cli import ROOT
from vist_rag.cli import app

SHELL = ("sh", "bash", "console")
_BLOCK = re.compile(
    r"(?:^ *<!-- (?P<key>not run|file): *(?P<value>[^\n]*?) *-->\n)?"
    r"^(?P<indent> *)```(?P<language>[a-z]+)\n(?P<body>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
_ASSIGNMENT = re.compile(r"[A-Z_]+=\S*")
FOREIGN = {"curl", "ray", "vllm", "wait", "tensorboard"}
"""Programs of others that a page may name."""


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: Relative to the repository.
        language: What stands behind the fence.
        body: Its lines, without the indentation of the fence.
        reason: Why it is not run; None: it is.
        file: The file that it is to be.
    """

    page: str
    language: str
    body: str
    reason: str | None = None
    file: str | None = None

    def commands(self) -> list[list[str]]:
        """The words of each command, without prompt, comments, ``&`` and what is set before it."""
        lines = self.body.replace("\\\n", " ").splitlines()
        if self.language == "console":
            lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        commands = [[word for word in shlex.split(line, comments=True) if word != "&"] for line in lines]
        for words in commands:
            while words and _ASSIGNMENT.fullmatch(words[0]):
                del words[0]
        return [words for words in commands if words]


def blocks_of(page: Path) -> list[Block]:
    """All fenced blocks of a page that name a language, in order."""
    found = []
    for match in _BLOCK.finditer(page.read_text(encoding="utf-8")):
        note = {match["key"]: match["value"]} if match["key"] else {}
        body = textwrap.dedent(match["body"])
        name = page.relative_to(ROOT).as_posix()
        found.append(Block(name, match["language"], body, note.get("not run"), note.get("file")))
    return found


def of_vist_rag(words: list[str]) -> list[str] | None:
    """The arguments of ``vist-rag``, however it is called; None where another program is."""
    if Path(words[0]).name == "vist-rag":
        return words[1:]
    return words[words.index("vist_rag.cli") + 1 :] if "vist_rag.cli" in words else None


def check_command(words: list[str]) -> None:
    """Fail where a command names an option, an extra, a target, a script or a program that there is not."""
    arguments = of_vist_rag(words)
    if arguments is not None:
        _check_arguments(arguments)
    elif words[0] == "pip" or words[0].endswith("/pip"):
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
        asked = {extra for listed in re.findall(r"\[([a-z,-]+)\]", " ".join(words)) for extra in listed.split(",")}
        assert asked <= set(extras), f"no such extra: {asked - set(extras)}"
    elif words[0] == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
        named = [word for word in words[1:] if "=" not in word]
        assert set(named) <= set(targets), f"no such target: {words}"
    elif words[0] == "python":
        script = (ROOT / words[1]).read_text("utf-8")
        for option in (word for word in words if word.startswith("--")):
            named = option.removeprefix("--").replace("-", "_")  # an option of argparse, or an argument of typer
            assert f'"{option}"' in script or f"    {named}: Annotated" in script, f"{words[1]} has no option {option}"
    else:
        assert words[0] in FOREIGN, f"unknown program: {words}"


@cache
def _commands() -> Any:
    return typer.main.get_command(app)


def _check_arguments(arguments: list[str]) -> None:
    """Fail where ``vist-rag`` has no such command, option or number of arguments; nothing is run."""
    group = _commands()
    if arguments[0].startswith("--"):
        assert arguments in (["--help"], ["--version"])
        return
    assert arguments[0] in group.commands, f"vist-rag has no command {arguments[0]}"
    command = group.commands[arguments[0]]
    context: Any = typer.Context(command, info_name=f"vist-rag {arguments[0]}")
    wanted = [word for word in arguments[1:] if word not in (">", "<")]
    values, *_ = command.make_parser(context).parse_args(args=wanted)
    missing = [p.name for p in command.params if p.required and values.get(p.name) is None]
    assert not missing, f"{arguments}: {missing} is missing"


def pages() -> list[Path]:
    """The README and every page of the documentation that is kept in the repository."""
    generated = ("_build", "tutorials")
    found = [p for p in sorted((ROOT / "docs").rglob("*.md")) if p.relative_to(ROOT / "docs").parts[0] not in generated]
    return [ROOT / "README.md", *found, ROOT / "docs" / "tutorials" / "index.md"]


def without_code(text: str) -> str:
    """A page without its fenced blocks and its code spans, in which brackets are no links."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL))


def anchors(page: Path) -> set[str]:
    """What a link may point at within a page, as GitHub and MyST write it."""
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#{1,6} +(.+?) *$", text, re.MULTILINE)
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}
