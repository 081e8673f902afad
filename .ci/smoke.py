"""What an installed vist-rag must do, by the Python that it is installed for: ``python -I smoke.py``.

Knows the distribution only: run it outside the checkout, in an environment with the extra ``offline``.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import tempfile
import time
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

ROOTS = {"vist_rag", "langchain_vist", "llama_index_vist"}
NEEDED = (
    "vist_rag/assets/model/compressor/model.safetensors",
    "vist_rag/assets/model/compressor/fidelity.json",
    "vist_rag/assets/model/fusion/model.safetensors",
    "vist_rag/assets/model/generator/model.safetensors",
    "vist_rag/assets/model/generator/tokenizer.json",
    "vist_rag/assets/noto-sans-10px.safetensors",
    "vist_rag/assets/demo/passages_world.jsonl",
    "vist_rag/assets/demo/questions_handbook.jsonl",
    "vist_rag/training/recipes/embedded.toml",
    "vist_rag/evaluation/recipes/embedded-test.toml",
    "vist_rag/py.typed",
    "langchain_vist/py.typed",
    "llama_index_vist/py.typed",
)
NOTES = {
    "bridge.txt": "The stone bridge at Saltharrow was finished in 1867, after nine years of work.",
    "bell.md": "# The bell\n\nThe bell of the lightship is rung whenever a new product passes its sea trial.",
}


def main() -> None:
    """Files, imports, commands; the last line that is printed is JSON."""
    seconds = {}
    for check in (files, imports, info, own_documents, demo):
        start = time.perf_counter()
        check()
        seconds[check.__name__] = round(time.perf_counter() - start, 1)
    print(json.dumps({"python": sys.version.split()[0], "seconds": seconds}))


def files() -> None:
    """Every asset is there, and nothing that users have no use for."""
    dist = distribution("vist-rag")
    names = {path.as_posix() for path in dist.files or ()}
    assert not set(NEEDED) - names, f"missing: {sorted(set(NEEDED) - names)}"
    tops = {name.partition("/")[0] for name in names} - {".."}
    assert tops == ROOTS | {f"vist_rag-{dist.version}.dist-info"}, sorted(tops)
    assert {path.name for path in dist.files or () if "licenses" in path.parts} == {"LICENSE", "NOTICE"}


def imports() -> None:
    """The package and both doors are imported from the environment, without the frameworks that they are doors of."""
    for name in sorted(ROOTS):
        module = importlib.import_module(name)
        assert Path(str(module.__file__)).is_relative_to(sys.prefix), module.__file__
        assert module.__all__, name
    import vist_rag

    assert vist_rag.__version__ == distribution("vist-rag").version
    assert vist_rag.VistRAG.__name__ == "VistRAG"


def info() -> None:
    """``vist-rag info`` reads the embedded model."""
    told = _vist_rag("info")
    assert told["versions"]["vist-rag"] == distribution("vist-rag").version
    assert Path(told["checkpoint"]["directory"]).is_relative_to(sys.prefix)


def own_documents() -> None:
    """A small folder is indexed, and a question over it answered from memory, with its citation."""
    with tempfile.TemporaryDirectory() as scratch:
        notes, index = Path(scratch, "notes"), Path(scratch, "index")
        notes.mkdir()
        for name, text in NOTES.items():
            (notes / name).write_text(text, encoding="utf-8")
        _vist_rag("index", notes, "--index", index)
        question = "When was the stone bridge at Saltharrow finished?"
        told = _vist_rag("ask", question, "--index", index, "--k-raw", 0, "--k-memory", 1, "--guard", "off")
        assert "1867" in told["answer"], told
        assert [citation["mode"] for citation in told["citations"]] == ["memory"], told


def demo() -> None:
    """``vist-rag demo`` indexes the bundled corpus and gets answers right."""
    with tempfile.TemporaryDirectory() as scratch:
        told = _vist_rag("demo", "--index", Path(scratch, "index"))
        assert told["index"]["passages"] >= 240, told["index"]
        assert any(row["right"] for row in told["questions"]), told["questions"]


def _vist_rag(*words: object) -> Any:
    command = [str(Path(sys.executable).parent / "vist-rag"), *map(str, words), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return json.loads(done.stdout)


if __name__ == "__main__":
    main()
