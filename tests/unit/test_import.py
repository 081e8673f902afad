"""`import vist_rag` is quick, quiet, and complete."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version

import pytest

import vist_rag
import vist_rag.errors

# What the bare import may not bring: each takes longer to load than the package is allowed to.
HEAVY = ("torch", "transformers", "sentence_transformers", "faiss", "numpy", "tokenizers", "huggingface_hub")

PROBE = """
import json, socket, sys, time

def refuse(*args, **kwargs):
    raise SystemExit("a socket was opened at import")

socket.socket.__init__ = refuse
socket.getaddrinfo = refuse
start = time.perf_counter()
import vist_rag
from vist_rag import Answer, Citation, Passage, RendererConfig, SearchHit, Usage, VistError
seconds = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "modules": sorted(sys.modules)}))
"""


@pytest.fixture(scope="module")
def bare_import() -> dict[str, object]:
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_import_takes_under_a_second(bare_import: dict[str, object]) -> None:
    assert bare_import["seconds"] < 1.0


def test_import_loads_nothing_heavy(bare_import: dict[str, object]) -> None:
    assert set(HEAVY).isdisjoint(bare_import["modules"])
    assert "vist_rag.types" in bare_import["modules"]


@pytest.mark.parametrize("name", vist_rag.__all__)
def test_every_public_name_resolves(name: str) -> None:
    value = getattr(vist_rag, name)
    if name != "__version__":
        assert value.__name__ == name
        assert value.__module__.startswith("vist_rag.")


def test_version_is_that_of_the_distribution() -> None:
    assert vist_rag.__version__ == version("vist-rag")


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Passages'"):
        vist_rag.Passages  # noqa: B018


def test_every_error_is_public() -> None:
    raised = {
        name
        for name, value in vars(vist_rag.errors).items()
        if isinstance(value, type) and issubclass(value, vist_rag.errors.VistError)
    }
    assert raised <= set(vist_rag.__all__)


def test_dir_lists_what_can_be_imported() -> None:
    assert dir(vist_rag) == sorted(vist_rag.__all__)
